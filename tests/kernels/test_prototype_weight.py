"""prototype_weight: the kernels and the reference against the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.layers import prototype_weight as module
from fastdino_kernels.layers.prototype_weight import prototype_weight, prototype_weight_reference
from fastdino_kernels.testing import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (K, D): whole tiles, ragged rows, ragged columns, a row longer than a tile, one element, wider than the kernel takes.
SHAPES = [(48, 256), (37, 64), (20, 50), (3, 4100), (2, 3000), (1, 1), (5, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return (g * v / v.norm(dim=1, keepdim=True)).to(dtype)


def results(weight: Any, v: Tensor, g: Tensor, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The weight and the gradients of v and g."""
    v, g = v.clone().requires_grad_(), g.clone().requires_grad_()
    w = weight(v, g, dtype)
    w.backward(grad.to(w.dtype))
    assert v.grad is not None
    assert g.grad is not None
    return w.detach(), v.grad, g.grad


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    v *= 10 ** torch.linspace(-2, 2, len(v))[:, None]  # rows of all lengths
    g = torch.rand(len(v), 1, generator=generator) + 0.5
    return v.to(DEVICE, dtype), g.to(DEVICE, dtype), grad.to(DEVICE)


def check(shape: tuple[int, int], dtype: torch.dtype, out: torch.dtype) -> None:
    v, g, grad = inputs(shape, dtype)
    grad = grad.to(out).float()  # the same gradient for all three
    exact = results(formula, v.double(), g.double(), grad, torch.float64)
    plain = results(prototype_weight_reference, v, g, grad, out)
    fused = results(prototype_weight, v, g, grad, out)
    assert fused[0].dtype == out
    assert [x.dtype for x in fused[1:]] == [dtype, dtype]
    norms = v.double().norm(dim=1, keepdim=True)
    for got, ref, want, scale in zip(fused, plain, exact, (1, norms, 1), strict=True):
        # v's gradient shrinks with its row: judged row by row, not by the shortest alone.
        assert_no_worse((got * scale).to(got.dtype), (ref * scale).to(ref.dtype), want * scale)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape: tuple[int, int], dtype: torch.dtype, out: torch.dtype) -> None:
    check(shape, dtype, out)


def test_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch_config", lambda _: {"BLOCK_ROWS": 4, "BLOCK_D": 64, "num_warps": 2})
    check((23, 50), torch.float32, torch.float32)


def test_reference_is_the_formula() -> None:
    v, g, grad = (x.double() for x in inputs((9, 30), torch.float32))
    for got, want in zip(
        results(prototype_weight_reference, v, g, grad, torch.float64),
        results(formula, v, g, grad, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(prototype_weight, (v[:3].requires_grad_(), g[:3].requires_grad_()))


def test_frozen_norms_and_strided_gradient() -> None:
    """g takes no gradient where it is frozen; the gradient of w may come transposed."""
    v, g, grad = inputs((20, 64), torch.float32)
    w = prototype_weight(v.requires_grad_(), g)
    w.backward(grad.t().contiguous().t())
    assert g.grad is None
    assert v.grad is not None
    exact = results(formula, v.detach().double(), g.double(), grad, torch.float64)
    torch.testing.assert_close(v.grad.double(), exact[1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(w.norm(dim=1), g.squeeze(1), rtol=1e-6)


def test_dtype_is_that_of_v_unless_named() -> None:
    assert prototype_weight(torch.ones(3, 4, device=DEVICE).bfloat16(), torch.ones(3, 1, device=DEVICE)).dtype == (
        torch.bfloat16
    )


def test_a_row_of_zeros_is_not_hidden() -> None:
    v = torch.ones(3, 8, device=DEVICE)
    v[1] = 0
    for weight in (prototype_weight, prototype_weight_reference):
        assert weight(v, torch.ones(3, 1, device=DEVICE)).isnan().all(1).tolist() == [False, True, False]


def test_refused() -> None:
    v, g = torch.ones(4, 6), torch.ones(4, 1)
    for bad_v, bad_g in [
        (v[0], g), (v[:0], g[:0]), (v, g.squeeze(1)), (v, g[:3]), (v.t(), torch.ones(6, 1)), (v, g.to("meta")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"contiguous v \(K, D\)"):
            prototype_weight(bad_v, bad_g)
    with pytest.raises(ValueError, match="floating-point"):
        prototype_weight(v, g, torch.int32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_size(dtype: torch.dtype) -> None:
    check((65_536, 256), dtype, torch.bfloat16)
