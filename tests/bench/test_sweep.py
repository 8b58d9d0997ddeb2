"""Sweeps over sizes: what is measured, what is left out for want of memory, what is drawn."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import plots, report
from bench.kernels.measure import OPERATIONS, NoRoom, make_cases, measure
from bench.kernels.sweep import SWEEPS
from tests.bench.conftest import Python

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
@pytest.mark.parametrize("operation", SWEEPS)
def test_every_size_makes_a_shape_of_the_operation(operation: str, device: torch.device) -> None:
    sweep, usual = SWEEPS[operation], OPERATIONS[operation].SHAPES[device.type]
    assert [sweep.size(shape) for shape in sweep.shapes(device)] == sweep.sizes[device.type]
    for shape in sweep.shapes(device):
        assert len(shape.split(",")) in {len(x.split(",")) for x in usual}


def test_a_sweep_has_all_its_sizes() -> None:
    cases = make_cases(None, [], CPU, compiled=False, sweep=True)
    assert {case.operation for case in cases} == set(SWEEPS)
    assert len(cases) == sum(len(sweep.sizes["cpu"]) for sweep in SWEEPS.values())


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(seed: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nMore words")

    (case,) = make_cases("center_mean", ["2,3,100"], CPU, compiled=False)
    with pytest.raises(NoRoom, match=r"^center_mean 2,3,100: Tried to allocate 9 GiB\.$") as caught:
        measure(dataclasses.replace(case, make=full), CPU, rounds=3)
    assert caught.value.__context__ is None, "the error would keep the tensors of the case"


SCARCE = """
import sys, torch
from bench.kernels import center_mean, measure
from bench.kernels.__main__ import main
make = center_mean._case
def scarce(device, shape, compiled):
    def full(seed): raise torch.OutOfMemoryError("Tried to allocate 9 GiB.")
    case = make(device, shape, compiled)
    return case if "2048" not in shape else __import__("dataclasses").replace(case, make=full)
center_mean._case = scarce
sys.exit(main())
"""


def test_sweep_command_and_plot(tmp_path: Path, python: Python) -> None:
    out = tmp_path / "out.json"
    arguments = "--sweep --only center_mean --rounds 3 --device cpu --no-compile --out"
    done = python("-c", SCARCE, *arguments.split(), str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "center_mean 2,8,2048: Tried to allocate 9 GiB." in done.stdout
    curves = plots.read(json.loads(out.read_text()))
    assert set(curves) == {"center_mean"}
    assert next(iter(curves["center_mean"])) == "fastdino"
    for curve in curves["center_mean"].values():
        assert list(curve) == [512, 1024], "what did not fit is not drawn"
        for figures in curve.values():
            low, high = figures["interval"]["milliseconds"]
            assert low <= figures["milliseconds"] <= high
            low, high = figures["interval"]["copy_fraction"]
            assert 0 < low <= high
    plots.draw(curves["center_mean"], "prototypes", "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def entry(variant: str, size: int, slowness: float) -> dict[str, Any]:
    ratio = {"median": slowness, "low": slowness, "high": slowness}
    return {"extra_info": {"operation": "sinkhorn", "shape": f"16,{size}", "variant": variant, "times_ours": ratio}}


def test_the_fastest_alternatives_are_drawn() -> None:
    peers = {"a": 3.0, "b": 1.5, "c": 9.0, "d": 0.5, "e": 2.0}
    document = {"benchmarks": [entry("fastdino", 512, 1.0), entry("fastdino, other", 512, 1.0), {"extra_info": {}}]}
    document["benchmarks"] += [entry(variant, 512, slowness) for variant, slowness in peers.items()]
    assert list(plots.read(document)["sinkhorn"]) == ["fastdino", "d", "b", "e", "a"]
    assert plots.name("ema_update_") == "sweep-ema_update.png"


def test_the_page_shows_the_plots_of_a_gpu(tmp_path: Path) -> None:
    entries = [entry("fastdino", 512, 1.0), entry("lightly", 512, 2.0), {"extra_info": {}}]
    (tmp_path / "sweep-cpu.json").write_text(json.dumps({"benchmarks": entries}))
    assert report.plots_table(tmp_path) == report.NOT_MEASURED
    (tmp_path / "sweep-model-1.json").write_text(json.dumps({"benchmarks": entries}))
    assert report.plots_table(tmp_path) == "![sinkhorn over sizes](sweep-sinkhorn.png)\n"
