"""The ceilings: right before they are timed, rates and not times, written with their provenance."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import report
from bench.kernels import ceilings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.PRODUCTS, "cpu", {"square": (64, 64, 64), "prototypes": (8, 16, 96)})


def test_exp2_chain() -> None:
    """The kernel that counts exponentials takes as many as it says."""
    x = torch.rand(2 * ceilings.EXP_BLOCK, device="cuda" if torch.cuda.is_available() else CPU)
    want = x.double()
    for chain in (1, 2, 5):
        for _ in range(chain):
            want = torch.exp2(-want)
        assert torch.allclose(ceilings.exp2_chain_(x, chain).double(), want, rtol=1e-5)


def test_exponentials_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(ceilings, "EXP_PROGRAMS", 2)
    monkeypatch.setattr(ceilings, "EXP_CHAIN", 3)
    ceiling = ceilings._exp2(device)
    assert ceiling.amount == pytest.approx(1e-12 * 3 * 2 * ceilings.EXP_BLOCK)
    assert ceilings.measure({"exp2": ceiling}, device, rounds=3)["exp2"]["median"] > 0


def test_rates() -> None:
    found = ceilings.ceilings(CPU)
    assert [c.amount for c in found.values()] == [2e-9 * 2**16, 2e-12 * 64**3, 2e-12 * 8 * 16 * 96]
    rates = ceilings.measure(found, CPU, rounds=5)
    assert all(0 < f["low"] <= f["median"] <= f["high"] for f in rates.values())


@pytest.mark.gpu
def test_rates_of_a_gpu() -> None:
    device = torch.device("cuda")
    rates = ceilings.measure(ceilings.ceilings(device), device, rounds=5) | ceilings.launch_microseconds(repeats=3)
    assert len(rates) == 9
    assert all(0 < f["low"] <= f["median"] <= f["high"] for f in rates.values())
    assert rates["launch by Triton, one after another"]["median"] < 1000


def test_no_rate_of_a_wrong_result() -> None:
    found = ceilings.ceilings(CPU)
    name = next(name for name in found if "square" in name)
    right = found[name].work
    found[name] = dataclasses.replace(found[name], work=lambda: right() * 1.001)
    with pytest.raises(AssertionError, match=r"square 64 x 64 x 64 is off by 0\.001: no figure"):
        ceilings.measure(found, CPU, rounds=3)


def test_command_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ceilings-cpu.json"
    monkeypatch.setattr("sys.argv", ["bench.kernels.ceilings", "--device", "cpu", "--rounds", "3", "--out", str(out)])
    assert ceilings.main() == 0
    document = json.loads(out.read_text())
    assert {"commit", "device", "versions", "date"} <= document["provenance"].keys()
    table = report.ceilings_table(tmp_path)
    assert table.startswith(report.NOT_MEASURED), "of a GPU"
    assert all(f"| {name} |" in table for name in document["ceilings"])
