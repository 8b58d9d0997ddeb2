"""Captured steps and streams: an eager step's numbers, nothing that a graph cannot hold, and eager as the way out."""

import dataclasses
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.counters import kernels_counted
from bench.workload import random_batch
from fastdino import distributed
from fastdino.config import Config, ConfigError, OptimConfig
from fastdino.distributed import Ranks
from fastdino.engine.graphs import SideStream, StepGraphs, captures
from fastdino.engine.schedules import Now
from fastdino.training.trainer import Trainer
from fastdino_kernels import dino_loss
from tests.engine.test_graphs import CPU, V1, V2, trained, with_engine


def test_the_teacher_works_beside_the_student_until_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Beside(SideStream):
        @contextmanager
        def __call__(self) -> Iterator[None]:
            order.append("begin")
            yield
            order.append("end")

        def join(self) -> None:
            order.append("join")

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        order.append("loss")
        return dino_loss(*args, **kwargs)

    monkeypatch.setattr("fastdino.engine.graphs.SideStream", Beside)
    monkeypatch.setattr("fastdino.method.dino.dino_loss", loss)
    with distributed.init("cpu") as ranks:
        trainer = Trainer(with_engine(V1, teacher_stream=True, device="auto"), ranks)
        for name in ("teacher", "student"):
            getattr(trainer.method, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
        trainer.train_step([random_batch(V1, CPU, 0)])
    assert order == ["begin", "teacher", "end", "student", "join", "loss"]


def test_what_is_kept_from_a_first_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student on the main stream finds tables that a teacher beside it has made for the same shapes."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if name == "main" else "side"

        def wait_stream(self, other: "Stream") -> None:
            order.append(f"{self.name} waits for {other.name}")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    beside = SideStream(torch.device("cuda"))
    for name in ("first", "second"):
        with beside():
            order.append(name)
    beside.join()
    there, back = "side waits for main", "main waits for side"
    assert order == [there, "first", back, there, "second", back]


class Replay:
    """A graph in Python: the step as it was captured, on the data of now."""

    def __init__(self, steps: StepGraphs, now: Now, logs: bool) -> None:
        self.take, self.figures = lambda: steps._step(steps._batches, now, logs), dict[str, Tensor]()

    def replay(self) -> None:
        self.figures.update(self.take())


def test_replayed_steps_equal_steps_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the prototypes are frozen and after, with figures for the log exactly where they are due."""

    def capture(self: StepGraphs, now: Now, logs: bool) -> tuple[Replay, dict[str, Tensor]]:
        graph = Replay(self, now, logs)
        return graph, graph.figures

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    config = dataclasses.replace(
        V1,
        optim=dataclasses.replace(V1.optim, freeze_last_layer=0.5),
        run=dataclasses.replace(V1.run, log_every=4),
    )
    want, _, _ = trained(config, None, steps=12)
    with distributed.init("cpu") as ranks:
        trainer = Trainer(with_engine(config, compile="off"), ranks)
        graphs = trainer._take = StepGraphs(trainer._update, trainer._abandon, CPU)
        figures = [dict(trainer.train_step([random_batch(config, CPU, seed)])) for seed in range(12)]
    assert [float(each["loss"]) for each in figures] == want
    assert [step for step, each in enumerate(figures, 1) if "loss_dino" in each] == [4, 8, 12]
    assert graphs._graphs.keys() == {(True, False), (False, False)}


@pytest.mark.parametrize(
    ("config", "device", "reason"),
    [
        (V1, CPU, "they need a GPU"),
        (dataclasses.replace(V1, optim=OptimConfig(name="lars")), torch.device("cuda"), "optim.name=lars"),
        (with_engine(V1, name="deepspeed", zero_stage=1), torch.device("cuda"), "ZeRO 1 decides on the host"),
    ],
)
def test_where_a_step_cannot_be_captured(config: Config, device: torch.device, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.cuda_graphs=on: .*{reason}"):
        captures(with_engine(config, cuda_graphs="on"), Ranks(0, 1, 0, device))
    assert not captures(config, Ranks(0, 1, 0, device))
    gpu = torch.device("cuda")
    assert captures(with_engine(V1, cuda_graphs="on"), Ranks(0, 2, 0, gpu))
    assert [captures(V1, Ranks(0, world_size, 0, gpu)) for world_size in (1, 2)] == [True, False]
    assert not captures(with_engine(V1, cuda_graphs="off"), Ranks(0, 1, 0, gpu))
    with (
        pytest.raises(ConfigError, match=r"engine.cuda_graphs=on: they need a GPU"),
        distributed.init("cpu") as ranks,
    ):
        Trainer(with_engine(V1, cuda_graphs="on"), ranks)


class Recorder(TorchDispatchMode):
    """The operations, and which memory each is given: an address, or the number of a tensor that was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int | str, ...]]] = []
        self.made: dict[int, str] = {}
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.found.append((func._schema.name, tuple(self.made.get(address, address) for address in given)))
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (address := x.untyped_storage().data_ptr()) not in (0, *given, *self.made):
                self.made[address] = f"tensor {len(self.made)}"
                self.kept.append(x)
        return result


