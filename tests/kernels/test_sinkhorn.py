"""sinkhorn: the kernels and the reference against the published algorithm in float64, on one rank and on several."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.losses import sinkhorn as module
from fastdino_kernels.losses.sinkhorn import sinkhorn, sinkhorn_reference
from fastdino_kernels.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (R, K), in groups of 16 rows and tiles of 4 x 64, and slices of 192 columns
# in tiles of 4 x 64.
SHAPES = [(8, 16), (16, 384), (23, 301), (1, 65), (17, 1)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {
        "columns": {"ROWS": 16, "BLOCK_ROWS": 4, "BLOCK_K": 64},
        "rows": {"COLUMNS": 192, "BLOCK_ROWS": 4, "BLOCK_K": 64},
    }
    monkeypatch.setattr(module, "launch_config", lambda num_rows, num_prototypes: blocks)


def random_logits(shape: tuple[int, int], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def published(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """Q (R, K) by the algorithm as SwAV and DINOv2 print it: divide by sums, over and over."""
    Q = torch.exp(logits.double() / temp).T  # (K, R)
    K, R = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= R
    return (Q * R).T


def probabilities(logits: Tensor, temp: float, row: Tensor, column: Tensor) -> Tensor:
    return torch.exp(logits.double() / temp + row.double()[:, None] + column.double())


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", [(8, 16), (257, 1000), (3, 1)], ids=str)
def test_reference_is_the_published_algorithm(shape: tuple[int, int], iterations: int) -> None:
    logits = random_logits(shape).double()
    row, column = sinkhorn_reference(logits, temp=0.07, iterations=iterations)
    got, want = probabilities(logits, 0.07, row, column), published(logits, 0.07, iterations)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-300)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scale", [1, 20])  # 20: exponents of 1000
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    logits = random_logits(shape, dtype, scale)
    exact = sinkhorn_reference(logits.double(), temp=0.07, iterations=2)
    plain = sinkhorn_reference(logits, temp=0.07, iterations=2)
    for got, ref, want in zip(sinkhorn(logits, temp=0.07, iterations=2), plain, exact, strict=True):
        assert got.dtype == torch.float32
        assert_no_worse(got, ref, want)


@pytest.mark.usefixtures("small_blocks")
def test_kernel_is_the_published_algorithm() -> None:
    logits = random_logits((23, 301))
    got = probabilities(logits, 0.1, *sinkhorn(logits, temp=0.1))
    torch.testing.assert_close(got, published(logits, 0.1, 3), rtol=1e-4, atol=1e-12)


def test_kernel_with_its_own_blocks() -> None:
    logits = random_logits((70, 700))
    got = probabilities(logits, 0.1, *sinkhorn(logits, temp=0.1, iterations=2))
    torch.testing.assert_close(got, published(logits, 0.1, 2), rtol=1e-4, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_strides() -> None:
    x = random_logits((7, 208))
    for logits in (x[:, 3:203], x[::3], x.mT.contiguous().mT):
        got = probabilities(logits, 0.1, *sinkhorn(logits, temp=0.1))
        torch.testing.assert_close(got, published(logits, 0.1, 3), rtol=1e-4, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", [sinkhorn, sinkhorn_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("rows", [[6, 17], [10, 0, 13], [0, 23]], ids=str)
def test_ranks(rows: list[int], implementation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Ranks, each a thread, find what one rank with all their rows finds; one may have no rows."""
    logits = random_logits((23, 150))
    arrived, turn = threading.Barrier(len(rows), timeout=30), threading.Lock()
    posted: dict[int, Tensor] = {}
    calls = [0] * len(rows)
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        def all_reduce(lse: Tensor) -> Tensor:
            calls[rank] += 1
            posted[rank] = lse
            turn.release()  # only one thread may be in the interpreter
            arrived.wait()
            merged = torch.logsumexp(torch.stack([posted[r] for r in range(len(rows))]), dim=0)
            arrived.wait()
            turn.acquire()
            return merged

        with turn:
            results[rank] = implementation(torch.split(logits, rows)[rank], temp=0.07, all_reduce=all_reduce)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    row, column = sinkhorn_reference(logits.double(), temp=0.07)
    assert calls == [3] * len(rows)
    torch.testing.assert_close(torch.cat([results[r][0] for r in range(len(rows))]).double(), row, rtol=1e-5, atol=1e-5)
    for rank in range(len(rows)):
        torch.testing.assert_close(results[rank][1].double(), column, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", [sinkhorn, sinkhorn_reference], ids=["kernel", "reference"])
def test_logits_that_overflow_the_published_code(implementation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """exp(1000 / 0.04) is infinite; a common offset of all logits changes nothing."""
    logits = random_logits((9, 100), scale=0.5).bfloat16().float()
    assert not torch.isfinite(published(logits + 1024, 0.04, 3)).all()
    row, column = implementation(logits + 1024, temp=0.04)
    kept = logits + 1024 - 1024  # what of them fp32 still holds
    torch.testing.assert_close(
        probabilities(logits + 1024, 0.04, row, column), published(kept, 0.04, 3), rtol=0.02, atol=1e-9
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", [sinkhorn, sinkhorn_reference], ids=["kernel", "reference"])
def test_equal_logits_are_uniform(implementation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    logits = torch.full((9, 100), 3.0, device=DEVICE)
    got = probabilities(logits, 0.04, *implementation(logits, temp=0.04))
    torch.testing.assert_close(got, torch.full_like(got, 0.01), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", [sinkhorn, sinkhorn_reference], ids=["kernel", "reference"])
def test_what_is_not_finite_shows(implementation: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for value in (float("nan"), float("inf")):
        logits = random_logits((9, 100))
        logits[6, 70] = value
        row, column = implementation(logits, temp=0.07)
        assert not torch.isfinite(row).any()
        assert not torch.isfinite(column).any()


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_probability_zero() -> None:
    """A logit of -inf is probability 0, also where a whole group of rows or slice of columns holds nothing else."""
    logits = random_logits((20, 256))
    logits[:16, :64], logits[3, :192] = float("-inf"), float("-inf")
    got = probabilities(logits, 0.1, *sinkhorn(logits, temp=0.1))
    torch.testing.assert_close(got, published(logits, 0.1, 3), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "kwargs", "message"),
    [
        (torch.zeros(2, 3, 4), {"temp": 0.1}, r"logits \(R, K\); got \(2, 3, 4\)"),
        (torch.zeros(2, 0), {"temp": 0.1}, r"got \(2, 0\)"),
        (torch.zeros(2, 3, dtype=torch.int32), {"temp": 0.1}, "torch.int32"),
        (torch.zeros(2, 3), {"temp": 0.0}, "temp=0.0"),
        (torch.zeros(2, 3), {"temp": 0.1, "iterations": 0}, "iterations=0"),
    ],
)
def test_refusals(logits: Tensor, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn(logits, **kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize("shape", [(3763, 65536), (128, 65537), (20000, 1024)], ids=str)
def test_real_sizes(shape: tuple[int, int]) -> None:
    logits = random_logits(shape, torch.bfloat16)
    exact = sinkhorn_reference(logits.double(), temp=0.07)
    plain = sinkhorn_reference(logits, temp=0.07)
    for got, ref, want in zip(sinkhorn(logits, temp=0.07), plain, exact, strict=True):
        assert_no_worse(got, ref, want)
