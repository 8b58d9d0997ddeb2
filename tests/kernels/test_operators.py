"""Every operator fits its schema, and what is built of operators holds under torch.compile and in a CUDA graph."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastdino_kernels import _backend
from tests.kernels import calls
from tests.kernels.calls import captured, make_calls, run

NAMES = [*make_calls("cpu"), "dino_loss in fp64, in place"]
cases = pytest.mark.parametrize("case", NAMES)


def call_of(case: str) -> calls.Call:
    return make_calls(dtype=torch.float64 if "fp64" in case else torch.float32)[case.replace(" in fp64,", "")]


# They copy a table to the device once, which nothing can capture.
WITH_TABLES = ("adamw_ema_ with segments", "adamw_ema_ with rates", "ema_update_ of lists")


class Seen(TorchDispatchMode):
    """Notes the arguments of every operator of ours that is called, by its name and which of them are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, tuple[type, ...]], tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastdino":
            self.calls[name, tuple(map(type, args))] = (
                func,
                tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args),
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_every_operator_fits_its_schema() -> None:
    """Writes what it says and nothing else, has no hidden alias, and knows its shapes without data."""
    with Seen() as seen:
        for call, args in make_calls().values():
            run(call, args)
    assert {name for name, _ in seen.calls} == set(_backend.LAUNCHERS)
    for func, args in seen.calls.values():
        torch.library.opcheck(func, args)


@cases
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernel", "reference"])
def test_compiles_whole(case: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and not interpreted:
        pytest.skip("a GPU always runs the kernels")
    monkeypatch.setattr(_backend, "INTERPRETED", interpreted)
    call, args = call_of(case)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, args), run(call, args), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in NAMES if not case.startswith(WITH_TABLES)])
def test_runs_in_a_cuda_graph(case: str) -> None:
    call, args = call_of(case)
    expected = run(call, args)
    graph, got = captured(call, args)
    tree_map(lambda x: x.zero_(), got)
    graph.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_a_sanitizer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call at sizes that fit no block; here the interpreter checks the addresses."""
    monkeypatch.setattr(calls, "SIZES", [(300, 6)])
    assert calls.main() == 0
