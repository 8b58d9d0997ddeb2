"""The gate of the recipe ``small``: its pictures, its figures, and a trial from flags to figures."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.gates import small


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The four files of a Fashion-MNIST of few pictures and two classes, bright above and bright below."""
    monkeypatch.setattr(small, "FIRST", 3)
    splits = {"train": ("train", range(40)), "test": ("t10k", range(10)), "val": ("train", range(40, 50))}
    monkeypatch.setattr(small, "SPLITS", splits)
    draws = np.random.default_rng(0)
    for stem, count in (("train", 50), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 2
        pixels = draws.integers(0, 100, (count, 2, 14, 28), dtype=np.uint8)
        pixels[np.arange(count), labels] += 150
        for kind, header, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            file = tmp_path / "source" / f"{stem}-{kind}-ubyte.gz"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    return tmp_path / "source"


def test_pictures(source, tmp_path):
    """The first of each file, in the folder of their label, pixel for pixel."""
    small.write_pictures(source, tmp_path / "pictures", "test")
    names = sorted(path.relative_to(tmp_path / "pictures").as_posix() for path in tmp_path.glob("pictures/*/*/*"))
    assert len(names) == 50
    assert names[0] == "test/0/00000.png"
    assert "train/1/00039.png" in names
    with gzip.open(source / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures/train/1/00039.png")), pixels[39])


def test_settings_are_chosen_on_pictures_that_are_in_no_other_set(source, tmp_path):
    small.write_pictures(source, tmp_path, "val")
    train, judged = ({path.name for path in tmp_path.glob(f"{split}/*/*")} for split in ("train", "val"))
    assert len(judged) == 10
    assert not train & judged
    assert not (tmp_path / "test").exists()


def test_trials_stand_in_one_file(source, tmp_path, monkeypatch):
    """The recipe takes two steps at each size of picture: what either taught stands beside the other."""
    folders = ["--source", source, "--dir", tmp_path, "--out", tmp_path / "o.json"]
    short = "--run.local-batch 20 --run.epochs 1 --engine.name torch --data.num-workers 0 --head.num-prototypes 16"
    for trial in (short, f"{short} --views.global-size 64"):
        arguments = ["small", "--trial", trial, "--seeds", "3", *folders]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        assert small.main() == 0
    cases = json.loads((tmp_path / "o.json").read_text())["cases"]
    assert [(case["features"], case["seed"]) for case in cases] == [("random start", 3), ("teacher", 3)] * 2
    assert [case["steps"] for case in cases if case["features"] == "teacher"] == [2, 2]
    pixels, _ = small.baselines(tmp_path / "fashion-mnist-test")
    assert pixels["knn_5"] == pixels["knn_20"] == pixels["first_knn_5"] == 100.0


def test_the_first_pictures_are_told_by_their_number(source, tmp_path):
    """Class folders are read one after another. Features that know the class of the first three alone are right there
    and wrong with the other seven."""
    small.write_pictures(source, tmp_path, "test")

    def read(pictures):
        labels = torch.tensor([pictures.label(index) for index in range(len(pictures))])
        numbers = torch.tensor([int(Path(pictures.name(index)).stem) for index in range(len(pictures))])
        known = (numbers < 3) | torch.tensor(len(pictures) == 40)
        return small.Features(torch.eye(2)[torch.where(known, labels, 1 - labels)], labels, numbers)

    found = small.figures(tmp_path, read)
    assert found["first_knn_5"] == pytest.approx(100.0)
    assert found["knn_5"] == pytest.approx(30.0)
