"""gather_layer_norm and scatter_add_scaled: the kernels against float64 and the formula, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels import gather_norm, sample_drop, scatter_add
from fastdino_kernels.gather_norm import gather_layer_norm, gather_layer_norm_reference
from fastdino_kernels.scatter_add import scatter_add_scaled, scatter_add_scaled_reference
from fastdino_kernels.testing import assert_no_worse

# Triton's interpreter works with NumPy, which warns of the infinities that these tests are about.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::Warning:triton.runtime.interpreter"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, M, N, D) with small_blocks: several programs per image and tiles per program, ragged in N and D; all images kept,
# in another order; one of many; more kept than are searched together; one token of one feature.
SHAPES = [(4, 2, 19, 48), (3, 3, 5, 64), (9, 1, 8, 20), (11, 7, 3, 33), (2, 1, 1, 1)]
IDS = ["kernel", "reference"]
GATHER = pytest.mark.parametrize("gather", [gather_layer_norm, gather_layer_norm_reference], ids=IDS)
SCATTER = pytest.mark.parametrize("scatter", [scatter_add_scaled, scatter_add_scaled_reference], ids=IDS)
Shape = tuple[int, int, int, int]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"BLOCK_ROWS": 2, "BLOCK_D": 64, "num_warps": 2}
    config = {"each": {**block, "TOKENS": 4}, "sum": {**block, "TOKENS": 8}}
    for module in (sample_drop, gather_norm, scatter_add):
        monkeypatch.setattr(module, "launch_config", lambda width: config)
    for module in (gather_norm, scatter_add):
        monkeypatch.setattr(module, "search_block", lambda num_rows: 4)


class Inputs:
    """Tokens of a dtype, of unequal means and deviations; vectors of theirs or another; rows in no order."""

    def __init__(self, shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None = None) -> None:
        B, M, N, D = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = random(B, N, 1) + random(B, N, D) * random(B, N, 1).exp()
        self.x, self.grad = x.to(dtype), random(B, N, D).to(dtype)
        self.branch, self.grad_y = random(M, N, D).to(dtype), random(M, N, D).to(dtype)
        self.weight, self.bias, self.layer_scale = (random(D).to(vectors or dtype) for _ in range(3))
        self.rows = torch.randperm(B, generator=generator)[:M]

    def to(self, *where: Any) -> "Inputs":
        moved = object.__new__(Inputs)
        for name, tensor in vars(self).items():
            is_rows = name == "rows" and isinstance(where[0], torch.dtype)
            setattr(moved, name, tensor if is_rows else tensor.to(*where))
        return moved


def gathered(implementation: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The result and the gradients of x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    y = implementation(leaves[0], inputs.rows, *leaves[1:], eps=1e-3)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad_y.to(y.dtype))]


def scattered(implementation: Callable[..., Tensor], inputs: Inputs, **kwargs: Any) -> list[Tensor]:
    """The result and the gradients of x, branch and layer_scale."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.branch, inputs.layer_scale)]
    out = implementation(leaves[0] * 1, inputs.rows, *leaves[1:], scale=-1.7, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))]


def check(results: Callable[..., list[Tensor]], kernel: Any, reference: Any, inputs: Inputs, **kwargs: Any) -> None:
    """Judges a kernel's results; the truth is taken on the CPU."""
    exact = results(reference, inputs.to(torch.float64))
    plain = results(reference, inputs)
    fused = results(kernel, inputs.to(DEVICE), **kwargs)
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert got.dtype == ref.dtype
        assert_no_worse(got.cpu(), ref, want)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None) -> None:
    inputs = Inputs(shape, dtype, vectors)
    check(gathered, gather_layer_norm, gather_layer_norm_reference, inputs)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs, inplace=True)


