"""Every kernel, compiled for every target without a GPU: no spills, shared memory that fits, 128-bit access."""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import fastdino_kernels
from bench.compile import cases
from bench.compile.cases import CASES, ON_DEVICE
from bench.compile.offline import TARGETS, Report, compile_reports, unwritten
from tests.bench.conftest import run_python

SOURCES = Path(fastdino_kernels.__path__[0])


Reports = dict[str, list[Report]]


def reports_of(done: subprocess.CompletedProcess[str]) -> Reports:
    assert done.returncode == 0, done.stderr
    return {case: [Report(**report) for report in found] for case, found in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def reports() -> Reports:
    """All cases, all targets, compiled once."""
    return reports_of(run_python("-m", "bench.compile.offline"))


@pytest.mark.offline
@pytest.mark.parametrize("case", CASES)
def test_fit_for_every_target(case: str, reports: Reports) -> None:
    found = reports[case]
    assert {report.target for report in found} == set(TARGETS)
    assert [line for report in found for line in report.problems(CASES[case].narrow_accesses(report.kernel))] == []
    assert {report.kernel for report in found} == set(CASES[case].bytes)


@pytest.mark.offline
def test_every_kernel_has_a_case(reports: Reports) -> None:
    sources = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    assert kernels
    assert kernels == {report.kernel for found in reports.values() for report in found}


@pytest.mark.offline
def test_no_figure_is_worse_than_recorded(tmp_path: Path, reports: Reports) -> None:
    printed = tmp_path / "reports.json"
    printed.write_text(json.dumps(reports, default=asdict))
    done = run_python("-m", "bench.compile", "--check", "--reports", str(printed))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.offline
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(ON_DEVICE)])
def test_a_number_from_the_device_costs_a_load(case: str, reports: Reports) -> None:
    """At most three of 64 bits, nothing in the loops; the compiler orders these anew, with some registers more."""
    for found, usual in zip(reports[case], reports[case.removesuffix(ON_DEVICE)], strict=True):
        assert (found.kernel, found.target) == (usual.kernel, usual.target)
        assert found.registers <= 1.15 * usual.registers
        assert found.hot_instructions <= 1.05 * usual.hot_instructions
        assert found.hot_bytes - usual.hot_bytes in (0, 3 * 8)
        assert (found.loads_128, found.stores_128) == (usual.loads_128, usual.stores_128)


SPOILED = """
import json
from dataclasses import asdict
from unittest import mock
from bench.compile import offline
from fastdino_kernels.optim import ema_update
from bench.compile.cases import CASES
with mock.patch.object(ema_update, "launch_config", lambda: {config}):
    reports = offline.compile_reports(CASES["ema_update_ flat"].call, "sm_90")
print(json.dumps({"spoiled": [asdict(report) for report in reports]}))
"""


@pytest.mark.offline
def test_a_block_too_large_is_found() -> None:
    """128 elements of each tensor in every thread, loaded before the first is used: the registers run out."""
    code = SPOILED.replace("{config}", '{"BLOCK": 16384, "num_warps": 4}')
    (report,) = reports_of(run_python("-c", code))["spoiled"]
    assert report.spills > 0
    assert report.local_accesses > 0
    assert "_ema_kernel on sm_90 spills" in report.problems()[0]


@pytest.mark.offline
def test_what_the_report_reads(reports: Reports) -> None:
    """The figures of a kernel that is simple enough to count: 8 elements per thread of 4 + 4 + 4 + 2 bytes."""
    by_target = {report.target: report for report in reports["ema_update_ flat"]}
    assert by_target["sm_90"].hot_bytes == 8 * (4 + 4 + 4 + 2)
    assert by_target["gfx942"].hot_bytes == 4 * (4 + 4 + 4 + 2)  # waves of 64
    assert all(report.hot_exps == 0 and 16 < report.registers < 64 for report in by_target.values())
    slices, _, gradient = (report for report in reports["dino_loss"] if report.target == "sm_90")
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


def test_a_register_that_nothing_has_written_is_found() -> None:
    """In what ptxas made of a product by wgmma in a loop: uniform registers 14 and 15."""
    code = [
        "ULDC.64 UR12, c[0x0][0x210]",
        "@!P0 IMAD.U32 R24, RZ, RZ, UR13",
        "UISETP.GT.AND UP0, UPT, UR12, URZ, UPT",
        "HGMMA.64x16x16.F32 R24, R32, gdesc[UR10].tnspB, R24",
    ]
    assert unwritten(code) == ""
    assert unwritten([*code, "UTCHMMA gdesc[UR12], gdesc[UR12], tmem[UR12], tmem[UR12], idesc[UR13], UPT"]) == ""
    for fault in (
        "UIADD3 UR14, UP0, UR14, 0x20, URZ",
        "HGMMA.64x16x16.F32 R24, R32, gdesc[UR12].tnspB, R24",
        "UISETP.GT.AND UP0, UPT, UR15, URZ, UPT",
    ):
        assert unwritten([*code, fault, *code]) == fault
    assert unwritten([*code, "UMOV UR14, 0x1", "UIADD3 UR14, UP0, UR14, 0x20, URZ"]) == ""


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="process of its own"):
        compile_reports(CASES["ema_update_ flat"].call, "sm_90")


def test_no_kernel_is_told_to_skip_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag of uninitialised memory would make the kernel return at once for whoever runs the cases natively."""
    flags = []
    monkeypatch.setattr(cases, "PARAMETERS", 64)
    monkeypatch.setattr(cases, "_empty", lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype))
    monkeypatch.setattr(cases, "adamw_ema_", lambda *_, found_inf, **__: flags.append(found_inf.item()))
    CASES["adamw_ema_"].call()
    assert flags == [0]
