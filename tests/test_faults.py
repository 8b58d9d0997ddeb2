"""Kills, notices, full disks and NaN at seeded moments: no run is lost, none hangs, none ends as another one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.record import ROOT
from tests.children import environment

SEEDS = "30"


def faults(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults", "--seeds", SEEDS, "--out", str(out)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    done = faults(path)
    assert path.exists(), done.stderr
    return path


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())


@pytest.mark.parametrize("engine", ["torch", "zero1", "zero2", "zero3"])
def test_a_run_that_is_struck_ends_as_one_that_is_not(found, engine):
    cases = [case for case in found["cases"] if case["engine"] == engine]
    assert len(cases) >= 9, "kills, and other faults"
    assert not [case for case in cases if case["wrong"]]


def test_no_rank_hangs_and_every_resumption_is_exact(found):
    assert found["hung"] == 0
    assert found["exact"] == found["resumptions"] >= 30
    assert found["survived"] == sum(found[kind] for kind in ("kill", "term", "usr1", "disk", "nan"))


def test_the_faults_struck_and_are_of_every_kind(found):
    first = [case["faults"][0] for case in found["cases"]]
    assert sum(not fault["struck"] for fault in first) <= 4, "threads may come to a call in another order"
    assert found["kill"] >= 30
    said = [fault["what"] for fault in first]  # where, chance and the threads' order decide: of each kind some
    for words in (
        "rank 0",
        "rank 1",
        "before",
        "after",
        "all_reduce|all_gather|barrier",
        "open|write|fsync|mkdir",
        ", checkpoint",
    ):
        assert any(re.search(words, text) for text in said), words
    assert len({fault["newest"] for fault in first}) >= 3, "before, between and after the checkpoints"


def test_the_same_command_goes_on(out, found):
    """With the cases that are missing, here none."""
    assert faults(out).stdout.count("\n") == 1
    assert json.loads(out.read_text()) == found