@pytest.mark.parametrize("shape", [(3, 2, 37, 384), (2, 1, 17, 1000), (2, 1, 2, 3000), (2, 1, 2, 4100)], ids=str)
def test_kernels_with_their_own_blocks(shape: Shape) -> None:
    inputs = Inputs(shape, torch.float32)
    check(gathered, gather_layer_norm, gather_layer_norm_reference, inputs)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs)


@pytest.mark.usefixtures("small_blocks")
@GATHER
def test_layer_norm_formula(gather: Callable[..., Tensor]) -> None:
    inputs = Inputs((5, 3, 7, 40), torch.float32)
    leaf = inputs.x.double().requires_grad_()
    kept = leaf[inputs.rows]
    mean, variance = kept.mean(-1, keepdim=True), kept.var(-1, keepdim=True, correction=0)
    want = (kept - mean) / (variance + 1e-3).sqrt() * inputs.weight + inputs.bias
    (want * inputs.grad_y).sum().backward()
    y, grad_x, *_ = (tensor.cpu() for tensor in gathered(gather, inputs.to(DEVICE)))
    assert leaf.grad is not None
    torch.testing.assert_close(y.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    dropped = [b for b in range(5) if b not in inputs.rows]
    assert not grad_x[dropped].any()


@pytest.mark.usefixtures("small_blocks")
@SCATTER
def test_scatter_formula(scatter: Callable[..., Tensor]) -> None:
    """Image by image; the gradients of what is dropped; what is dropped stays to the bit, -0 included."""
    inputs = Inputs((5, 3, 7, 40), torch.float32)
    inputs.x[inputs.x.abs() < 0.1] = -0.0
    want, grad_branch = inputs.x.double().clone(), torch.empty(3, 7, 40, dtype=torch.float64)
    grad_layer_scale = torch.zeros(40, dtype=torch.float64)
    for m, image in enumerate(inputs.rows):
        want[image] += -1.7 * inputs.layer_scale.double() * inputs.branch[m]
        grad_branch[m] = -1.7 * inputs.layer_scale.double() * inputs.grad[image]
        grad_layer_scale += (-1.7 * inputs.branch[m].double() * inputs.grad[image]).sum(0)
    out, *grads = (tensor.cpu() for tensor in scattered(scatter, inputs.to(DEVICE)))
    for got, expected in zip([out, *grads], [want, inputs.grad.double(), grad_branch, grad_layer_scale], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    dropped = [b for b in range(5) if b not in inputs.rows]
    assert torch.equal(out[dropped].view(torch.int32), inputs.x[dropped].view(torch.int32))


@pytest.mark.usefixtures("small_blocks")
@SCATTER
def test_without_layer_scale(scatter: Callable[..., Tensor]) -> None:
    inputs = Inputs((4, 2, 9, 20), torch.float32)
    ones = torch.ones(20)
    branch = inputs.branch.to(DEVICE).requires_grad_()
    x, rows, grad = (tensor.to(DEVICE) for tensor in (inputs.x, inputs.rows, inputs.grad))
    out = scatter(x, rows, branch, scale=2.0)
    (grad_branch,) = torch.autograd.grad(out, branch, grad)
    inputs.layer_scale = ones
    want = scatter_add_scaled_reference(inputs.x, inputs.rows, inputs.branch, ones, 2.0)
    torch.testing.assert_close(out.detach().cpu(), want)
    torch.testing.assert_close(grad_branch.cpu(), 2 * inputs.grad[inputs.rows])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@SCATTER
def test_mixed_dtypes(scatter: Callable[..., Tensor], x_dtype: torch.dtype) -> None:
    """A branch of another dtype than the residual stream, whose gradient comes back in its own."""
    inputs = Inputs((4, 2, 9, 20), torch.float32)
    branch = inputs.branch.to(DEVICE, torch.bfloat16).requires_grad_()
    moved = inputs.to(DEVICE)
    out = scatter(moved.x.to(x_dtype), moved.rows, branch, moved.layer_scale, 2.0)
    (grad_branch,) = torch.autograd.grad(out, branch, moved.grad.to(x_dtype))
    assert (out.dtype, grad_branch.dtype) == (x_dtype, torch.bfloat16)
    want = scatter_add_scaled_reference(inputs.x, inputs.rows, inputs.branch, inputs.layer_scale, 2.0)
    torch.testing.assert_close(out.detach().cpu().float(), want, rtol=2e-2, atol=4e-2)


@pytest.mark.usefixtures("small_blocks")
def test_strides() -> None:
    """Nothing is contiguous: tokens of a wider tensor, transposed gradients, every other feature of a vector."""
    wide = Inputs((5, 3, 9, 60), torch.float32)
    dense, strided = Inputs((5, 3, 9, 30), torch.float32), Inputs((5, 3, 9, 30), torch.float32)
    for name, tensor in vars(wide).items():
        view = tensor if name == "rows" else tensor[..., ::2]
        setattr(dense, name, view.contiguous())
        setattr(strided, name, view.mT.contiguous().mT if tensor.dim() == 3 else view)
    strided.rows = torch.stack([wide.rows, wide.rows], 1)[:, 0]
    for results, kernel in ((gathered, gather_layer_norm), (scattered, scatter_add_scaled)):
        for got, want in zip(results(kernel, strided.to(DEVICE)), results(kernel, dense.to(DEVICE)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@SCATTER
def test_in_place(scatter: Callable[..., Tensor]) -> None:
    """The same tensor comes back, carries the gradient of what was added, and autograd refuses its old values."""
    inputs = Inputs((4, 2, 9, 20), torch.float32).to(DEVICE)
    x, want = inputs.x.clone(), scatter(inputs.x, inputs.rows, inputs.branch, inputs.layer_scale, 2.0)
    out = scatter(x, inputs.rows, inputs.branch, inputs.layer_scale, 2.0, inplace=True)
    assert out is x
    assert torch.equal(x, want)
    leaf = inputs.x.clone().requires_grad_()
    x = leaf * 1
    square = (x * x).sum()
    branch = inputs.branch.clone().requires_grad_()
    scatter(x, inputs.rows, branch, None, 2.0, inplace=True)
    (grad_branch,) = torch.autograd.grad(x, branch, inputs.grad, retain_graph=True)
    torch.testing.assert_close(grad_branch, 2 * inputs.grad[inputs.rows])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.usefixtures("small_blocks")
def test_frozen_layer_scale_keeps_no_branch() -> None:
    inputs = Inputs((4, 2, 9, 20), torch.float32).to(DEVICE)
    branch = inputs.branch.requires_grad_()
    out = scatter_add_scaled(inputs.x, inputs.rows, branch, inputs.layer_scale)
    assert branch.shape not in [tensor.shape for tensor in out.grad_fn.saved_tensors if tensor is not None]
    out.sum().backward()
    assert branch.grad is not None


@pytest.mark.usefixtures("small_blocks")
def test_a_residual_block() -> None:
    """Both ends of a branch, and x's gradient from both, against the whole block in float64."""
    inputs = Inputs((6, 4, 9, 24), torch.float32)

    def block(gather: Any, scatter: Any, inputs: Inputs) -> list[Tensor]:
        leaf = inputs.x.detach().requires_grad_()
        branch = torch.tanh(gather(leaf, inputs.rows, inputs.weight, inputs.bias))
        out = scatter(leaf, inputs.rows, branch, inputs.layer_scale, 1.5)
        return [out.detach(), *torch.autograd.grad(out, leaf, inputs.grad)]

    references = gather_layer_norm_reference, scatter_add_scaled_reference
    exact, plain = block(*references, inputs.to(torch.float64)), block(*references, inputs)
    fused = block(gather_layer_norm, scatter_add_scaled, inputs.to(DEVICE))
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert_no_worse(got.cpu(), ref, want)


def test_no_image_kept() -> None:
    inputs = Inputs((3, 0, 5, 8), torch.float32).to(DEVICE)
    assert gathered(gather_layer_norm, inputs)[0].shape == (0, 5, 8)
    assert torch.equal(scattered(scatter_add_scaled, inputs)[0], inputs.x)


@pytest.mark.usefixtures("small_blocks")
def test_nan_stays_in_its_image() -> None:
    inputs = Inputs((4, 2, 9, 20), torch.float32).to(DEVICE)
    kept, dropped = int(inputs.rows[1]), next(b for b in range(4) if b not in inputs.rows)
    inputs.x[dropped] = float("nan")
    assert all(torch.isfinite(result).all() for result in gathered(gather_layer_norm, inputs))
    inputs.x[kept, 3, 2] = float("nan")
    y, grad_x, *_ = gathered(gather_layer_norm, inputs)
    assert y[1, 3].isnan().all()
    assert grad_x[kept, 3].isnan().all()
    assert y.isnan().sum() == grad_x.isnan().sum() == 20


def test_gradients_of_the_references() -> None:
    inputs = Inputs((3, 2, 2, 5), torch.float32).to(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    assert torch.autograd.gradcheck(lambda x, *vectors: gather_layer_norm(x, inputs.rows, *vectors), leaves)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, inputs.branch, inputs.layer_scale)]
    assert torch.autograd.gradcheck(lambda x, *rest: scatter_add_scaled(x, inputs.rows, *rest, 1.5), leaves)


X, ROWS, BRANCH, VECTOR = torch.zeros(4, 3, 8), torch.tensor([2, 0]), torch.zeros(2, 3, 8), torch.zeros(8)
REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], str]] = {
    "tokens": (gather_layer_norm, (X[0], ROWS, VECTOR, VECTOR), r"x \(B, N, D\), not empty; got \(3, 8\)"),
    "nothing": (gather_layer_norm, (X[:0], ROWS[:0], VECTOR, VECTOR), r"not empty; got \(0, 3, 8\)"),
    "integers": (gather_layer_norm, (X.int(), ROWS, VECTOR, VECTOR), "floating-point x"),
    "int32 rows": (gather_layer_norm, (X, ROWS.int(), VECTOR, VECTOR), "int64 indices of the 4 images"),
    "more rows than images": (gather_layer_norm, (X, torch.arange(5), VECTOR, VECTOR), r"got \(5,\)"),
    "rows elsewhere": (gather_layer_norm, (X, ROWS.to("meta"), VECTOR, VECTOR), "on meta"),
    "weight": (gather_layer_norm, (X, ROWS, VECTOR[:7], VECTOR), r"weight \(8,\) on cpu; got \(7,\)"),
    "bias": (gather_layer_norm, (X, ROWS, VECTOR, VECTOR.int()), r"bias .* torch.int32"),
    "branch": (scatter_add_scaled, (X, ROWS, X, VECTOR), r"branch \(M, N, D\) for 2 rows of x \(4, 3, 8\)"),
    "layer_scale": (scatter_add_scaled, (X, ROWS, BRANCH, VECTOR[:1]), r"layer_scale \(8,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    function, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_refusals_of_options() -> None:
    with pytest.raises(ValueError, match="eps > 0"):
        gather_layer_norm(X, ROWS, VECTOR, VECTOR, eps=0.0)
    for x in (X.clone().requires_grad_(), X.mT.contiguous().mT):
        with pytest.raises(ValueError, match="inplace=True needs a contiguous x"):
            scatter_add_scaled(x, ROWS, BRANCH, inplace=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 89, 201, 768), (512, 358, 37, 384), (24, 16, 261, 1536)], ids=str)
def test_real_sizes(shape: Shape, dtype: torch.dtype) -> None:
    inputs = Inputs(shape, dtype)
    check(gathered, gather_layer_norm, gather_layer_norm_reference, inputs)
    check(scattered, scatter_add_scaled, scatter_add_scaled_reference, inputs)
