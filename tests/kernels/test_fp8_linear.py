"""fp8_linear: against the formula with a rounding written out, against what e4m3 implies, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastdino_kernels.layers.fp8_linear import _product, fp8_linear, fp8_linear_reference
from fastdino_kernels.testing import assert_no_worse
from tests.kernels.calls import DEVICE

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x (.., K), weight (N, K), bias (N,), gradient (.., N)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BOTH = pytest.mark.parametrize("implementation", [fp8_linear, fp8_linear_reference], ids=["public", "reference"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((3, 70), 128, 256), ((37,), 48, 32), ((), 16, 16), ((1,), 16, 64), ((2, 3, 5), 32, 48)]


def inputs(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, spread: float = 0.0) -> Inputs:
    """Rows whose sizes differ by factors of e^spread, and values within a row too."""
    (leading, N, K), generator = shape, torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        return x * (spread * torch.randn(size, generator=generator).double()).exp()

    rows = (2 * spread * torch.randn((*leading, 1), generator=generator).double()).exp()
    x, weight, bias, grad = random(*leading, K) * rows, random(N, K) * K**-0.5, random(N), random(*leading, N)
    return tuple(tensor.to(DEVICE, dtype) for tensor in (x, weight, bias, grad))  # type: ignore[return-value]


def results(linear: Linear, given: Inputs) -> list[Tensor]:
    """y, and the gradients for x, weight and bias."""
    *leaves, grad = (tensor.detach() for tensor in given)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact(given: Inputs) -> list[Tensor]:
    return results(F.linear, tuple(tensor.double() for tensor in given))  # type: ignore[arg-type]


def rounded(rows: Tensor) -> Tensor:
    """r of the formula: 3 bits after the leading one down to 2^-6, then steps of 2^-9; ties to even, and what is a tie
    depends on how the scale is rounded."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = rows.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale == 0, 1.0, scale)
    value = rows / scale
    step = 2.0 ** (value.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (value / step).round().double() * step * scale


def written_out(given: Inputs) -> list[Tensor]:
    """The formula in float64."""
    x, weight, bias, grad = given
    y = rounded(x) @ rounded(weight).T + bias.double()
    grad_x = rounded(grad) @ rounded(weight.T).T
    rows = grad.double().reshape(-1, grad.shape[-1])
    return [y, grad_x, rows.T @ x.double().reshape(-1, x.shape[-1]), rows.sum(0)]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_formula(
    implementation: Linear, shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, spread: float
) -> None:
    """No worse than products of the factors, rounded by hand, that are rounded once more to the dtype."""
    given = inputs(shape, dtype, spread)
    for got, want in zip(results(implementation, given), written_out(given), strict=True):
        assert got.dtype == dtype
        assert_no_worse(got, want.to(dtype), want)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.3, 0.8])
def test_error_is_what_e4m3_implies(implementation: Linear, dtype: torch.dtype, spread: float) -> None:
    """Of each factor 2^-4 of itself, or half of the smallest step, 2^-9 of 1/448 of its row's largest."""
    given = inputs(((400,), 64, 512), dtype, spread)
    found, want = results(implementation, given), exact(given)
    x, weight, _, grad = (tensor.double() for tensor in given)
    slack = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-9
    for got, true, a, b in ((found[0], want[0], x, weight), (found[1], want[1], grad, weight.T)):
        off = [rows.abs() / 16 + rows.abs().amax(-1, keepdim=True) / 448 / 1024 for rows in (a, b)]
        bound = (a.abs() + off[0]) @ (b.abs() + off[1]).T - a.abs() @ b.abs().T
        reached = (got.double() - true).abs()
        assert (reached <= bound + slack * (true.abs() + a.abs() @ b.abs().T)).all()
        assert (reached.norm() / true.norm()) < 0.05, "errors of many factors cancel"
        assert (reached.norm() / true.norm()) > 0.01, "something was rounded"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_parameters_are_exact(dtype: torch.dtype) -> None:
    """As F.linear's, whatever the tokens' spread."""
    given = inputs(((400,), 64, 512), dtype, 0.8)
    for got, plain, want in zip(results(fp8_linear, given), results(F.linear, given), exact(given), strict=True):
        if got.shape[0] != 400:
            assert_no_worse(got, plain, want)


