"""The references in chunks: equal to the formula whatever the chunk, in half its memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.counters import peak_bytes
from bench.kernels import dino_loss as dino_bench
from bench.kernels import ibot_loss as ibot_bench
from fastdino_kernels import AdamWHyper, _chunks
from fastdino_kernels.losses.dino_loss import dino_loss_reference
from fastdino_kernels.losses.ibot_loss import ibot_loss_reference
from fastdino_kernels.losses.sinkhorn import sinkhorn_reference
from fastdino_kernels.optim.adamw_ema import adamw_ema_reference_

CPU = torch.device("cpu")
TEMPS = dino_bench.TEMPS
assert TEMPS == ibot_bench.TEMPS
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# By name: the reference, the formula with autograd, and the shapes of the inputs; student and teacher come first.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "dino_loss": (dino_loss_reference, dino_bench.formula, [(10, 32, 4096), (2, 32, 4096), (4096,)]),
    "ibot_loss": (ibot_loss_reference, ibot_bench.formula, [(256, 4096), (256, 4096), (4096,), (256,)]),
}
losses = pytest.mark.parametrize("name", LOSSES)


def random_inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher, *rest = (torch.randn(shape, generator=generator) for shape in LOSSES[name][2])
    return [student.to(dtype), teacher.to(dtype), *(x.abs() for x in rest)]


def loss_and_grad(implementation: Callable[..., Tensor], student: Tensor, *args: Tensor, **kwargs: Any) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    logits = leaf.view_as(leaf)  # no leaf, like the output of a layer
    value = implementation(logits, *args, **kwargs)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


@DTYPES
@pytest.mark.parametrize("inplace_grad", [False, True])
@losses
def test_half_the_memory_of_the_formula(name: str, inplace_grad: bool, dtype: torch.dtype) -> None:
    """Forward and backward, beyond the inputs; with the gradient in place, what is left is a chunk."""
    reference, formula, _ = LOSSES[name]
    inputs = random_inputs(name, dtype)
    naive = peak_bytes(lambda: loss_and_grad(formula, *inputs), CPU)
    kwargs = {**TEMPS, "inplace_grad": inplace_grad}
    ours = peak_bytes(lambda: loss_and_grad(reference, *inputs, **kwargs), CPU)
    assert ours <= naive / 2
    if inplace_grad:
        assert ours < 2 * 4 * _chunks.CHUNK_ELEMENTS


@pytest.mark.parametrize("inplace_grad", [False, True])
@losses
def test_chunks_of_any_size(name: str, inplace_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, several, all, and a ragged last chunk; the formula's own loss and gradient in float64."""
    reference, formula, _ = LOSSES[name]
    inputs = [x.double() for x in random_inputs(name, torch.float32)]
    inputs = [inputs[0][..., :7, :50], inputs[1][..., :7, :50], inputs[2][:50], *(x[:7] for x in inputs[3:])]
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the formula upcasts
    want = loss_and_grad(formula, *inputs)
    for elements in (1, 150, 1000):
        monkeypatch.setattr(_chunks, "CHUNK_ELEMENTS", elements)
        student = inputs[0].clone()
        got = loss_and_grad(reference, student, *inputs[1:], **TEMPS, inplace_grad=inplace_grad)
        for x, expected in zip(got, want, strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-15)


def test_sinkhorn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 61, generator=torch.Generator().manual_seed(0)).double() * 3
    whole = sinkhorn_reference(logits, temp=0.07)
    for elements in (1, 100):
        monkeypatch.setattr(_chunks, "CHUNK_ELEMENTS", elements)
        for got, want in zip(sinkhorn_reference(logits, temp=0.07), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)


def test_chunks_cover_a_range_once() -> None:
    for length, width, start in [(0, 5, 0), (1, 10**9, 3), (7, 2**15, 0), (1000, 200, 2), (5, 0, 1)]:
        slices = _chunks.chunks(length, width, start)
        assert [i for c in slices for i in range(c.start, c.stop)] == list(range(start, start + length))
        assert all((c.stop - c.start) * width <= _chunks.CHUNK_ELEMENTS or c.stop == c.start + 1 for c in slices)


class Calls(TorchDispatchMode):
    """Counts aten calls, also those on tensors without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["sinkhorn", "dino_loss", "ibot_loss", "adamw_ema_"])
def test_a_gpu_has_few_launches(name: str, device: str) -> None:
    """At sizes of a real step; a CPU works in chunks there."""
    with FakeTensorMode(), Calls() as calls:
        logits = torch.empty(10, 64, 65536, dtype=torch.bfloat16, device=device)
        if name == "sinkhorn":
            sinkhorn_reference(logits[0], temp=0.07)
        elif name == "dino_loss":
            dino_loss_reference(logits, logits[:2], logits[0, 0].float(), **TEMPS)
        elif name == "ibot_loss":
            ibot_loss_reference(logits[0], logits[1], logits[0, 0].float(), logits[0, :, 0].float(), **TEMPS)
        else:
            flat, step = (torch.zeros(size, device=device) for size in ((2**24,), ()))
            adamw_ema_reference_(flat, flat, flat, flat, flat, step, AdamWHyper(1e-3, 0.04, 0.9))
    assert (calls.number < 200) == (device == "cuda"), calls.number
