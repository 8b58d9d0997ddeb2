"""Every operator fits its schema, and what is built of operators holds under torch.compile and in a CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastdino_kernels import (
    AdamWHyper,
    _backend,
    adamw_ema_,
    center_mean,
    dino_loss,
    ema_update_,
    gather_layer_norm,
    ibot_loss,
    koleo_loss,
    linear_ibot_loss,
    make_segments,
    prototype_weight,
    scatter_add_scaled,
    segment_squares,
    sinkhorn,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPS: dict[str, float] = {"student_temp": 0.1, "teacher_temp": 0.04}
N, LENGTHS = 5000, (3000, 0, 2000)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape))).to(dtype)


def run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """The results, and the gradients for the arguments that take one."""
    results = function(*args)
    results = [results] if isinstance(results, Tensor) else list(results)
    leaves = [x for x in args if x.requires_grad]
    if not leaves:
        return results
    return [results[0].detach().clone(), *torch.autograd.grad(results[0].sin().sum(), leaves)]


def dino(student: Tensor, *args: Tensor, inplace_grad: bool = False) -> Tensor:
    return dino_loss(student * 2, *args, **TEMPS, inplace_grad=inplace_grad)


def ibot(student: Tensor, *args: Tensor, inplace_grad: bool = False) -> Tensor:
    return ibot_loss(student * 2, *args, **TEMPS, inplace_grad=inplace_grad)


def residual(x: Tensor, *args: Tensor, inplace: bool = False) -> Tensor:
    return scatter_add_scaled(x * 2, *args, 1.5, inplace=inplace)


def ema(teacher: Tensor, student: Tensor, momentum: Tensor) -> list[Tensor]:
    teacher, teacher_lp = teacher.clone(), torch.empty_like(teacher, dtype=torch.bfloat16)
    ema_update_(teacher, student, momentum, teacher_lp)
    return [teacher, teacher_lp]


def ema_of_lists(teacher: Tensor, student: Tensor) -> list[Tensor]:
    teachers = [teacher.clone(), teacher[:7] + 1]
    ema_update_(teachers, [student, student[:7]], 0.9)
    return teachers


def adamw(param: Tensor, grad: Tensor) -> list[Tensor]:
    state = [param.clone(), param * 0.1, param * param, param + 1]
    param_lp = torch.empty_like(param, dtype=torch.bfloat16)
    step = torch.ones((), device=param.device)
    adamw_ema_(state[0], grad, *state[1:], step, AdamWHyper(1e-3, 0.04, 0.9), param_lp=param_lp)
    return [*state, param_lp]


def clipped(param: Tensor, grad: Tensor) -> list[Tensor]:
    segments = make_segments(LENGTHS, param.device)
    state = [param.clone(), param * 0.1, param * param, param + 1]
    scale = 1 / (1 + segment_squares(grad, segments))
    flag, step = torch.zeros((), device=param.device), torch.ones((), device=param.device)
    hyper = AdamWHyper(1e-3, 0.04, 0.9)
    adamw_ema_(state[0], grad, *state[1:], step, hyper, grad_scale=scale, segments=segments, found_inf=flag)
    return state


LOGITS = random(4, 3, 100).requires_grad_(), random(2, 3, 100), random(100)
PATCHES = random(5, 100).requires_grad_(), random(5, 100), random(100), random(5).exp()
FEATURES = (
    random(5, 8).requires_grad_(),
    random(70, 8).requires_grad_(),
    random(5, 8),
    random(70, 8),
    random(70),
    random(5).exp(),
)
BRANCH = random(4, 5, 8).requires_grad_(), torch.tensor([2, 0], device=DEVICE)  # tokens, images that are kept
SUM = (*BRANCH, random(2, 5, 8).requires_grad_(), random(8).requires_grad_())
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "dino_loss": (dino, LOGITS),
    "dino_loss in place": (partial(dino, inplace_grad=True), LOGITS),
    "dino_loss in fp64, in place": (
        partial(dino, inplace_grad=True),
        tuple(x.detach().double().requires_grad_(x.requires_grad) for x in LOGITS),
    ),
    "ibot_loss": (ibot, PATCHES),
    "ibot_loss in place": (partial(ibot, inplace_grad=True), PATCHES),
    "center_mean": (center_mean, (random(2, 3, 100),)),
    "sinkhorn": (partial(sinkhorn, temp=0.1), (random(5, 100),)),
    "linear_ibot_loss": (partial(linear_ibot_loss, **TEMPS), FEATURES),
    "prototype_weight": (prototype_weight, (random(9, 32).requires_grad_(), random(9, 1))),
    "koleo_loss": (koleo_loss, (random(2, 5, 8).requires_grad_(),)),
    "gather_layer_norm": (gather_layer_norm, (*BRANCH, random(8).requires_grad_(), random(8).requires_grad_())),
    "scatter_add_scaled": (residual, SUM),
    "scatter_add_scaled in place": (partial(residual, inplace=True), SUM),
    "ema_update_": (ema, (random(N), random(N, dtype=torch.bfloat16), random(1)[0].sigmoid())),
    "ema_update_ of lists": (ema_of_lists, (random(N), random(N, dtype=torch.bfloat16))),
    "adamw_ema_": (adamw, (random(N), random(N))),
    "adamw_ema_ with segments": (clipped, (random(N), random(N))),
}
cases = pytest.mark.parametrize("case", CALLS)
# They copy a table to the device once, which nothing can capture.
WITH_TABLES = {"adamw_ema_ with segments", "ema_update_ of lists"}


class Seen(TorchDispatchMode):
    """Notes the arguments of every operator of ours that is called, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastdino":
            self.calls[name] = (func, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_every_operator_fits_its_schema() -> None:
    """Writes what it says and nothing else, has no hidden alias, and knows its shapes without data."""
    with Seen() as seen:
        for call, args in CALLS.values():
            run(call, args)
    assert set(seen.calls) == set(_backend.LAUNCHERS)
    for func, args in seen.calls.values():
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
    tree_map(lambda x: x.zero_(), got)
    graph.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
