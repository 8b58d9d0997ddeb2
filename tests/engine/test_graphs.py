"""Compiled regions: an eager step's numbers, no graph too many, and eager as the way out."""

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import fastdino
from bench.counters import LiveBytes
from bench.workload import nano_config, nano_dinov2, random_batch
from fastdino import distributed
from fastdino.config import Config, ConfigError, RunConfig
from fastdino.engine.graphs import CACHES, compile_regions, compiles, keep_compiled_in
from fastdino.model import vit
from fastdino.model.block import Mlp, Shape
from fastdino.model.head import Head
from fastdino.training.trainer import Trainer
from tests.training.test_online_knn import images

CPU = torch.device("cpu")
STEPS = 3
# Drop path of either kind, views of two sizes, masks, two heads.
V1 = nano_config(engine="torch")
V2 = nano_dinov2(nano_config(engine="torch", local_batch=8), sinkhorn=True)
# From a LayerScale of 1e-5 all images look alike, and KoLeo magnifies every rounding.
V2 = dataclasses.replace(V2, model=dataclasses.replace(V2.model, layer_scale=0.5))


def with_engine(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, **changes))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(config: Config, backend: str | None, steps: int = STEPS) -> tuple[list[float], list[Tensor], Trainer]:
    """Losses, the gradients of the first step, and the trainer; with its regions compiled by ``backend`` if any."""
    with distributed.init("cpu") as ranks:
        trainer = Trainer(with_engine(config, compile="off"), ranks)
        if backend:
            student, teacher = trainer.engine.student_network, trainer.engine.teacher
            compile_regions([*student.regions(), *teacher.regions()], backend)
        gradients: list[Tensor] = []
        prepare = trainer.engine.optimizer.prepare

        def noting(now: Any, grads: list[Tensor], loss: Tensor) -> Tensor:
            gradients.extend(grad.clone() for grad in grads if len(gradients) < len(grads))
            return prepare(now, grads, loss)

        trainer.engine.optimizer.prepare = noting  # type: ignore[method-assign]
        losses = [float(trainer.train_step([random_batch(config, CPU, seed)])["loss"]) for seed in range(steps)]
        trainer.engine.wait_teacher()
        return losses, gradients, trainer


def check_equal(config: Config, backend: str) -> None:
    eager, eager_gradients, _ = trained(config, None)
    compiled, gradients, _ = trained(config, backend)
    assert compiled == pytest.approx(eager, rel=1e-6)
    for got, want in zip(gradients, eager_gradients, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_a_traced_step_equals_an_eager_one() -> None:
    """DINO v1's: drop path by chance in every block. What a compiler does of it, the next test has."""
    check_equal(V1, "aot_eager")
    assert counters["stats"]["unique_graphs"] == 8


@torch._inductor.config.patch("cpp.simdlen", 1)  # g++ takes half the time for a kernel
def test_a_compiled_step_equals_an_eager_one_on_every_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2's: subsets, masks, two heads, registers, LayerScale. The graphs are those of the first engine.

    A run that is resumed finds them all in run.cache.
    """
    for name in CACHES:
        monkeypatch.setenv(name, default_cache_dir())
    keep_compiled_in(tmp_path)
    for name, stage in (("torch", "auto"), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)):
        check_equal(with_engine(V2, name=name, zero_stage=stage), "inductor")
    assert counters["stats"]["unique_graphs"] == 10
    assert counters["aot_autograd"]["autograd_cache_miss"] == 10
    torch._dynamo.reset()
    counters.clear()
    trained(V2, "inductor", steps=1)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 10
    assert counters["aot_autograd"]["autograd_cache_miss"] == 0


@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
def test_equal_blocks_are_one_graph_and_no_step_compiles_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and teacher have a graph each for embedding, blocks, last block and head, whatever the depth."""
    found = {}
    for depth in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setitem(vit.SIZES, "nano", Shape(96, depth, 4, 384))
        trained(config, "eager", steps=1)
        first = counters["stats"]["unique_graphs"]
        trained(config, "eager", steps=12)  # logging steps among them
        assert counters["stats"]["unique_graphs"] == first
        found[depth] = first
    assert found[3] == found[6] == (8 if config is V1 else 10)


def test_an_evaluation_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images have shapes of their own, and the last of them another."""
    monkeypatch.setattr("fastdino.engine.graphs.compile_regions", lambda regions: compile_regions(regions, "eager"))
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        images(tmp_path / "knn" / split / name, 5)
    run = RunConfig(
        dir=tmp_path / "run", cache=tmp_path / "cache", epochs=1, local_batch=4, knn_every=1,
        knn_root=str(tmp_path / "knn"),
    )  # fmt: skip
    data = dataclasses.replace(V1.data, num_images=12)
    result = fastdino.train(dataclasses.replace(with_engine(V1, compile="on"), data=data, run=run))
    assert result.knn is not None
    assert counters["stats"]["unique_graphs"] == 8


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
def test_checkpointing_changes_no_bit(config: Config, checkpointing: Any) -> None:
    """Eagerly; compiled it is the same graph's numbers, and as many graphs."""
    eager, want, _ = trained(config, None)
    made = with_engine(config, checkpointing=checkpointing)
    losses, gradients, _ = trained(made, None)
    assert losses == eager
    assert all(torch.equal(a, b) for a, b in zip(gradients, want, strict=True))
    losses, gradients, _ = trained(made, "aot_eager")
    assert losses == pytest.approx(eager, rel=1e-6)
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(gradients, want, strict=True))
    assert counters["stats"]["unique_graphs"] == (8 if config is V1 else 10)


