"""The loop on real rendered images: exact resumption after a kill, no waiting for the device, clear refusals."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fastdino
from fastdino import distributed, status
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.data import Batch
from fastdino.data.benchmarks import class_folders
from fastdino.engine import graphs
from fastdino.method.dino import Dino
from fastdino.training import checkpoint, metrics
from fastdino.training.run_folder import read_config
from fastdino.training.trainer import Trainer, TrainingDiverged
from tests.children import forked, python
from tests.training.test_checkpoint import read_weights

STEPS_PER_EPOCH = 5


def tiny(folder: Path, **overrides: Any) -> Config:
    """Ten steps of a nano ViT with drop path on 40 rendered images of 32 pixels.

    Overrides as group__name=value, or as group=value.
    """
    config = Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.1, pos_embed="sincos", init="xavier"),
        head=HeadConfig(num_prototypes=64, hidden_dim=48, bottleneck_dim=32),
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        data=DataConfig(root="shapes", num_images=40, image_size=32, normalize="image", num_workers=0),
        loss=LossConfig(),
        optim=OptimConfig(lr=0.01, warmup_epochs=0.4),
        engine=EngineConfig(device="cpu"),
        run=RunConfig(dir=folder, epochs=2, local_batch=8, log_every=1, knn_every=0),
    )
    groups: dict[str, Any] = {}
    for path, value in overrides.items():
        group, _, name = path.partition("__")
        old = groups.get(group, getattr(config, group))
        groups[group] = dataclasses.replace(old, **{name: value}) if name else value
    return dataclasses.replace(config, **groups)


PATCHES = {"loss__patch_weight": 1.0, "loss__koleo_weight": 0.1}
OWN_HEAD = {"patch_head": HeadConfig(num_prototypes=48, hidden_dim=32, bottleneck_dim=16)}


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted((folder / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def trained(config: str, kill_at: int | None = None, signal_number: int = signal.SIGKILL) -> None:
    """Trains what JSON says; rank 0 sends itself the signal when step ``kill_at`` is done.

    A checkpoint of four steps before, or more, is there by then.
    """
    logging.basicConfig(level=logging.INFO)
    class_folders.NUM_SHAPES = 24  # of a k-NN whose score nobody reads
    original = Trainer.train_step

    def train_step(self: Trainer, batches: list[Batch]) -> dict[str, torch.Tensor]:
        loss = original(self, batches)
        if kill_at and self.step >= kill_at - 2:
            time.sleep(0.3)  # so that a checkpoint is written, then committed
        if self.step == kill_at and self.ranks.is_main:
            os.kill(os.getpid(), signal_number)
        return loss

    Trainer.train_step = train_step
    fastdino.train(Config.from_json(config))


def launch(
    config: Config, processes: int = 1, kill_at: int | None = None, signal_number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """:func:`trained` in processes of their own."""
    return forked(trained, config.to_json(), kill_at, signal_number, ranks=processes)


def test_a_run_leaves_what_it_promises(tmp_path):
    config = tiny(
        tmp_path / "run", run__epochs=8, run__knn_every=8, run__keep=2, run__keep_every=3, data__num_images=80
    )
    result = fastdino.train(config)
    assert result.steps == 80
    assert sorted(losses(result.dir)) == list(range(1, 81))
    assert result.knn is not None
    assert result.knn > 100 / 12, "k-NN is at chance"
    assert read_config(result.dir) == config
    kept = sorted(int(p.name[5:]) for p in (result.dir / "checkpoints").iterdir())
    assert kept == [30, 60, 70, 80], "the two newest and every third epoch"
    assert list((result.dir / "tensorboard").glob("events*"))
    told = status.read(result.dir)
    assert [told[name] for name in ("state", "step", "steps", "checkpoint", "exit")] == ["finished", 80, 80, 80, 0]
    assert told["images_per_second"] > 0
    last = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[-2])
    assert {"epoch", "lr", "momentum", "grad_norm", "images_per_second", "data_wait", "teacher_entropy"} <= last.keys()
    assert last["loss_dino"] == last["loss"]
    assert {f"seconds_{part}" for part in ("host", "teacher", "student", "backward", "update")} <= last.keys()
    assert "slowest_rank" not in last, "there is one"
    assert last["grad_norm"] ** 2 == pytest.approx(last["grad_norm_backbone"] ** 2 + last["grad_norm_head"] ** 2)
    assert not {"loss_ibot", "loss_koleo", "patch_cos"} & last.keys()


def test_a_run_with_patches_logs_each_part_and_learns(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    overrides = {**PATCHES, **OWN_HEAD, "loss__patch_targets": "sinkhorn", "data__num_images": 80, "run__epochs": 4}
    result = fastdino.train(tiny(tmp_path / "run", **overrides))
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        parts = line["loss_dino"] + line["loss_ibot"] + 0.1 * line["loss_koleo"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert {"patch_cos", "contrast", "patch_entropy", "patch_usage_entropy"} <= line.keys()
    assert "balances 35 samples of a micro batch" in caplog.text
    assert f"dino {lines[0]['loss_dino']:.3f}  ibot {lines[0]['loss_ibot']:.3f}  koleo" in caplog.text
    saved = load_file(result.dir / "checkpoints/step-00000040/shared.safetensors")
    assert {"center"} == {name for name in saved if "center" in name}


def test_patches_that_become_the_cls_token_raise_an_alarm_within_the_first_epoch(tmp_path, monkeypatch, caplog):
    original = Dino.statistics
    monkeypatch.setattr(Dino, "statistics", lambda self: original(self) | {"patch_cos": torch.tensor(0.99)})
    fastdino.train(tiny(tmp_path / "run", **PATCHES, data__num_images=8 * 12, run__epochs=1))
    assert caplog.text.count("the patches have become the CLS token") == 1
    assert "step 10: the patches have become the CLS token" in caplog.text


@pytest.mark.parametrize("overrides", [
    {"data__num_workers": 2},
    {**PATCHES, **OWN_HEAD, "data__num_workers": 1},  # two centers, and masks
], ids=["deepspeed", "patches"])  # fmt: skip
def test_resume_after_kill_is_bit_exact(tmp_path, overrides):
    """Train 10 = train 5, save, go on to 9, kill -9, resume: every tensor and every loss. Every engine is struck by
    tests.faults."""
    straight = launch(tiny(tmp_path / "straight", **overrides))
    assert straight.returncode == 0, straight.stderr
    killed = tiny(tmp_path / "killed", **overrides)
    assert launch(killed, kill_at=9).returncode == -signal.SIGKILL
    assert [p.name for p in (killed.run.dir / "checkpoints").iterdir()] == ["step-00000005"]
    resumed = launch(killed)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    expected, found = state(tmp_path / "straight", 10), state(tmp_path / "killed", 10)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_resumes_with_other_ranks_and_stage(tmp_path):
    """5 steps on 2 ranks at ZeRO 3, a k-NN of rank 0's at their end, then 5 on 1 rank at ZeRO 1 with two micro batches:
    the run of 1 rank."""
    same = {"model__drop_path": 0.0}  # whose random numbers depend on the rank
    straight = launch(tiny(tmp_path / "straight", **same))
    assert straight.returncode == 0, straight.stderr
    two = tiny(tmp_path / "moved", run__local_batch=4, engine__zero_stage=3, run__knn_every=1, **same)
    stopped = launch(two, processes=2, kill_at=9)
    assert stopped.returncode != 0
    assert "epoch 1: k-NN of the teacher" in stopped.stderr
    one = tiny(tmp_path / "moved", run__local_batch=4, engine__accumulate=2, **same)
    resumed = launch(one)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = losses(tmp_path / "straight"), losses(tmp_path / "moved")
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
    stores = [checkpoint.Folder(tmp_path / run / "checkpoints") for run in ("straight", "moved")]
    manifests = [checkpoint.read_manifest(store, 10) for store in stores]
    teacher, moved = (
        read_weights(store, manifest, manifests[0].shapes)[0] for store, manifest in zip(stores, manifests, strict=True)
    )
    for name, weight in teacher.items():
        torch.testing.assert_close(moved[name], weight, atol=2e-5, rtol=1e-4)


def test_a_notice_saves_and_stops_all_ranks(tmp_path):
    """SIGTERM to one of two ranks: both stop at the same step, saved; resuming gives the run that was never stopped.

    It is resumed by torchrun.
    """
    same = {"model__drop_path": 0.0, "run__local_batch": 4}
    straight = launch(tiny(tmp_path / "straight", **same), processes=2)
    assert straight.returncode == 0, straight.stderr
    config = tiny(tmp_path / "noticed", **same)
    noticed = launch(config, processes=2, kill_at=7, signal_number=signal.SIGTERM)
    assert "stopped by a signal at step 8" in noticed.stderr  # told at 7, and all ranks agreed a step later
    assert (config.run.dir / "checkpoints/step-00000008").exists()
    told = status.read(config.run.dir)
    assert [told[name] for name in ("state", "step", "checkpoint", "exit", "ranks")] == ["preempted", 8, 8, 85, 2]
    script = tmp_path / "train.py"
    script.write_text(f"from tests.training.test_trainer import trained\ntrained({config.to_json()!r})\n")
    resumed = forked(python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "straight") == losses(tmp_path / "noticed")


def test_another_global_batch_is_refused(tmp_path):
    fastdino.train(tiny(tmp_path / "run"))
    with pytest.raises(ConfigError, match="global_batch 8, now it is 4"):
        fastdino.train(tiny(tmp_path / "run", run__local_batch=4))


class _Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::item"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", [
    {"engine__name": "torch"},
    {"engine__zero_stage": 1},
    {"engine__zero_stage": 2, "engine__accumulate": 2, "run__local_batch": 4},
    {"engine__precision": "bf16"},
    {"optim__clip_mode": "global", "optim__name": "lars"},
    {**PATCHES, **OWN_HEAD, "engine__precision": "bf16"},
    {**PATCHES, "loss__targets": "sinkhorn", "engine__zero_stage": 2, "engine__accumulate": 2},
], ids=str)  # fmt: skip
def test_a_step_never_waits_for_the_device(tmp_path, overrides):
    config = tiny(tmp_path / "run", **overrides)
    with distributed.init("cpu") as ranks:
        trainer = Trainer(config, ranks)
        batches = [[next(trainer.batches) for _ in range(config.engine.accumulate)] for _ in range(2)]
        trainer.train_step(batches[0])
        with _Waits() as waits:
            loss = trainer.train_step(batches[1])["loss"]
    assert not waits.found
    with _Waits() as waits:
        loss.item()
    assert waits.found, "the counter does not count"


def test_a_run_that_diverges_stops_and_names_the_step(tmp_path, monkeypatch):
    """Views of NaN from step 3 on: those steps change nothing, are counted, and end the run."""
    config = tiny(tmp_path / "run", run__max_nonfinite=3)
    original = Trainer._normalized

    def spoilt(self: Trainer, batch: Batch) -> Batch:
        views = original(self, batch).views
        return Batch({name: group * (torch.nan if self.step >= 3 else 1) for name, group in views.items()})

    monkeypatch.setattr(Trainer, "_normalized", spoilt)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row up to step 5 .*max_nonfinite=3"):
        fastdino.train(config)
    monkeypatch.undo()
    saved = state(config.run.dir, 5)
    assert all(tensor.isfinite().all() for tensor in saved.values()), "what is not finite is never saved"


def test_another_config_is_refused_and_nothing_is_overwritten(tmp_path):
    config = tiny(tmp_path / "run")
    fastdino.train(config)
    before = {p: p.read_bytes() for p in config.run.dir.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"holds another run \(loss.teacher_temp is 0.04 there, 0.07 here\)"):
        fastdino.train(tiny(config.run.dir, loss__teacher_temp=0.07))
    assert {p: p.read_bytes() for p in config.run.dir.rglob("*") if p.is_file()} == before


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="has files but no"):
        fastdino.train(tiny(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = fastdino.train(tiny(tmp_path / "run"))
    before = state(first.dir, 10)
    again = fastdino.train(tiny(tmp_path / "run"))
    assert again.steps == 10
    assert all(torch.equal(before[name], tensor) for name, tensor in state(first.dir, 10).items())


def test_the_pace_is_that_of_steps_that_compile_nothing(tmp_path, monkeypatch):
    """A minute of compiling in the first step is no part of what the first report says of a step."""
    now, original = 0.0, Trainer.train_step

    def train_step(trainer: Trainer, batches: list[Batch]) -> dict[str, torch.Tensor]:
        nonlocal now
        now += 0.5 if trainer.step else 60.0
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(graphs, "compile_regions", lambda regions: None)
    for name in graphs.CACHES:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now))
    fastdino.train(tiny(tmp_path, engine__compile="on", run__epochs=1, run__log_every=4, run__cache=tmp_path / "cache"))
    first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["step_seconds"], first["images_per_second"]) == (4, 0.5, 16.0)
    assert (last["step"], last["step_seconds"]) == (5, 0.5)
