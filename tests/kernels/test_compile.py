"""Every kernel, compiled for every target without a GPU: no spills, shared memory that fits, 128-bit access."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

import fastdino_kernels
from fastdino_kernels.cases import CASES, NARROW
from fastdino_kernels.offline import TARGETS, Report, compile_reports

ROOT = Path(__file__).parents[2]
SOURCES = Path(fastdino_kernels.__path__[0])


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: this one has Triton's interpreter instead of its compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(SOURCES.parent)
    return subprocess.run([sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def reports_of(*args: str) -> dict[str, list[Report]]:
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return {case: [Report(**report) for report in found] for case, found in json.loads(done.stdout).items()}


@cache
def reports() -> dict[str, list[Report]]:
    """All cases, all targets, compiled once."""
    return reports_of("-m", "fastdino_kernels.offline")


@pytest.mark.parametrize("case", CASES)
def test_fit_for_every_target(case: str) -> None:
    found = reports()[case]
    assert {report.target for report in found} == set(TARGETS)
    assert [line for report in found for line in report.problems(NARROW.get(report.kernel, frozenset()))] == []
    assert {report.kernel for report in found} == set(CASES[case].bytes)


def test_every_kernel_has_a_case() -> None:
    sources = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    assert kernels
    assert kernels == {report.kernel for found in reports().values() for report in found}


def test_no_figure_is_worse_than_recorded(tmp_path: Path) -> None:
    printed = tmp_path / "reports.json"
    printed.write_text(json.dumps(reports(), default=asdict))
    done = run("-m", "bench.static", "--check", "--reports", str(printed))
    assert done.returncode == 0, done.stdout + done.stderr


SPOILED = """
import json
from dataclasses import asdict
from unittest import mock
from fastdino_kernels import offline
from fastdino_kernels.optim import ema_update
from fastdino_kernels.cases import CASES, NARROW
with mock.patch.object(ema_update, "launch_config", lambda _: {config}):
    reports = offline.compile_reports(CASES["ema_update_ flat"].call, "sm_90")
print(json.dumps({"spoiled": [asdict(report) for report in reports]}))
"""


def test_a_block_too_large_is_found() -> None:
    """128 elements of each tensor in every thread, loaded before the first is used: the registers run out."""
    (report,) = reports_of("-c", SPOILED.replace("{config}", '{"BLOCK": 16384, "num_warps": 4}'))["spoiled"]
    assert report.spills > 0
    assert report.local_accesses > 0
    assert "_ema_kernel on sm_90 spills" in report.problems()[0]


def test_what_the_report_reads() -> None:
    """The figures of a kernel that is simple enough to count: 8 elements per thread of 4 + 4 + 4 + 2 bytes."""
    by_target = {report.target: report for report in reports()["ema_update_ flat"]}
    assert by_target["sm_90"].hot_bytes == 8 * (4 + 4 + 4 + 2)
    assert by_target["gfx942"].hot_bytes == 4 * (4 + 4 + 4 + 2)  # waves of 64
    assert all(report.hot_exps == 0 and 16 < report.registers < 64 for report in by_target.values())
    slices, _, gradient = (report for report in reports()["dino_loss"] if report.target == "sm_90")
    assert slices.hot_exps == slices.hot_bytes / 2 == 16  # one warp, 512 bf16 logits, one exp each
    assert gradient.hot_exps == gradient.hot_bytes / 4 == 16  # two warps, 1024 logits read and written


def test_problems_name_the_limit() -> None:
    good = {"registers": 32, "spills": 0, "local_accesses": 0, "shared": 0, "loads_128": 1, "stores_128": 1}
    good |= {"hot_instructions": 10, "hot_bytes": 16, "hot_exps": 0}
    assert Report("kernel", "sm_80", **good).problems() == []
    too_much = Report("kernel", "sm_80", **good | {"shared": 170_000})
    assert too_much.problems() == ["kernel on sm_80 asks for 170000 bytes of shared memory, 166912 at most"]
    assert Report("kernel", "sm_90", **good | {"shared": 170_000}).problems() == []
    assert "no 128-bit load" in Report("kernel", "sm_80", **good | {"loads_128": 0}).problems()[0]
    assert "no 128-bit store" in Report("kernel", "sm_80", **good | {"stores_128": 0}).problems()[0]
    assert Report("kernel", "sm_80", **good | {"stores_128": 0}).problems({"store"}) == []


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="process of its own"):
        compile_reports(CASES["ema_update_ flat"].call, "sm_90")
