"""The k-NN of a run: what is wrong with its images is said before the first step, and never ends a run that goes on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
from tests.children import environment


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
    for i in range(count):
        Image.fromarray(pixels[i]).save(folder / f"{i}.png")


@pytest.fixture
def knn_root(tmp_path: Path) -> Path:
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            images(tmp_path / "knn" / split / name, count)
    return tmp_path / "knn"


def config(folder: Path, knn_root: Path) -> Config:
    """Four steps of 8 images, a k-NN after every second."""
    return Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0),
        head=HeadConfig(num_prototypes=32, hidden_dim=16, bottleneck_dim=8),
        views=ViewsConfig(global_size=32, local_size=16, num_local=1),
        data=DataConfig(root="shapes", num_images=16, image_size=32, num_workers=0),
        optim=OptimConfig(warmup_epochs=0),
        engine=EngineConfig(device="cpu", name="torch"),
        run=RunConfig(dir=folder, epochs=2, local_batch=4, log_every=1, knn_every=1, knn_root=str(knn_root)),
    )


def scores(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["knn"] for line in lines if "knn" in line]


def test_a_folder_of_classes(tmp_path: Path, knn_root: Path) -> None:
    result = fastdino.train(config(tmp_path / "run", knn_root))
    assert len(scores(result.dir)) == 2
    assert result.knn == scores(result.dir)[-1]


@pytest.mark.parametrize("fault", ["a class that val lacks", "a stray image", "nothing readable"])
def test_refused_before_the_run_begins(tmp_path: Path, knn_root: Path, fault: str) -> None:
    if fault == "a class that val lacks":
        images(knn_root / "train" / "bird", 2)
    elif fault == "a stray image":
        images(knn_root / "val" / "stray", 1)
        (knn_root / "val" / "stray" / "0.png").rename(knn_root / "val" / "0.png")
        (knn_root / "val" / "stray").rmdir()
    else:
        for file in knn_root.glob("val/*/*.png"):
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"knn"):
        fastdino.train(config(tmp_path / "run", knn_root))
    assert not (tmp_path / "run" / "config.json").exists()


SCRIPT = """
import shutil, sys
from pathlib import Path
import fastdino
from fastdino.eval import knn
from fastdino.training.trainer import Trainer

config = fastdino.Config.from_json(Path(sys.argv[1]).read_text())
step, opened = Trainer.train_step, []
bank_and_test = knn.bank_and_test

def train_step(self, batches):
    assert bool(opened) == (self.ranks.rank == 0), "one rank alone opens the images"
    if self.step == 2:  # after the first evaluation
        shutil.rmtree(config.run.knn_root, ignore_errors=True)
    return step(self, batches)

def noted(*arguments):
    opened.append(arguments)
    return bank_and_test(*arguments)

Trainer.train_step, knn.bank_and_test = train_step, noted
found = f"steps {fastdino.train(config).steps} openings {len(opened)}\\n"
sys.stdout.write(found)  # in one piece, because two ranks share a pipe
"""


def test_images_that_vanish_are_an_alarm_on_one_rank_and_the_end_of_none(tmp_path: Path, knn_root: Path) -> None:
    settings = config(tmp_path / "run", knn_root)
    (tmp_path / "config.json").write_text(settings.to_json())
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "config.json")],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "steps 4 openings 0", "steps 4 openings 1"]
    assert "the k-NN failed, training goes on: EvaluationError: none of the images could be read" in done.stderr
    assert len(scores(tmp_path / "run")) == 1
