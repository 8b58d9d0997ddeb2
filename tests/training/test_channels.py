"""Runs on images of one and of four channels: trained, resumed exactly, exported, loaded, evaluated, drawn."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdino
from fastdino.cli import main
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
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.eval import Knn, Reading, Subject, extract
from fastdino.training import trainer
from fastdino.training.export import any_backbone, export_run
from fastdino.training.preemption import Preempted

HIGHEST = 4095


def images(root: Path, channels: int) -> Path:
    """24 images of 12 bits in two classes: of one channel as 16-bit PNG, of more as .npy."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = root / "ab"[i % 2] / f"{i:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        waves = np.sin(np.arange(40)[:, None, None] / (2 + 4 * (i % 2)) + np.arange(channels)) + 1
        raw = (waves * HIGHEST / 2.2 + rng.random((40, 40, channels)) * HIGHEST / 11).astype(np.uint16)
        if channels == 1:
            Image.fromarray(raw[..., 0]).save(path.with_suffix(".png"))
        else:
            np.save(path.with_suffix(".npy"), raw)
    return root


def config(root: Path, dir: Path, channels: int, **run: Any) -> Config:
    """Two epochs of three steps."""
    return Config(
        model=ModelConfig(arch="vit_nano", patch_size=8),
        head=HeadConfig(num_prototypes=64, hidden_dim=48, bottleneck_dim=32),
        views=ViewsConfig(global_size=32, local_size=16, num_local=2, jitter=0.0, grayscale=0.0, rotate=10.0),
        data=DataConfig(root=str(root), channels=channels, range=(0, HIGHEST), normalize="image", num_workers=2),
        optim=OptimConfig(warmup_epochs=0),
        engine=EngineConfig(name="torch", device="cpu"),
        run=RunConfig(**{"dir": dir, "epochs": 2, "local_batch": 8, "log_every": 1, "knn_every": 0, **run}),
    )


@pytest.fixture(scope="module", params=[1, 4])
def trained(request, tmp_path_factory) -> tuple[Config, int]:
    """A finished run with its k-NN, and its channels."""
    folder = tmp_path_factory.mktemp("channels")
    root = images(folder / "images", request.param)
    made = config(root, folder / "whole", request.param, knn_every=1, knn_root=str(root))
    with pytest.MonkeyPatch.context() as patch:  # as for every test, which a fixture of the module comes before
        patch.setattr("fastdino_kernels._backend.INTERPRETED", False)
        result = fastdino.train(made)
    assert result.steps == 6
    assert np.isfinite(result.loss)
    assert result.knn is not None
    return made, request.param


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return any_backbone(folder)[0].state_dict()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(trained, tmp_path):
    made, channels = trained
    stopped = dataclasses.replace(made, run=dataclasses.replace(made.run, dir=tmp_path / "run"))
    original = trainer.Trainer.train_step

    def train_step(self: Any, batches: Any) -> Any:
        assert batches[0].views["global"].shape == (2, 8, channels, 32, 32)
        assert batches[0].views["local"].shape == (2, 8, channels, 16, 16)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        with pytest.raises(Preempted):
            fastdino.train(stopped)
    assert fastdino.train(stopped).steps == 6
    want = weights(made.run.dir)
    for name, tensor in weights(stopped.run.dir).items():
        assert torch.equal(tensor, want[name]), name
    other = dataclasses.replace(stopped, data=dataclasses.replace(stopped.data, range=(0, 100)))
    with pytest.raises(ConfigError, match=r"data\.range is \(0\.0, 4095\.0\) there"):
        fastdino.train(other)


@pytest.mark.parametrize("format", ["timm", "hf", "repository"])
def test_an_export_evaluates_as_the_run(trained, tmp_path, format):
    made, channels = trained
    written = export_run(made.run.dir, tmp_path / "hf" if format == "hf" else tmp_path, format=format)
    evaluation = Knn(data=made.data.root, neighbors=(3,), batch=8, baselines="no", cache=False)
    scores = []
    for path in (made.run.dir, written):
        backbone, found = any_backbone(path)
        assert found.data.channels == channels
        if format == "repository":  # a .pth has no place for how images are read
            found = made
        scores.append(evaluation(Subject(backbone, found, tmp_path)).found)
    assert scores[0].scores == scores[1].scores
    assert np.array_equal(*(found.arrays["predictions"] for found in scores))
    assert [found.protocol["normalize"] for found in scores] == ["image"] * 2


def test_features_are_of_the_values_in_the_files(trained):
    """Against pixels that are mapped, reduced and normalised here."""
    made, channels = trained
    backbone, _ = any_backbone(made.run.dir)
    source = bank_and_test(made.data.root, made.data).test
    reading = Reading(size=40, crop=1.0, normalize="image", channels=channels)
    found = extract(backbone, source, reading, num_workers=0).vectors
    every = sorted(Path(made.data.root).glob("*/*"))[::5]
    raw = [np.load(path) if channels > 1 else np.asarray(Image.open(path))[..., None] for path in every]
    x = torch.from_numpy(np.floor(np.stack(raw) * (255 / HIGHEST) + 0.5)).permute(0, 3, 1, 2)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), correction=0, keepdim=True) + 1)
    with torch.no_grad():
        want = backbone(x.float())
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)


def test_where_it_looks_is_drawn(trained, tmp_path, capsys):
    made, _ = trained
    main(["eval", "attention", str(made.run.dir), "--data", made.data.root, "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["data"]["images"] == 24
    assert Image.open(tmp_path / "attention.png").width > 400


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "patches", "RUN"], "data.channels={} must be 3 for shapes"),
        (["eval", "knn", "RUN"], "data.channels={} must be 3 for shapes"),
        (["eval", "attention", "RUN"], "data.channels={} must be 3 for shapes"),
        (
            ["eval", "knn", "RUN", "--data", "IMAGES", "--normalize", "imagenet"],
            "--normalize imagenet needs red, green",
        ),
    ],
)
def test_what_is_of_three_channels_says_so(trained, capsys, arguments, says):
    made, channels = trained
    words = {"RUN": str(made.run.dir), "IMAGES": made.data.root}
    with pytest.raises(SystemExit) as ended:
        main([words.get(word, word) for word in arguments])
    assert ended.value.code == 2
    assert says.format(channels) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"channels": 4}, r"it has 3 channels, and data\.channels=4"),
        ({"channels": 4, "views": "fast"}, r"data\.views='fast' cannot be used: it makes views of 3 channels"),
        ({"channels": 4, "root": "shapes"}, r"data\.channels=4 must be 3 for shapes"),
    ],
)
def test_a_run_that_cannot_be_ends_with_one_message(tmp_path, settings, says):
    for i in range(8):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    made = config(tmp_path, tmp_path / "run", 3)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, **settings))
    with pytest.raises((ConfigError, RuntimeError), match=says) as caught:
        fastdino.train(made)
    assert caught.value.exit_code == 2


def test_a_run_of_timm_on_many_channels(tmp_path):
    root = images(tmp_path / "images", 5)
    made = config(root, tmp_path / "run", 5)
    made = dataclasses.replace(made, model=ModelConfig(arch="timm:test_resnet", drop_path=0.0))
    assert fastdino.train(made).steps == 6
    backbone, found = any_backbone(export_run(made.run.dir))
    assert (backbone.channels, found.data.channels) == (5, 5)
