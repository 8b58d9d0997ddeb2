"""What a resumption finds changed: images elsewhere, weights gone, a longer run; and what a signal finds at work."""

import dataclasses
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastdino
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.data.benchmarks import class_folders
from fastdino.data.sources.shapes import ShapesSource
from fastdino.eval import Knn
from fastdino.training import preemption, trainer
from fastdino.training.checkpoint import CheckpointError, Folder, storage
from fastdino.training.preemption import Preempted


def config(folder: Path, **overrides: Any) -> Config:
    """Two epochs of two steps; overrides as group__name=value."""
    made = Config(
        model=ModelConfig(arch="vit_nano", patch_size=8),
        head=HeadConfig(num_prototypes=64, hidden_dim=48, bottleneck_dim=32),
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        data=DataConfig(root="shapes", num_images=16, image_size=32, num_workers=0),
        optim=OptimConfig(warmup_epochs=0),
        engine=EngineConfig(name="torch", device="cpu"),
        run=RunConfig(dir=folder / "run", epochs=2, local_batch=8, log_every=1, knn_every=0),
    )
    for path, value in overrides.items():
        group, name = path.split("__")
        made = dataclasses.replace(made, **{group: dataclasses.replace(getattr(made, group), **{name: value})})
    return made


def images(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / name)
    return folder


NAMES = [f"{i:02d}.png" for i in range(16)]
OWN_HEAD = HeadConfig(num_prototypes=48, hidden_dim=32, bottleneck_dim=16)


def half(settings: Config) -> None:
    """Trains the first of two epochs and is preempted."""
    original = trainer.Trainer.train_step

    def train_step(self: Any, batches: Any) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        with pytest.raises(Preempted):
            fastdino.train(dataclasses.replace(settings, run=dataclasses.replace(settings.run, epochs=3)))


@pytest.mark.parametrize(("targets", "patch_targets"), [("center", None), ("sinkhorn", None), ("center", "sinkhorn")])
@pytest.mark.parametrize(("engine", "own_head"), [("torch", True), ("deepspeed", False)])
def test_a_run_with_patches_resumes_to_the_bit(tmp_path, engine, own_head, targets, patch_targets):
    """Masks, drop path, one center or two, BatchNorm over views and patches: every tensor of the last checkpoint."""
    runs = []
    for name in ("straight", "stopped"):
        settings = config(
            tmp_path / name, engine__name=engine, run__epochs=3, head__batch_norm=True, loss__koleo_weight=0.1,
            loss__patch_weight=1.0, loss__targets=targets, loss__patch_targets=patch_targets,
        )  # fmt: skip
        settings = dataclasses.replace(settings, patch_head=OWN_HEAD if own_head else None)
        if name == "stopped":
            half(settings)
        fastdino.train(settings)
        files = sorted((settings.run.dir / "checkpoints/step-00000006").glob("*.safetensors"))
        runs.append({f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()})
    assert runs[0].keys() == runs[1].keys()
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name
    centers = {name.split("/")[1] for name in runs[0] if name.endswith("center")}
    kinds = targets, patch_targets or targets
    assert centers == {name for name, kind in zip(("center", "patch_center"), kinds, strict=True) if kind == "center"}


def test_a_run_with_another_patch_head_is_another_run(tmp_path):
    patches = config(tmp_path, loss__patch_weight=1.0, run__epochs=1)
    own = dataclasses.replace(patches, patch_head=OWN_HEAD)
    fastdino.train(own)
    with pytest.raises(ConfigError, match=r"patch_head.num_prototypes is 48 there, None here"):
        fastdino.train(patches)
    other = dataclasses.replace(patches, patch_head=dataclasses.replace(OWN_HEAD, num_prototypes=32))
    with pytest.raises(ConfigError, match=r"another run \(patch_head.num_prototypes is 48 there, 32 here\)"):
        fastdino.train(other)
    elsewhere = dataclasses.replace(OWN_HEAD, weights=tmp_path / "gone.pth")
    assert fastdino.train(dataclasses.replace(own, patch_head=elsewhere)).steps == 2, "weights are not read again"


