"""Offsets past 32 bits: on a CPU in memory that is mostly never touched and takes no room."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from fastdino_kernels import (
    AdamWHyper,
    adamw_ema_,
    dino_loss,
    ema_update_,
    gather_layer_norm,
    ibot_loss,
    koleo_loss,
    packed_attention,
    prototype_weight,
    scatter_add_scaled,
    sinkhorn,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU holds it all; on a CPU the longest tensor has to look affordable, 8.6 GB.
NEEDED = 60e9 if DEVICE == "cuda" else 12e9
K = 40
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
VIEWS = [(4, 3, K), (2, 3, K)]
PATCHES = [(4, K), (4, K)]
pytestmark = pytest.mark.large


@pytest.fixture(autouse=True)
def _room() -> None:
    """Not at import, where a GPU would keep a context for every worker that collects the tests."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else pages) < NEEDED:
        pytest.skip(f"asks for {NEEDED / 1e9:.0f} GB")


def numbers(count: int) -> Tensor:
    return torch.linspace(0.1, 1, count, device=DEVICE)


def far_apart(shape: tuple[int, ...], dim: int) -> Tensor:
    """Random bf16 numbers, 2^30 elements from one to the next along ``dim``, and close together otherwise."""
    moved = torch.randn([shape[dim], *shape[:dim], *shape[dim + 1 :]]).bfloat16()
    memory = torch.empty(2**30 * (len(moved) - 1) + moved[0].numel(), dtype=torch.bfloat16, device=DEVICE)
    view = memory.as_strided(moved.shape, (2**30, *moved.stride()[1:])).copy_(moved)
    return view.movedim(0, dim)


def dino(student: Tensor, teacher: Tensor) -> Tensor:
    return dino_loss(student.view_as(student), teacher, numbers(K), **TEMPS, inplace_grad=True)


def ibot(student: Tensor, teacher: Tensor) -> Tensor:
    return ibot_loss(student.view_as(student), teacher, numbers(K), numbers(4), **TEMPS, inplace_grad=True)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return packed_attention(q, k, v, queries=((1, 4),), keys=((1, 4),)).float().square().sum()


@pytest.mark.parametrize(
    ("implementation", "shapes", "dim"),
    [
        (attended, [(4, 3, 16)] * 3, 0),
        (attended, [(4, 3, 16)] * 3, 1),
        (dino, VIEWS, 0),
        (dino, VIEWS, 1),
        (ibot, PATCHES, 0),
        (koleo_loss, [(3, 4, K)], 0),
        (koleo_loss, [(4, K)], 0),
    ],
)
def test_losses(implementation: Callable[..., Tensor], shapes: list[tuple[int, ...]], dim: int) -> None:
    far = [far_apart(shape, dim) for shape in shapes]
    results = []
    for student, *teacher in (far, [x.clone(memory_format=torch.contiguous_format) for x in far]):
        value = implementation(student.requires_grad_(), *teacher)
        results.append([value.detach(), *torch.autograd.grad(2 * value, student)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_teachers() -> None:
    far = far_apart((4, K), 0)
    results = [sinkhorn(x, temp=0.1) for x in (far, far.contiguous())]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.fixture
def last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large grid the interpreter runs the last two programs."""

    def last(*bounds: int) -> range:
        return range(bounds[0] - 2, bounds[0]) if len(bounds) == 1 and bounds[0] > 10_000 else range(*bounds)

    monkeypatch.setattr(interpreter, "range", last, raising=False)


def ending(shape: tuple[int, ...], end: Tensor) -> Tensor:
    """A tensor that ends with these numbers, and whose others are what the memory holds."""
    tensor = torch.empty(shape, dtype=end.dtype, device=DEVICE)
    tensor[len(tensor) - len(end) :] = end
    return tensor


@pytest.mark.usefixtures("last_programs")
def test_flat_tensors() -> None:
    n, hyper, step = 2**31 + 5000, AdamWHyper(1e-3, 0.04, 0.9), torch.ones((), device=DEVICE)
    small = [torch.rand(100, device=DEVICE) for _ in range(5)]
    large = [ending((n,), x) for x in small]
    for teacher, student, *others in (small, large):
        ema_update_(teacher, student, 0.5)
        adamw_ema_(student, *others, teacher, step, hyper)
    for x, y in zip(small, large, strict=True):
        assert torch.equal(x, y[-100:])


@pytest.mark.usefixtures("last_programs")
def test_tokens_of_sequences() -> None:
    """The last of B sequences, all of them kept, after another group."""
    B, N, D = 2**15 + 4, 64, 1024
    vector = torch.rand(D, device=DEVICE)
    end = torch.randn(N, D, device=DEVICE).bfloat16()
    results = []
    for x, lengths in ((end, [(1, N)]), (ending((B * N, D), end), [(1, 2 * N), (B - 2, N)])):
        rows = [torch.arange(n, device=DEVICE) for n, _ in lengths]
        leaf = x.detach().requires_grad_()
        gathered = gather_layer_norm(leaf, lengths, rows, vector, vector)
        for y in (gathered, scatter_add_scaled(x, lengths, rows, leaf, vector)):
            (grad,) = torch.autograd.grad(y, leaf, x)
            results += [y[-N:].detach(), grad[-N:]]
    torch.testing.assert_close(results[:4], results[4:], rtol=0, atol=0)


@pytest.mark.usefixtures("last_programs")
def test_many_prototypes() -> None:
    ends = torch.randn(5, 256, device=DEVICE), torch.rand(5, 1, device=DEVICE)
    results = []
    for v, g in (ends, [ending((2**23 + 5, *x.shape[1:]), x) for x in ends]):
        v, g = v.requires_grad_(), g.requires_grad_()
        w = prototype_weight(v, g)
        results.append([x[-5:].detach() for x in (w, *torch.autograd.grad(w, (v, g), v.detach()))])
    torch.testing.assert_close(*results, rtol=0, atol=0)
