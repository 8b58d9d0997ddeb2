"""koleo_loss: the kernels against float64 and the formula, equal rows, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.losses import koleo_loss as module
from fastdino_kernels.losses.koleo_loss import koleo_forward, koleo_loss, koleo_loss_reference
from fastdino_kernels.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UPSTREAM = -3.0  # what the loss is multiplied by before backward; neither 1 nor positive
# (B, D) or (G, B, D) in tiles of 16: whole, ragged in both, groups, the fewest rows, width 1.
SHAPES = [(48, 64), (37, 50), (2, 21, 96), (3, 2, 7), (2, 33), (5, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def reference(features: Tensor, **kwargs: Any) -> Tensor:
    """On the CPU: poisoned_memory refuses cuBLAS."""
    return koleo_loss_reference(features.cpu(), **kwargs)


BOTH = pytest.mark.parametrize("implementation", [koleo_loss, reference], ids=["kernel", "reference"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several tiles in both directions, searched in several blocks; with the options of a real launch."""
    launch_config = module.launch_config

    def config(num_rows: int, width: int) -> dict[str, dict[str, int | bool]]:
        small: dict[str, dict[str, int]] = {
            "product": {"BLOCK": 16, "BLOCK_D": 16, "num_warps": 4}, "row": {"num_warps": 2}, "search": {"BLOCK_B": 8}
        }  # fmt: skip
        return {name: {**own, **small[name]} for name, own in launch_config(num_rows, width).items()}

    monkeypatch.setattr(module, "launch_config", config)