@pytest.mark.parametrize("engine", [("torch", "auto"), ("deepspeed", 0)], ids=str)
@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
def test_a_step_can_be_captured(config: Config, engine: tuple[str, Any]) -> None:
    """As on a GPU: the same operations on the same memory at every step, none of which the host waits for."""
    config = with_engine(config, name=engine[0], zero_stage=engine[1], precision="bf16")
    with distributed.init("cpu") as ranks, kernels_counted():
        trainer = Trainer(with_engine(config, compile="off"), ranks)
        step = StepGraphs(trainer._update, trainer._abandon, CPU)
        steps = []
        for seed in range(5):
            step._seen.clear()
            with Recorder() as recorder:
                step([random_batch(config, CPU, seed)], trainer.schedules(seed), logs=False)
            steps.append(recorder.found)
        trainer.engine.wait_teacher()
    start = next(i for i, (name, _) in enumerate(steps[3]) if name == "aten::fill_") + len(Now.NUMBERS)
    names = {name for name, _ in steps[4][start:]}
    assert not names & {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::is_nonzero", "aten::nonzero"}
    assert "fastdino::adamw_ema_flat_" in names
    assert steps[3][start:] == steps[4][start:]


@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("halfway", [False, True])
def test_a_step_that_cannot_be_captured_is_taken_without(
    config: Config, halfway: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU captures nothing: two steps by the schedules' tensors, then those that warn and are as ever.

    Also when a capture has come halfway, and left losses, gradients summed and not, and a generator that has moved.
    """

    def capture(self: StepGraphs, now: Now, logs: bool) -> None:
        loss, _ = trainer.method.loss(trainer._normalized(self._batches[0]), now)
        trainer.engine.backward(loss)
        trainer.method.loss(trainer._normalized(self._batches[0]), now)[0].backward()
        raise RuntimeError("operation not permitted when stream is capturing")

    if halfway:
        monkeypatch.setattr(StepGraphs, "_capture", capture)
    want, _, _ = trained(config, None, steps=5)
    with distributed.init("cpu") as ranks, caplog.at_level(logging.WARNING, "fastdino.engine"):
        trainer = Trainer(with_engine(config, compile="off"), ranks)
        trainer._take = StepGraphs(trainer._update, trainer._abandon, CPU)
        losses = [float(trainer.train_step([random_batch(config, CPU, seed)])["loss"]) for seed in range(5)]
    assert losses == want
    (record,) = [record for record in caplog.records if record.name.startswith("fastdino.engine")]
    assert "engine.cuda_graphs: a step cannot be captured" in record.getMessage()


def test_memory_that_is_short_for_a_graph_alone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the capture had made is free before the step is taken without."""
    kept: list[weakref.ref[Tensor]] = []

    def short(*args: Any) -> None:
        activations = torch.ones(3)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def step(*args: Any) -> dict[str, Tensor]:
        assert not [ref for ref in kept if ref() is not None]
        return {}

    monkeypatch.setattr(StepGraphs, "_capture", short)
    steps = StepGraphs(step, lambda: None, CPU)
    taken = ([random_batch(V1, CPU, 0)], Now(1e-3, 0.04, 0.996, 0.04, freeze_last_layer=False), False)
    for _ in range(StepGraphs.EAGER):
        assert steps(*taken) == {}
    assert steps(*taken) == {}
    assert steps.failed
    assert kept
