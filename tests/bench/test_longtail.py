"""The bench of a long tail: its pictures, and commands whose scores stand beside those before."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.tables import longtail

pytest.importorskip("sklearn")


def test_sizes_fall_by_one_factor() -> None:
    assert longtail.sizes() == [1000, 599, 359, 215, 129, 77, 46, 28, 17, 10]


def test_the_pictures_are_the_first_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longtail, "LARGEST", 100)
    draws = np.random.default_rng(0)
    for stem, count in (("train", 1200), ("t10k", 50)):
        pixels, labels = draws.integers(0, 255, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, header, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    longtail.write_pictures(tmp_path, tmp_path / "pictures")
    train, test = ({p.name: len([*p.iterdir()]) for p in tmp_path.glob(f"pictures/{s}/*")} for s in ("train", "test"))
    assert train == dict(zip(longtail.CLASSES, longtail.sizes(), strict=True))
    assert test == dict.fromkeys(longtail.CLASSES, 5)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures/train/trouser/00011.png")), pixels[11])


def test_each_step_stands_beside_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real commands, on pixels; a command whose result is there is not run again."""
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate("abc"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = draws.integers(0, 255, (32, 32), dtype=np.uint8) // 2
                pixels[8 * number : 8 * number + 8] += 100
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    monkeypatch.setenv("FASTDINO_CACHE", str(tmp_path / "cache"))
    small = "--size 32"
    monkeypatch.setattr(longtail, "STEPS", {"clusters": f"cluster {small}", "neighbours": f"knn {small}"})
    first, second = longtail.steps(tmp_path, Path("pixels"), tmp_path / "out")
    assert second["score"]["value"] == 100.0
    assert first["gain"] is None
    assert second["gain"]["value"] == pytest.approx(100 - first["score"]["value"], abs=1e-3)
    capsys.readouterr()
    assert [*longtail.steps(tmp_path, Path("pixels"), tmp_path / "out")] == [first, second]
    assert not capsys.readouterr().out


def test_the_table() -> None:
    where = {"command": "python -m x", "device": "A CPU", "commit": "0123456789", "date": "2026-11-27T10:00:00"}
    score, gain = {"value": 70.04, "low": 69.0, "high": 71.0}, {"value": 4.0, "low": -1.0, "high": 9.0}
    case = {"step": "k-NN", "command": "knn", "score": score, "gain": None, "pixels": 60.0, "random_init": 50.0}
    document = {"provenance": where, "steps": 1848, "counts": {"a": 1000, "b": 10}, "cases": [case]}
    document["cases"].append({**case, "gain": gain})  # type: ignore[attr-defined]
    assert longtail.caption(document).endswith("1,010 training pictures, 1,000 to 10 of a class; 1,848 steps; ")
    first, second = longtail.rows(document)
    assert first == ["k-NN", "`knn`", "70.0 (69.0 to 71.0)", "", "60.0", "50.0"]
    assert second[3] == "+4.0 (-1.0 to +9.0)"
    assert len(first) == len(longtail.HEADER)