def test_checkpointing_keeps_less() -> None:
    """Activations of all blocks but the last, which computes little: a third is gone, then most."""
    peaks = {}
    for checkpointing in ("none", "selective", "full"):
        _, _, trainer = trained(with_engine(V1, checkpointing=checkpointing), None, steps=1)
        trainer.engine.ranks.world_size = 1
        views = random_batch(V1, CPU, 0).views
        with LiveBytes() as live:
            out = trainer.engine.student_network({name: x.float() for name, x in views.items()})
            peaks[checkpointing] = live.live
        del out
    assert peaks["selective"] < 0.65 * peaks["none"]
    assert peaks["full"] < 0.6 * peaks["selective"]


def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eager, _, _ = trained(V1, None)
    forward = Mlp.forward

    def breaking(self: Mlp, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", breaking)
    with caplog.at_level(logging.WARNING, "fastdino"):
        losses, _, _ = trained(V1, "eager")
    assert losses == eager
    (record,) = caplog.records
    assert "engine.compile: Block.forward cannot be compiled, so every step runs eagerly" in record.getMessage()


def test_a_backward_pass_that_cannot_be_compiled_is_told_in_the_forward_one(caplog: pytest.LogCaptureFixture) -> None:
    """Where the eager region can still stand in for both."""

    def fails(*args: Any) -> Any:
        raise RuntimeError("no kernel for this gradient")

    linear, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    compile_regions(
        [(linear, "forward")], aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=fails)
    )
    for _ in range(2):
        linear(x).sum().backward()
    assert torch.equal(linear.weight.grad, torch.full((2, 3), 2.0))
    (record,) = [record for record in caplog.records if record.name.startswith("fastdino")]
    assert "no kernel for this gradient" in record.getMessage()


def test_a_head_that_cannot_be_compiled_leaves_checkpoints_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's blocks have run compiled by then: what a backward pass makes again of them has to be so too."""
    monkeypatch.setitem(vit.SIZES, "nano", Shape(48, 2, 2, 96))
    config, project = with_engine(V1, checkpointing="full"), Head.project
    eager, want, _ = trained(config, None, steps=1)

    def breaking(self: Head, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            torch._dynamo.graph_break()
        return project(self, x)

    monkeypatch.setattr(Head, "project", breaking)
    losses, gradients, _ = trained(config, "aot_eager", steps=1)
    assert losses == pytest.approx(eager, rel=1e-6)
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(gradients, want, strict=True))


def test_many_shapes_are_no_failure_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    """More than torch compiles of one function unless told."""
    linear = torch.nn.Linear(3, 2)
    compile_regions([(linear, "forward")], "eager")
    for rows in range(1, 13):
        linear(torch.zeros(rows, 3))
    assert counters["stats"]["unique_graphs"] == 12
    assert not [record for record in caplog.records if record.name.startswith("fastdino")]


def test_an_error_of_the_network_is_no_failure_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    linear = torch.nn.Linear(3, 2)
    compile_regions([(linear, "forward")], "eager")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.zeros(1, 4))
    assert linear(torch.zeros(1, 3)).shape == (1, 2)
    assert not [record for record in caplog.records if record.name.startswith("fastdino")]
    assert counters["stats"]["unique_graphs"] == 1


def test_an_error_that_says_nothing_is_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    linear = torch.nn.Linear(3, 2)
    monkeypatch.setattr(torch, "compile", lambda eager, **_: fails)
    compile_regions([(linear, "forward")])
    assert linear(torch.zeros(1, 3)).shape == (1, 2)
    assert "engine.compile=off says nothing. AssertionError:" in caplog.text


def test_memory_that_is_short_is_not_taken_for_a_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    linear = torch.nn.Linear(3, 2)
    monkeypatch.setattr(torch, "compile", lambda eager, **_: short)
    compile_regions([(linear, "forward")])
    with pytest.raises(torch.OutOfMemoryError):
        linear(torch.zeros(1, 3))


def test_when_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.setenv(name, "elsewhere")  # nothing is made at home
    gpu = torch.device("cuda")
    assert [compiles(with_engine(V1, compile=how), CPU) for how in ("auto", "on", "off")] == [False, True, False]
    anywhere = with_engine(V1, device="auto")
    assert [compiles(with_engine(V1, compile=how), gpu) for how in ("auto", "on", "off")] == [True, True, False]
    xformers = dataclasses.replace(V1.model, attention="xformers")
    assert not compiles(dataclasses.replace(anywhere, model=xformers), gpu)
    with pytest.raises(ConfigError, match=r"engine.compile=on.*model.attention=xformers"):
        dataclasses.replace(with_engine(anywhere, compile="on"), model=xformers)


def test_caches_that_cannot_be_written_cost_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A home that may not be written is no reason not to train. What the user names goes first."""
    for name in CACHES:
        monkeypatch.setenv(name, default_cache_dir())  # torch's doing, nobody's wish
    (tmp_path / "file").touch()
    for name in ("inductor", "triton"):
        (tmp_path / name).symlink_to("/proc/self")  # a folder that takes no file, from root either
    keep_compiled_in(tmp_path / "file" / "x")
    keep_compiled_in(tmp_path)
    no_folder, no_file = (record.getMessage() for record in caplog.records)
    assert re.search(r"run.cache=.*file/x cannot be written \(Not a directory\)", no_folder)
    assert f"run.cache={tmp_path} cannot be written" in no_file
    assert os.environ["TRITON_CACHE_DIR"] == default_cache_dir()
    keep_compiled_in(tmp_path / "made")
    assert [os.environ[name] for name in CACHES] == [f"{tmp_path}/made/inductor", f"{tmp_path}/made/triton"]
    keep_compiled_in(tmp_path / "another")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{default_cache_dir()}-of-mine")
    keep_compiled_in(tmp_path / "another")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{default_cache_dir()}-of-mine"
    assert os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/made/triton"
    assert not (tmp_path / "another").exists()
