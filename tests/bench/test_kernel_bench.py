"""Every case of bench.kernels computes the right thing, and no figure comes from one that does not."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench.kernels.case import OURS, PLAIN, Case, Variant, check
from bench.kernels.measure import OPERATIONS, make_cases, measure, num_inputs
from tests.bench.conftest import Python

CPU = torch.device("cpu")
SMALL = {
    "dino_loss": ["4,2,3,100", "3,1,2,64,bf16"],
    "center_mean": ["2,3,100", "1,4,64,bf16"],
    "ema_update_": ["5,400", "5,400,bf16", "1,320"],
    "adamw_ema_": ["5,400"],
    "segment_squares": ["5,400", "5,400,bf16"],
    "prototype_weight": ["50,32", "50,32,bf16"],
    "ibot_loss": ["8,100", "8,100,bf16"],
    "linear_ibot_loss": ["8,100,16", "8,100,16,bf16"],
    "sinkhorn": ["8,100", "8,100,bf16"],
    "koleo_loss": ["2,10,32", "1,9,40,bf16"],
    "gather_layer_norm": ["4,2,5,32", "4,3,5,32,bf16"],
    "scatter_add_scaled": ["4,2,5,32", "4,3,5,32,bf16"],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_variants_agree(operation: str) -> None:
    for case in make_cases(operation, SMALL[operation], CPU, compiled=False):
        assert len(case.variants) >= 3
        assert check(case)[OURS] < 1e-2


def test_bytes_are_the_least_that_any_implementation_moves() -> None:
    """Student read, gradient written, teacher and center read."""
    (case,) = make_cases("dino_loss", ["4,2,3,100,bf16"], CPU, compiled=False)
    assert case.bytes == 2 * (4 + 4 + 2) * 3 * 100 + 4 * 100
    assert num_inputs(case, CPU) * case.bytes >= 3 * 2**25


def spoiled(case: Case, name: str, factor: float) -> Case:
    """The case with a variant whose first result is too large."""

    def bind(inputs: object) -> object:
        call = case.variants[name].bind(inputs)
        return lambda: [call()[0] * factor, *call()[1:]]

    wrong = Variant(bind, case.variants[name].restore)  # type: ignore[arg-type]
    return dataclasses.replace(case, variants={**case.variants, name: wrong})


@pytest.mark.parametrize(
    ("name", "factor", "message"), [(OURS, 1.001, "error 0.0.* of the kernel"), ("lightly", 1.2, r"off by 0\.2")]
)
def test_no_figure_from_a_wrong_result(name: str, factor: float, message: str) -> None:
    """Ours is held to plain torch's own error, a peer to computing the same thing."""
    (case,) = make_cases("center_mean", ["2,3,100"], CPU, compiled=False)
    with pytest.raises(AssertionError, match=message):
        measure(spoiled(case, name, factor), CPU, rounds=3)


def test_a_peer_that_raises_costs_no_figure_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(inputs: object) -> object:
        raise RuntimeError("no such kernel\nand more words")

    (case,) = make_cases("center_mean", ["2,3,100"], CPU, compiled=False)
    wrong = Variant(broken)  # type: ignore[arg-type]
    found = measure(dataclasses.replace(case, variants={**case.variants, "lightly": wrong}), CPU, rounds=3)
    assert set(found.figures) == {OURS, PLAIN}
    assert found.left_out == {"lightly": "RuntimeError: no such kernel"}
    line = "center_mean 2,3,100: lightly is left out: RuntimeError: no such kernel\n"
    assert capsys.readouterr().out == line
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(dataclasses.replace(case, variants={**case.variants, OURS: wrong}), CPU, rounds=3)


BROKEN = """
import os, sys
from dataclasses import replace
from bench.kernels import center_mean, measure
from bench.kernels.__main__ import main
make, once = center_mean._case, measure._measure
def broken(device, shape, compiled):
    def fail(inputs): raise RuntimeError("no such kernel")
    case, name = make(device, shape, compiled), "lightly" if shape == "2,3,100" else "fastdino"
    return replace(case, variants={**case.variants, name: replace(case.variants[name], bind=fail)})
def counted(case, *args):
    open(os.environ["SEEN"], "a").write(case.shape + ";")
    return once(case, *args)
center_mean._case, measure._measure = broken, counted
sys.exit(main())
"""


def test_a_case_that_fails_is_not_measured_again(tmp_path: Path, python: Python) -> None:
    out = tmp_path / "out.json"
    arguments = "--only center_mean --shape 2,3,100 1,2,64 --rounds 3 --device cpu --no-compile --out"
    done = python("-c", BROKEN, *arguments.split(), str(out), SEEN=str(tmp_path / "seen"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "seen").read_text() == "2,3,100;1,2,64;"
    assert "center_mean 2,3,100: lightly is left out: RuntimeError: no such kernel" in done.stdout
    assert "no figure, because a call failed: RuntimeError: no such kernel" in done.stdout
    kept = [entry["extra_info"].get("variant") for entry in json.loads(out.read_text())["benchmarks"]]
    assert kept == [OURS, PLAIN, None], "and the copy"


def test_measure() -> None:
    (case,) = make_cases("dino_loss", ["4,2,3,512"], CPU, compiled=False)
    found = measure(case, CPU, rounds=5)
    assert set(found.figures) == set(case.variants)
    assert all(len(seconds) == 5 for seconds in found.seconds.values())
    ours, plain = found.figures[OURS], found.figures[PLAIN]
    assert ours["times_ours"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ours["peak_bytes"] < plain["peak_bytes"], "the gradient is written in place"
    assert 0 < ours["copy_fraction"] < 2


def test_command_writes_the_json_of_pytest_benchmark(tmp_path: Path, python: Python) -> None:
    out = tmp_path / "out.json"
    arguments = "--only center_mean --shape 2,3,100 --rounds 3 --device cpu --no-compile --out"
    done = python("-m", "bench.kernels", *arguments.split(), str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert {"commit", "dirty", "device", "versions", "command", "date"} <= document["machine_info"].keys()
    entries = {e["extra_info"].get("variant"): e for e in document["benchmarks"]}
    assert entries[OURS]["stats"]["rounds"] == 3
    milliseconds = entries[OURS]["extra_info"]["milliseconds"]
    assert entries[OURS]["stats"]["median"] == pytest.approx(1e-3 * milliseconds), "the rounds are those measured"
