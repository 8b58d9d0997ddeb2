"""Every case of bench.kernels computes the right thing, and no figure comes from one that does not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels import multi_crop
from bench.kernels.case import OURS, PLAIN, Case, Variant, check
from bench.kernels.measure import BENCHES, NoRoom, make_cases, measure, num_inputs
from fastdino.config import ViewsConfig
from tests.bench.conftest import Python, kill_python_when

CPU = torch.device("cpu")
SMALL = {
    "dino_loss": ["4,2,3,100", "3,1,2,64,bf16"],
    "ema_update_": ["5,400", "5,400,bf16", "1,320"],
    "adamw_ema_": ["5,400", "5,400,rates", "30,960,rates"],
    "segment_squares": ["5,400", "5,400,bf16"],
    "prototype_weight": ["50,32", "50,32,bf16"],
    "ibot_loss": ["8,100", "8,100,bf16"],
    "linear_ibot_loss": ["8,100,16", "8,100,16,bf16"],
    "sinkhorn": ["8,100", "8,100,bf16"],
    "koleo_loss": ["2,10,32", "1,9,40,bf16"],
    "fp8_linear": ["40,48,32", "40,32,64,bf16"],
    "gather_layer_norm": ["4,5,6,2,32", "4,5,32,bf16"],
    "scatter_add_scaled": ["4,5,6,2,32", "4,5,32,bf16"],
    "multi_crop": ["2,60,50"],
}


def small(operation: str, shape: str) -> Case:
    return BENCHES[operation].case(shape, CPU, compiled=False)


@pytest.mark.parametrize("operation", BENCHES)
def test_variants_agree(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_crop, "VIEWS", ViewsConfig(global_size=32, local_size=16, num_local=1))
    for case in (small(operation, shape) for shape in SMALL[operation]):
        assert len(case.variants) >= 3
        assert check(case)[OURS] < 1e-2


def test_bytes_are_the_least_that_any_implementation_moves() -> None:
    """Student read, gradient written, teacher and center read."""
    case = small("dino_loss", "4,2,3,100,bf16")
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
    case = small("koleo_loss", "2,10,32")
    with pytest.raises(AssertionError, match=message):
        measure(spoiled(case, name, factor), CPU, rounds=3)


def test_a_peer_that_raises_costs_no_figure_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(inputs: object) -> object:
        raise RuntimeError("no such kernel\nand more words")

    case = small("koleo_loss", "2,10,32")
    wrong = Variant(broken)  # type: ignore[arg-type]
    found = measure(dataclasses.replace(case, variants={**case.variants, "lightly": wrong}), CPU, rounds=3)
    assert set(found.figures) == {OURS, PLAIN}
    assert found.left_out == {"lightly": "RuntimeError: no such kernel"}
    line = "koleo_loss 2,10,32: lightly is left out: RuntimeError: no such kernel\n"
    assert capsys.readouterr().out == line
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(dataclasses.replace(case, variants={**case.variants, OURS: wrong}), CPU, rounds=3)


def test_what_does_not_fit_is_said() -> None:
    def full(seed: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nMore words")

    with pytest.raises(NoRoom, match=r"^koleo_loss 2,10,32: Tried to allocate 9 GiB\.$") as caught:
        measure(dataclasses.replace(small("koleo_loss", "2,10,32"), make=full), CPU, rounds=3)
    assert caught.value.__context__ is None, "the error would keep the tensors of the case"


def test_headlines_come_first() -> None:
    """What a visit has no time for is the least of it."""
    names = [case.name for case in make_cases(["dino_loss", "adamw_ema_", "koleo_loss"], [], CPU, compiled=False)]
    assert names == [
        "dino_loss 10,2,8,4096", "adamw_ema_ 150,2200000", "koleo_loss 2,64,384", "dino_loss 10,2,8,4096,bf16",
        "koleo_loss 2,64,1024,bf16",
    ]  # fmt: skip


def test_measure() -> None:
    case = small("koleo_loss", "2,10,32")
    found = measure(case, CPU, rounds=5)
    assert set(found.figures) == set(case.variants)
    assert all(len(seconds) == 5 for seconds in found.seconds.values())
    ours, plain = found.figures[OURS], found.figures[PLAIN]
    assert ours["times_ours"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ours["peak_bytes"] == plain["peak_bytes"], "a CPU runs the reference"
    assert 0 < ours["copy_fraction"] < 2


KERNELS = """
import sys
from dataclasses import replace
from bench.kernels import measure
from bench.kernels.__main__ import main
from bench.kernels import multi_crop
from bench.kernels.case import Bench
def failing(function):
    def fail(*inputs): raise RuntimeError("no such kernel")
    return fail
for name in sys.argv.pop().split(","):
    measure.BENCHES[name] = replace(measure.BENCHES[name], ours=failing(name))
sys.exit(main())
"""


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """The cases of a result file, by operation."""
    return {case["operation"]: case for case in json.loads(path.read_text())["cases"]}


def test_the_file_has_every_case_that_is_right(tmp_path: Path, python: Python) -> None:
    """A call that fails costs the exit code and its own figures, and not those of the others."""
    out = tmp_path / "out.json"
    arguments = "--only segment_squares koleo_loss --rounds 3 --device cpu --no-compile --out"
    done = python("-c", KERNELS, *arguments.split(), str(out), "koleo_loss")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "koleo_loss 2,64,384: no figure, because a call failed: RuntimeError: no such kernel" in done.stdout
    assert {"commit", "dirty", "device", "versions", "command", "date"} <= json.loads(out.read_text())[
        "provenance"
    ].keys()
    (case,) = entries(out).values()
    assert (case["operation"], case["rounds"]) == ("segment_squares", 3)
    assert set(case["variants"]) == {OURS, PLAIN, "torch._foreach_norm"}


STUCK = KERNELS.replace('raise RuntimeError("no such kernel")', "import time; time.sleep(600)")


def test_a_killed_run_leaves_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = "--only segment_squares koleo_loss --rounds 3 --device cpu --no-compile --out"
    kill_python_when(out.exists, "-c", STUCK, *arguments.split(), str(out), "koleo_loss")
    assert set(entries(out)["segment_squares"]["variants"]) == {OURS, PLAIN, "torch._foreach_norm"}
    assert len(entries(out)) == 1


def test_time_runs_out(tmp_path: Path, python: Python) -> None:
    out = tmp_path / "out.json"
    done = python("-m", "bench.kernels", *["--device", "cpu", "--seconds", "0", "--no-compile", "--out"], str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no time left for dino_loss 10,2,8,4096, ibot_loss 64,4096")
    assert not out.exists()


def test_profile_times_nothing(python: Python) -> None:
    arguments = ["--device", "cpu", "--only", "koleo_loss", "--shape", "2,10,32", "--profile"]
    eager = "import sys, torch; torch._dynamo.config.disable = True\n"  # compiling is slow
    done = python("-c", eager + "from bench.kernels.__main__ import main; sys.exit(main())", *arguments)
    assert (done.returncode, done.stdout) == (0, "koleo_loss 2,10,32: profiled\n"), done.stderr
