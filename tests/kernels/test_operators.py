"""Every operator fits its schema, and what is built of operators holds under torch.compile and in a CUDA graph."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels import (
    Rates,
    _backend,
    adamw_ema_,
    center_mean,
    dino_loss,
    ema_update_,
    ibot_loss,
    make_segments,
    prototype_loss,
    prototype_weight,
    segment_squares,
    sinkhorn,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPS: dict[str, float] = {"student_temp": 0.1, "teacher_temp": 0.04}
N, LENGTHS = 5000, (3000, 0, 2000)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape))).to(dtype)


def run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """The results, and the gradient for the first argument if it takes one."""
    results = function(*args)
    results = [results] if isinstance(results, Tensor) else list(results)
    if not args[0].requires_grad:
        return results
    return [results[0].detach(), *torch.autograd.grad(results[0].sum(), args[0])]


def dino(student: Tensor, *args: Tensor, inplace_grad: bool = False) -> Tensor:
    return dino_loss(student * 2, *args, **TEMPS, inplace_grad=inplace_grad)


def ibot(student: Tensor, *args: Tensor, inplace_grad: bool = False) -> Tensor:
    return ibot_loss(student * 2, *args, **TEMPS, inplace_grad=inplace_grad)


def ema(teacher: Tensor, student: Tensor) -> list[Tensor]:
    teachers, shadow = [teacher.clone(), teacher[:7] + 1], torch.empty_like(teacher, dtype=torch.bfloat16)
    ema_update_(teachers, [student, student[:7]], 0.9)
    ema_update_(teachers[0], student, teacher.new_tensor(0.9), shadow)
    return [*teachers, shadow]


def adamw(param: Tensor, grad: Tensor) -> list[Tensor]:
    state = [param.clone(), param * 0.1, param * param, param + 1]
    shadow = torch.empty_like(param, dtype=torch.bfloat16)
    step = torch.ones((), device=param.device)
    adamw_ema_(state[0], grad, *state[1:], step, Rates(1e-3, 0.04, 0.9), param_shadow=shadow)
    return [*state, shadow]


def clipped(param: Tensor, grad: Tensor) -> list[Tensor]:
    segments = make_segments(LENGTHS, param.device)
    state = [param.clone(), param * 0.1, param * param, param + 1]
    scale = 1 / (1 + segment_squares(grad, segments))
    flag, step = torch.zeros((), device=param.device), torch.ones((), device=param.device)
    rates = Rates(1e-3, 0.04, 0.9)
    adamw_ema_(state[0], grad, *state[1:], step, rates, grad_scale=scale, segments=segments, found_inf=flag)
    return state


LOGITS = random(4, 3, 100).requires_grad_(), random(2, 3, 100), random(100)
PATCHES = random(5, 100).requires_grad_(), random(5, 100), random(100), random(5).exp()
FEATURES = random(5, 8).requires_grad_(), random(70, 8), random(5, 8), random(70, 8), random(70), random(5).exp()
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "dino_loss": (dino, LOGITS),
    "dino_loss in place": (partial(dino, inplace_grad=True), LOGITS),
    "ibot_loss": (ibot, PATCHES),
    "ibot_loss in place": (partial(ibot, inplace_grad=True), PATCHES),
    "center_mean": (center_mean, (random(2, 3, 100),)),
    "sinkhorn": (partial(sinkhorn, temp=0.1), (random(5, 100),)),
    "prototype_loss": (partial(prototype_loss, **TEMPS), FEATURES),
    "prototype_weight": (prototype_weight, (random(9, 32).requires_grad_(), random(9, 1))),
    "ema_update_": (ema, (random(N), random(N, dtype=torch.bfloat16))),
    "adamw_ema_": (adamw, (random(N), random(N))),
    "adamw_ema_ with segments": (clipped, (random(N), random(N))),
}
cases = pytest.mark.parametrize("case", CALLS)
WITH_TABLES = {"adamw_ema_ with segments"}  # they copy a table to the device once, which nothing can capture


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The arguments of every operator that is called, by its name."""
    calls: dict[str, Any] = {}

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            namespace, name = func._schema.name.split("::")
            if namespace == "fastdino":
                copies = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
                calls[name] = (func, copies)
            return func(*args, **(kwargs or {}))

    with Seen():
        yield calls


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_every_operator_fits_its_schema(seen: dict[str, Any]) -> None:
    """Writes what it says and nothing else, has no hidden alias, and knows its shapes without data."""
    for call, args in CALLS.values():
        run(call, args)
    found = dict(seen)
    assert set(found) == set(_backend.LAUNCHERS)
    for func, args in found.values():
        torch.library.opcheck(func, args)


@cases
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernel", "reference"])
def test_compiles_whole(case: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and not interpreted:
        pytest.skip("a GPU always runs the kernels")
    monkeypatch.setattr(_backend, "INTERPRETED", interpreted)
    call, args = CALLS[case]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, args), run(call, args), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CALLS if case not in WITH_TABLES])
def test_runs_in_a_cuda_graph(case: str) -> None:
    call, args = CALLS[case]
    expected = run(call, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(call, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = run(call, args)
    torch.utils._pytree.tree_map(lambda x: x.zero_(), got)
    graph.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