@BOTH
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
def test_a_row_has_a_scale_of_its_own(implementation: Linear, size: float) -> None:
    """Whatever its neighbours are, and zeros give the bias."""
    x, weight, bias, grad = inputs(((4,), 32, 64), torch.float32)
    alone = results(implementation, (x, weight, torch.zeros_like(bias), grad))
    factors = torch.tensor([[1.0], [size], [0.0], [1.0]], device=DEVICE)
    y, grad_x, *_ = results(implementation, (x * factors, weight, torch.zeros_like(bias), grad * factors))
    torch.testing.assert_close(y / factors.clamp_min(1e-38), alone[0] * (factors != 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x / factors.clamp_min(1e-38), alone[1] * (factors != 0), rtol=1e-4, atol=1e-4)
    assert torch.equal(implementation(x * 0, weight, bias), bias.expand(4, -1))


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_row(implementation: Linear, value: float) -> None:
    x, weight, bias, grad = inputs(((5,), 32, 64), torch.float32)
    x[1, 3], grad[2, 4] = value, value
    y, grad_x, *_ = results(implementation, (x, weight, bias, grad))
    for result, row in ((y, 1), (grad_x, 2)):
        assert result[row].isnan().all()
        assert result.isnan().sum() == result.shape[1]
    weight[7, 5] = value
    assert results(implementation, (x.nan_to_num(0, 0, 0), weight, bias, grad))[0].isnan().nonzero()[:, 1].unique() == 7


@BOTH
def test_strides(implementation: Linear) -> None:
    """Rows of a larger weight, a transposed x, a gradient that is one number for all."""
    x, weight, bias, grad = inputs(((48,), 32, 48), torch.float32)
    grad = grad[0, 0].expand(48, 32)
    larger = torch.cat([weight, weight * 100])[:32]
    strided = results(implementation, (x.T.contiguous().T, larger, bias, grad))
    dense = results(implementation, (x, weight, bias, grad.contiguous()))
    for got, want in zip(strided, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("N", "K"), [(24, 32), (32, 40), (1, 16)])
def test_sides_that_are_no_multiple_are_not_rounded(N: int, K: int) -> None:
    given = inputs(((7,), N, K), torch.float32)
    for got, want in zip(results(fp8_linear, given), results(F.linear, given), strict=True):
        assert torch.equal(got, want)


def test_without_a_bias() -> None:
    x, weight, bias, _ = inputs(((7,), 32, 48), torch.float32)
    torch.testing.assert_close(fp8_linear(x, weight), fp8_linear(x, weight, bias * 0))
    assert torch.autograd.grad(fp8_linear(x.requires_grad_(), weight).sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_torchs_product_takes_the_operands(tokens: int) -> None:
    """By its own rules on layouts, scales and sizes, which it tells without a GPU; forward and backward."""
    bf16 = {"dtype": torch.bfloat16, "device": "cuda:0"}
    with FakeTensorMode():
        x, weight, bias = torch.empty(2, tokens, 64, **bf16), torch.empty(48, 64, **bf16), torch.empty(48, **bf16)  # type: ignore[call-overload]
        y = fp8_linear(x, weight[:32], bias[:32])
        grad_x = _product(y, weight[:32].t(), None, scaled=True, fast=False)
    assert (y.shape, y.dtype) == ((2, tokens, 32), torch.bfloat16)
    assert (grad_x.shape, grad_x.dtype) == ((2, tokens, 64), torch.bfloat16)


WEIGHT = torch.ones(32, 48)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(3, 47), WEIGHT, None, r"x \(.., K\) and weight \(N, K\); got \(3, 47\) and \(32, 48\)"),
        (torch.ones(()), WEIGHT, None, r"got \(\) and"),
        (torch.ones(3, 48), WEIGHT[0], None, r"and \(48,\)"),
        (torch.ones(3, 48).int(), WEIGHT.int(), None, "fp32, bf16, fp16 or fp64; got torch.int32"),
        (torch.ones(3, 48).to(torch.float8_e4m3fn), WEIGHT, None, "got torch.float8_e4m3fn"),
        (torch.ones(3, 48), WEIGHT.bfloat16(), None, "weight in torch.float32 on cpu; got torch.bfloat16"),
        (torch.ones(3, 48), WEIGHT, torch.ones(31), r"bias \(32,\); got \(31,\)"),
        (torch.ones(3, 48), WEIGHT, torch.ones(32).double(), "bias in torch.float32 on cpu; got torch.float64"),
    ],
)
def test_refusals(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8_linear(x, weight, bias)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has the reference alone")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [((1, 5521), 4096, 1024), ((1, 5521), 1024, 4096), ((37,), 3072, 1024)], ids=str)
def test_scaled_products(shape: tuple[tuple[int, ...], int, int], compiled: bool) -> None:
    """At real sizes, eager and with the rounding fused."""
    given = inputs(shape, torch.bfloat16, 0.5)
    linear = torch.compile(fp8_linear, fullgraph=True, dynamic=False) if compiled else fp8_linear
    (y, *grads), (true, *true_grads) = results(linear, given), written_out(given)
    for got, want in zip(grads, true_grads, strict=True):
        assert_no_worse(got, want.bfloat16(), want)
    # y's sums are the tensor cores' own: with every 32 products they cut all terms off 13 bits below the largest. Of
    # 100,000 sums, simulated, none was off by more than 2^-10.9 of its terms' magnitudes. And bf16 rounds by 2^-8.
    x, weight, bias, _ = given
    magnitude = rounded(x).abs() @ rounded(weight).abs().T + bias.double().abs()
    assert ((y.double() - true).abs() <= 2.0**-8 * true.abs() + 2.0**-10 * magnitude).all()