@pytest.mark.parametrize("written", ["moved", "slash", "relative"])
def test_a_run_whose_images_moved_resumes(tmp_path, monkeypatch, written):
    root = images(tmp_path / "job_101/data", NAMES)
    settings = config(tmp_path, data__root=str(root), run__epochs=3)
    half(settings)
    (tmp_path / "job_101").rename(tmp_path / "job_102")
    monkeypatch.chdir(tmp_path)
    moved = {"moved": str(tmp_path / "job_102/data"), "slash": f"{tmp_path}/job_102/data/", "relative": "job_102/data"}
    again = config(tmp_path, data__root=moved[written], run__epochs=3)
    assert fastdino.train(again).steps == 6
    steps = [json.loads(line)["step"] for line in (settings.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_other_images_are_refused(tmp_path):
    half(config(tmp_path, data__root=str(images(tmp_path / "a", NAMES))))
    other = images(tmp_path / "b", [*NAMES[:-1], "new.png"])
    with pytest.raises(ConfigError, match=r"other images: data.root=.*under other names"):
        fastdino.train(config(tmp_path, data__root=str(other), run__epochs=3))


def test_a_checkpoint_from_before_fingerprints_counts_images(tmp_path):
    half(config(tmp_path, data__root=str(images(tmp_path / "a", NAMES))))
    for path in (tmp_path / "run/checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["meta"]["images"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    other = images(tmp_path / "b", [*NAMES[:-1], "new.png"])
    assert fastdino.train(config(tmp_path, data__root=str(other), run__epochs=3)).steps == 6


def test_the_weights_that_a_run_started_from_may_be_gone(tmp_path):
    fastdino.train(config(tmp_path / "first", run__epochs=1))
    from fastdino.training.export import export_run

    weights = export_run(tmp_path / "first/run")
    half(config(tmp_path, model__weights=weights))
    weights.unlink()
    assert fastdino.train(config(tmp_path, model__weights=weights, run__epochs=3)).steps == 6
    (tmp_path / "new").mkdir()
    with pytest.raises(fastdino.UserError, match=r"backbone\.safetensors"):
        fastdino.train(config(tmp_path / "new", model__weights=weights))


def test_a_finished_run_is_made_longer_and_says_what_that_does(tmp_path, caplog):
    fastdino.train(config(tmp_path))
    caplog.set_level(logging.WARNING)
    assert fastdino.train(config(tmp_path, run__epochs=4)).steps == 8
    assert "run.epochs was 2 and is 4" in caplog.text
    assert "At step 4 the learning rate jumps from 3.14e-06 to 8.31e-06" in caplog.text
    caplog.clear()
    fastdino.train(config(tmp_path, run__epochs=4))
    assert "jumps" not in caplog.text


def test_a_run_at_constant_rates_is_made_longer_without_a_bend(tmp_path, caplog):
    """It is the longer run from its start."""
    constant = {"optim__schedule": "constant"}
    fastdino.train(config(tmp_path / "short", **constant))
    caplog.set_level(logging.WARNING)
    assert fastdino.train(config(tmp_path / "short", run__epochs=3, **constant)).steps == 6
    assert "jumps" not in caplog.text
    fastdino.train(config(tmp_path / "long", run__epochs=3, **constant))
    saved = [
        {
            file.name: load_file(file)
            for file in (tmp_path / name / "run/checkpoints/step-00000006").glob("*.safetensors")
        }
        for name in ("short", "long")
    ]
    assert saved[0].keys() == saved[1].keys() != set()
    for name, tensors in saved[0].items():
        assert all(torch.equal(x, saved[1][name][key]) for key, x in tensors.items())


def test_a_run_is_not_made_shorter_than_it_is(tmp_path):
    fastdino.train(config(tmp_path))
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(ConfigError, match=r"run.epochs=1 ends at step 2, but .*step-00000004 is of step 4"):
        fastdino.train(config(tmp_path, run__epochs=1))
    assert (tmp_path / "run/config.json").read_text() == before


def test_a_finished_run_reports_its_last_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(class_folders, "NUM_SHAPES", 24)
    first = fastdino.train(config(tmp_path, run__knn_every=1))
    assert first.knn is not None
    assert fastdino.train(config(tmp_path, run__knn_every=1)) == first


def test_a_run_says_what_it_waits_for_and_how_long_it_takes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fastdino.train(config(tmp_path, run__log_every=100))
    told = [record.getMessage() for record in caplog.records]
    waits = told.index("step 1 waits for its images")
    assert told[waits + 1].startswith("step 1 took")
    assert "seconds for the 3 steps to the end" in told[waits + 1]


def test_a_step_that_waits_for_images_is_given_up(tmp_path, monkeypatch):
    """A read that hangs, then SIGTERM: in seconds the run is saved where it stands and has ended."""
    original, hang = ShapesSource.read, os.pipe()[0]

    def read(self: ShapesSource, index: int) -> Any:
        if (tmp_path / "hang").exists():
            os.read(hang, 1)
        return original(self, index)

    def after_step(self: Any, batches: Any) -> Any:
        figures = step(self, batches)
        if self.step == 3:
            (tmp_path / "hang").touch()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return figures

    step = trainer.Trainer.train_step
    monkeypatch.setattr(ShapesSource, "read", read)
    monkeypatch.setattr(trainer.Trainer, "train_step", after_step)
    started = time.monotonic()
    with pytest.raises(Preempted, match="step 3"):
        fastdino.train(config(tmp_path))
    assert time.monotonic() - started < preemption.GRACE + 60
    assert Folder(tmp_path / "run/checkpoints").steps() == [2, 3]
    monkeypatch.undo()
    assert fastdino.train(config(tmp_path)).steps == 4


def test_an_evaluation_is_given_up(tmp_path, monkeypatch, caplog):
    """SIGTERM in a comparison of hours: the run stops at the next steps, saved, without the score."""
    calls = []

    def forever(self: Any, *sets: Any) -> Any:
        calls.append(1)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(600)

    monkeypatch.setattr(Knn, "accuracy", forever)
    monkeypatch.setattr(class_folders, "NUM_SHAPES", 24)
    started = time.monotonic()
    with pytest.raises(Preempted, match="stopped by a signal at step 3"):
        fastdino.train(config(tmp_path, run__knn_every=1, run__epochs=5))
    assert len(calls) == 1
    assert time.monotonic() - started < 300
    assert "a signal ended the k-NN" in caplog.text
    assert Folder(tmp_path / "run/checkpoints").steps() == [2, 3]


@pytest.mark.parametrize("failing", [{2}, {3, 4}])
def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch, failing):
    original = storage.copied

    def copied(content: Any, file: Any) -> Any:
        if int(Path(file.name).parent.name.split("-")[1]) in failing:
            raise OSError(28, "No space left on device")
        return original(content, file)

    monkeypatch.setattr(storage, "copied", copied)
    settings = config(tmp_path, run__save_every_steps=1, run__keep=9)
    if 4 in failing:  # the last
        with pytest.raises(CheckpointError, match="step-00000004"):
            fastdino.train(settings)
    else:
        fastdino.train(settings)
        assert Folder(tmp_path / "run/checkpoints").steps() == [1, 3, 4]
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [line["failed_saves"] for line in lines] == [0, 0, 0, 1]