def random_features(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of lengths from 1 / 10 to 10."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (x * 10 ** torch.linspace(-1, 1, shape[-2])[:, None]).to(DEVICE, dtype)


def loss_and_grad(implementation: Callable[..., Tensor], features: Tensor, **kwargs: Any) -> list[Tensor]:
    """The loss and the gradient of the features, on the CPU."""
    leaf = features.detach().requires_grad_()
    value = implementation(leaf, **kwargs)
    (value * UPSTREAM).backward()
    assert leaf.grad is not None
    return [value.detach().cpu(), leaf.grad.cpu()]


def check(features: Tensor, **kwargs: Any) -> None:
    """Judges loss and gradient."""
    exact = loss_and_grad(reference, features.double(), **kwargs)
    plain = loss_and_grad(reference, features, **kwargs)
    norms = features.cpu().double().norm(dim=-1, keepdim=True)
    for got, ref, want, scale in zip(
        loss_and_grad(koleo_loss, features, **kwargs), plain, exact, (1, norms), strict=True
    ):
        assert got.dtype == ref.dtype
        # The gradient of a long row is small: judged row by row, not by the shortest alone.
        assert_no_worse((got * scale).to(got.dtype), (ref * scale).to(ref.dtype), want * scale, features.dtype)


@pytest.mark.usefixtures("small_blocks")
@BOTH
def test_formula(implementation: Callable[..., Tensor]) -> None:
    """Row by row and pair by pair in float64; eps large enough to count."""
    features = random_features((2, 19, 40))
    leaf = features.double().requires_grad_()
    terms = []
    for group in leaf:
        x = [row / row.norm() for row in group]
        for i, row in enumerate(x):
            similar = [float("-inf") if j == i else (row @ other).item() for j, other in enumerate(x)]
            terms.append(-torch.log((row - x[similar.index(max(similar))]).norm() + 0.1))
    want = torch.stack(terms).mean()
    (want * UPSTREAM).backward()
    assert leaf.grad is not None
    got, grad = loss_and_grad(implementation, features, eps=0.1)
    torch.testing.assert_close(got.double(), want.detach().cpu(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), leaf.grad.cpu(), rtol=2e-5, atol=2e-6 * leaf.grad.abs().max().item())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(random_features(shape, dtype))


@pytest.mark.parametrize("shape", [(20, 384), (2, 12, 1000), (270, 40), (3, 4100)], ids=str)
def test_kernel_with_its_own_blocks(shape: tuple[int, ...]) -> None:
    check(random_features(shape))


@pytest.mark.usefixtures("small_blocks")
def test_one_neighbour_of_all() -> None:
    """Every row's nearest is row 21: its gradient gathers from all blocks of the search."""
    features = torch.zeros(40, 64)
    features[:, 0] = 1
    features += 0.9 * torch.eye(40, 64).roll(1, 1)  # further from each other than from the common direction
    features[21] = torch.eye(64)[0]
    features = features.to(DEVICE)
    neighbour = koleo_forward(features[None], 1e-8)[1][0]
    assert neighbour.tolist() == [21] * 21 + [0] + [21] * 18
    features[21] += 0.01 * torch.randn(64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(features)


@pytest.mark.usefixtures("small_blocks")
def test_strides() -> None:
    """The class tokens of (B, N, D), columns of a wider tensor, and rows that are not dense."""
    tokens = random_features((30, 4, 64))
    check(tokens[:, 1])
    check(random_features((2, 18, 70))[:, :, 3:67])
    check(random_features((64, 20)).mT)
    leaf = tokens.detach().requires_grad_()
    koleo_loss(leaf[:, 1]).backward()
    assert leaf.grad is not None
    assert not leaf.grad[:, [0, 2, 3]].any()
    assert leaf.grad[:, 1].any()


@pytest.mark.usefixtures("small_blocks")
@BOTH
def test_groups_do_not_see_each_other(implementation: Callable[..., Tensor]) -> None:
    """Equal groups, so that a row of another group would be nearer than any of its own."""
    one = random_features((20, 32))
    value, grad = loss_and_grad(implementation, one)
    of_both, grad_of_both = loss_and_grad(implementation, torch.stack([one, one]))
    torch.testing.assert_close(of_both, value)
    torch.testing.assert_close(grad_of_both, torch.stack([grad, grad]) / 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
def test_equal_rows(implementation: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A distance of 0 costs log(eps) and pulls nowhere; the other rows' gradients stay."""
    features = random_features((24, 48), dtype)
    features[[17, 20]] = features[[3]]
    value, grad = loss_and_grad(implementation, features, eps=1e-8)
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    apart = loss_and_grad(reference, features.double())
    torch.testing.assert_close(value.double(), apart[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[4].double(), apart[1][4], rtol=2e-2, atol=1e-4)
    assert not grad[[17, 20]].any()  # nobody else's neighbour: the first of equal rows is


@pytest.mark.usefixtures("small_blocks")
def test_the_first_of_equal_neighbours() -> None:
    features = random_features((40, 48))
    features[[9, 20, 33]] = features[[5]]  # in one tile, in the next, in the last
    features[2] = 1.001 * features[5] + 0.001 * features[2]
    neighbour = koleo_forward(features[None], 1e-8)[1][0]
    assert neighbour[[5, 9, 20, 33, 2]].tolist() == [9, 5, 5, 5, 5]
    everyone = koleo_forward(features[:1].expand(37, 48).contiguous()[None], 1e-8)[1][0]
    assert everyone.tolist() == [1] + [0] * 36


@pytest.mark.usefixtures("small_blocks")
@BOTH
def test_rows_of_zeros(implementation: Callable[..., Tensor]) -> None:
    """As in F.normalize: they stay zeros, at distance 1 of every unit row."""
    features = random_features((6, 10))
    features[4] = 0
    value, grad = loss_and_grad(implementation, features, eps=1e-4)
    want = loss_and_grad(reference, features.double(), eps=1e-4)
    torch.testing.assert_close(value.double(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@BOTH
def test_nan_shows(implementation: Callable[..., Tensor]) -> None:
    for rows in ([7], list(range(20))):
        features = random_features((20, 32))
        features[rows, 5] = float("nan")
        assert implementation(features).isnan()
        assert koleo_forward(features[None], 1e-8)[1].max() < 20  # no program reads past the last row


@pytest.mark.usefixtures("small_blocks")
def test_repeats_to_the_bit() -> None:
    features = random_features((2, 30, 32))
    for got, again in zip(loss_and_grad(koleo_loss, features), loss_and_grad(koleo_loss, features), strict=True):
        assert torch.equal(got, again)


@BOTH
def test_autocast_does_not_round_the_product(implementation: Callable[..., Tensor]) -> None:
    features = 1 + 0.02 * random_features((40, 32))  # nearer to each other than bf16 can tell
    want = loss_and_grad(implementation, features)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_grad(implementation, features)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_the_reference() -> None:
    features = random_features((2, 6, 5)).cpu().double().requires_grad_()
    assert torch.autograd.gradcheck(koleo_loss, (features,))
    assert koleo_loss(features).dtype == torch.float64


REFUSED: dict[str, tuple[Tensor, float, str]] = {
    "one row": (torch.zeros(3, 1, 8), 1e-8, r"needs B >= 2; got \(3, 1, 8\)"),
    "one dimension": (torch.zeros(8), 1e-8, r"features \(B, D\) or \(G, B, D\); got \(8,\)"),
    "no rows": (torch.zeros(0, 8), 1e-8, r"got \(0, 8\)"),
    "integers": (torch.zeros(4, 8, dtype=torch.int32), 1e-8, "floating-point"),
    "eps": (torch.zeros(4, 8), 0.0, "eps > 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    features, eps, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        koleo_loss(features, eps=eps)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 1024), (2, 128, 384), (2, 1000, 768), (4096, 1536)], ids=str)
def test_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features = random_features(shape, dtype)
    features[..., 1::2, :] += features[..., 0::2, :]  # pairs: of many rows, two may else be near within a rounding
    check(features)
