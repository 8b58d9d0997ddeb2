"""What the operations share: which implementation runs, operators, and helpers of several."""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads the variable when a kernel is decorated, so it must be set before this package is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2_E = math.log2(math.e)  # a GPU has 2^x, not e^x: kernels take logits times it

LAUNCHERS: dict[str, Callable[..., Any]] = {}  # what is behind each operator


def use_triton(x: Tensor) -> bool:
    """True on a GPU, and on the CPU under Triton's interpreter (tests only)."""
    return x.is_cuda or INTERPRETED


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a reference's arithmetic: at least fp32; fp64 stays fp64, so a reference is the tests' truth."""
    return x.dtype if x.dtype == torch.float64 else torch.float32


def operator(*mutated: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher as ``torch.ops.fastdino.NAME``, which writes into the arguments ``mutated`` alone.

    torch.compile takes it whole, knows what it writes, and asks its ``register_fake`` for the shapes of its results.
    All else (most checks, the choice of the reference, autograd) is plain Python, which is traced.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        LAUNCHERS[launcher.__name__] = launcher
        return torch.library.custom_op(f"fastdino::{launcher.__name__}", launcher, mutates_args=mutated)

    return register


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself when its rows are contiguous and apart from each other, else a copy."""
    return x.contiguous() if x.stride(-1) != 1 or 0 in x.stride() else x


def check_single_backward(ctx: Any) -> None:
    """Raises RuntimeError in the second backward pass of what works in place; ``ctx.consumed`` is False at first."""
    if ctx.consumed:
        raise RuntimeError(
            "inplace_grad=True has already overwritten the student's logits with their gradient: "
            "call backward once, or pass inplace_grad=False"
        )
    ctx.consumed = True


@operator("x")
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiplies (M, K) ``x`` by a number on the device, in a launch that returns at once where that is 1."""
    M, K = x.shape
    config = {"BLOCK": min(4096, max(128, triton.next_power_of_2(K))), "num_warps": 4}
    with torch.cuda.device_of(x):
        _scale_kernel[(M,)](x, factor, x.stride(0), K=K, **config)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    # One program: a row, so that few of them find that there is nothing to do.
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        x_ptr += tl.program_id(0).to(tl.int64) * stride
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < K if K % BLOCK else tl.full([BLOCK], True, tl.int1)
            x = tl.load(x_ptr + k, mask=inside).to(tl.float32) * factor
            tl.store(x_ptr + k, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lerp(old, new, weight):
    # old + weight * (new - old), from the nearer end as torch.lerp does it. With scale 0 the nearer end itself, bit for
    # bit, whatever the other one is.
    near_old = weight < 0.5
    base = tl.where(near_old, old, new)
    scale = tl.where(near_old, weight, weight - 1)
    return tl.where(scale == 0, base, base + scale * (new - old))
