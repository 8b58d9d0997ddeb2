"""The gate of the demo: from flags to figures, those of patches too."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from bench.gates import demo
from bench.tables.trials import demo_table
from fastdino import demo as run
from fastdino.data.benchmarks import class_folders

SHORT = "--data.num-images 64 --data.image-size 24 --data.num-workers 0 --views.global-size 24 --views.local-size 12"
PATCHES = "--loss.patch-weight 0.3 --patch-head.num-prototypes 32"


def test_runs_stand_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo of two steps, and with a loss on patches: rows of one table, each with its folder and pictures."""
    monkeypatch.setattr(run, "NUM_INITIALISATIONS", 1)
    monkeypatch.setattr(run, "NUM_MASKS", 24)
    monkeypatch.setattr(class_folders, "NUM_SHAPES", 120)
    monkeypatch.setattr(demo, "PatchProbe", partial(demo.PatchProbe, num_images=96))
    for flags in (SHORT, f"{SHORT} {PATCHES}"):
        arguments = [
            "--trial",
            f"{flags} --run.epochs 1",
            "--seeds",
            "3",
            "--dir",
            tmp_path,
            "--out",
            tmp_path / "demo.json",
        ]
        monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
        assert demo.main() == 0
    cases = json.loads((tmp_path / "demo.json").read_text())["cases"]
    assert [PATCHES in case["flags"] for case in cases] == [False, True]
    for case in cases:
        for name in ("knn_teacher", "patch_miou", "patch_miou_random_init", "patch_miou_raw_pixels"):
            assert 0 < case[name] < 100
    pictures = [sorted(path.name for path in folder.glob("*.png")) for folder in tmp_path.glob("demo-*")]
    assert pictures == [["attention.png", "curves.png", "patches.png"]] * 2
    rows = demo_table(tmp_path).splitlines()
    assert PATCHES in rows[-1]
    assert {row.count("|") for row in rows[2:]} == {11}
