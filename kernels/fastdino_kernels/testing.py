"""How a kernel is judged: not worse than plain torch in the same dtype, against float64."""

import torch
from torch import Tensor

from fastdino_kernels._backend import INTERPRETED

# Allowed error beyond plain torch's own, relative to the exact result's root mean square. In fp32 an exponent of 40 is
# rounded by 2e-6, and the peak of a softmax, where this counts, is 20 times the root mean square.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# The interpreter truncates on a store where hardware rounds: up to one unit in the last place.
_TRUNCATION = {torch.float32: 0.0, torch.float64: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from the fp64 tensor ``exact``, relative to its root mean square."""
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    difference = (got.double() - exact.double()).abs().max()
    scale = exact.double().square().mean().sqrt()
    return (difference / scale.clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_no_worse(kernel: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """Demands error(kernel) <= error(plain) + tolerance, both against ``exact`` in fp64.

    Args:
        kernel: the result under judgement.
        plain: the same by plain torch in the same dtype: what an honest implementation loses there.
        exact: the same in fp64.
        dtype: the inputs' dtype, which sets the tolerance; that of ``kernel`` by default.

    Raises AssertionError, also when the kernel's result is not finite where the exact one is.
    Source: the criterion of Wijmans et al. 2024 (Cut Your Losses), section 5.
    """
    dtype = kernel.dtype if dtype is None else dtype
    allowed = error(plain, exact) + TOLERANCE[dtype]
    if INTERPRETED:
        peak = exact.double().abs().max() / exact.double().square().mean().sqrt().clamp_min(1e-300)
        allowed += _TRUNCATION[kernel.dtype] * peak.item()
    reached = error(kernel, exact)
    assert reached <= allowed, f"error {reached:.3g} of the kernel, {allowed:.3g} allowed ({dtype})"  # NaN fails too
