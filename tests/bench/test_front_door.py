"""``pytest bench`` as users of pytest-benchmark expect it: saved, compared, failed on, drawn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.kernels.case import OURS, PLAIN
from bench.kernels.measure import BENCHES
from bench.peers.contenders import CHECKED_STEPS, usual
from tests.bench.conftest import run_python

# Runs pytest once for each list of arguments that it is given, with small inputs of koleo_loss. With "slow" for the
# first, ours does its work 40 times: far beyond what other work on the machine does to a median. With "bare", which
# comes before any other, kornia is not to be found.
SCRIPT = """
import json, sys
from dataclasses import replace
import pytest
from bench.kernels import measure

sys.stderr = sys.stdout  # beside the run that it is of
bench, times, seen = measure.BENCHES["koleo_loss"], 1, []

def ours(*inputs):
    seen.append(inputs[0].data_ptr())
    return sum(bench.ours(*inputs) for _ in range(times)) / times

measure.BENCHES["koleo_loss"] = replace(bench, ours=ours, shapes={"cpu": ["2,10,32"]})
for first, *rest in json.loads(sys.argv[1]):
    times = 40 if first == "slow" else 1
    if first == "bare":
        sys.modules["kornia"] = None
    seen.clear()
    code = int(pytest.main(["bench", "-p", "no:cacheprovider", *rest]))
    print("of 25 inputs", len(set(seen[-25:])), "differ")
    print("exit code", code, flush=True)
    if first == "bare":
        del sys.modules["kornia"]
"""
KOLEO = ["-k", "koleo_loss", "--benchmark-max-time=0.3", "--benchmark-min-rounds=30"]
Output = tuple[int, str]
"""Exit code and what was printed, of one run of pytest."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("front_door")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Output]:
    """Runs of one process, one after another, by what each is for."""
    store = f"--benchmark-storage=file://{folder}/saved"
    compare = [store, *KOLEO, "--benchmark-compare", "--benchmark-compare-fail=median:300%"]
    few = "koleo_loss or vit_nano-fastdino] or for_the_device-fastdino]"
    arguments = {
        "bare": ["bare"],
        "not plugged": ["", "-p", "no:benchmark"],
        "list": ["", "--collect-only"],
        "first": ["", "-k", few, *KOLEO[2:], store, "--benchmark-autosave", f"--benchmark-json={folder}/first.json"],
        "same": ["", *compare, f"--benchmark-histogram={folder}/drawn"],
        "disabled": ["", *KOLEO, "--benchmark-disable"],
        "slower": [
            "slow",
            *compare,
            f"--benchmark-json={folder}/slower.json",
        ],  # the last, because pytest-benchmark ends pytest by an exception
    }
    done = run_python("-c", SCRIPT, json.dumps(list(arguments.values())), FASTDINO_COMMIT="0" * 40)
    *parts, last = re.split(r"exit code (\d+)\n", done.stdout)
    parts += [last + done.stderr, str(done.returncode)]
    assert len(parts) == 2 * len(arguments), done.stdout + done.stderr
    return {name: (int(parts[2 * i + 1]), parts[2 * i]) for i, name in enumerate(arguments)}


@pytest.fixture(scope="module")
def first(runs: dict[str, Output], folder: Path) -> dict[str, Any]:
    """The benchmarks of the first run by id."""
    code, printed = runs["first"]
    assert code == 0, printed
    document = json.loads((folder / "first.json").read_text())
    assert document["commit_info"]["id"] == "0" * 40
    assert {"device", "torch"} <= document["machine_info"].keys()
    return {entry["param"]: entry for entry in document["benchmarks"]}


def test_every_kernel_attention_the_step_and_data_are_there(runs: dict[str, Output]) -> None:
    code, printed = runs["list"]
    assert code == 0, printed
    for name in [*BENCHES, "attention"]:
        assert re.search(rf"test_kernels\.py::test_kernel\[{name}-.*-{OURS}\]", printed), name
    assert f"test_step.py::test_step[vit_nano-{OURS}]" in printed
    assert f"test_data.py::test_data[views-{OURS}]" in printed
    assert f"test_data.py::test_data_loader[{OURS}]" in printed
    assert printed.count("test_step[vit_nano-fastdino") == 1 + sum(
        name.startswith("fastdino") and "compile" not in name for name in usual(torch.device("cpu"))
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("bare", "bench: to measure beside us, kornia must be installed"),
        ("not plugged", "bench: pytest-benchmark times it"),
    ],
)
def test_what_it_needs_is_one_message(runs: dict[str, Output], run: str, message: str) -> None:
    code, printed = runs[run]
    assert code == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {message}" in printed
    assert "Traceback" not in printed


def test_a_kernel_says_what_it_moves_and_beside_what(first: dict[str, Any]) -> None:
    cases = {entry["extra_info"]["variant"]: entry for name, entry in first.items() if name.startswith("koleo_loss")}
    assert set(cases) == {OURS, PLAIN, "lightly"}
    for name, entry in cases.items():
        info, stats = entry["extra_info"], entry["stats"]
        assert entry["group"] == "koleo_loss 2,10,32"
        assert entry["options"]["timer"] == "device_seconds"
        assert (info["operation"], info["shape"]) == ("koleo_loss", "2,10,32")
        assert info["bytes"] == 3 * 4 * 2 * 10 * 32
        assert stats["rounds"] >= 30
        assert stats["median"] > 1e-5, "the fixture's own seconds"
        assert 0 < info["copy_fraction"] < 1
        assert info["launches"] > 5
        assert info["error"] < 1e-5
        if name != OURS:
            assert info["times_ours"] == cases[OURS]["extra_info"]["alternatives"][name]
            assert info["times_ours"]["low"] <= info["times_ours"]["median"] <= info["times_ours"]["high"]


def test_a_step_and_data_say_how_many_images(first: dict[str, Any]) -> None:
    step = first["vit_nano-fastdino"]
    data = first.get("for_the_device-fastdino", step)  # skipped where views by C are not built
    for entry in (step, data):
        assert entry["extra_info"]["images_per_second"] == pytest.approx(4 / entry["stats"]["median"])
    assert len(set(step["extra_info"]["losses"])) == CHECKED_STEPS
    assert step["extra_info"]["launches"] > 100
    assert 0 < step["extra_info"]["mfu"] < 1
    assert step["extra_info"]["peak_bytes"] > step["extra_info"]["state_bytes"] > 1e7


def test_as_fast_as_before_passes(runs: dict[str, Output], folder: Path) -> None:
    code, printed = runs["same"]
    assert code == 0, printed
    assert "(NOW)" in printed, "beside what was saved"
    assert [file.name for file in folder.glob("drawn*.svg")] == ["drawn-koleo_loss_2,10,32.svg"]


def test_inputs_rotate(runs: dict[str, Output]) -> None:
    assert "of 25 inputs 25 differ" in runs["same"][1]


def test_a_slower_kernel_fails(runs: dict[str, Output], folder: Path) -> None:
    code, printed = runs["slower"]
    assert code != 0, printed
    regressed = printed.split("Performance has regressed:")[1]
    assert "koleo_loss-2,10,32-fastdino] (0001" in regressed
    assert "reference]" not in regressed.split("Traceback")[0]
    for entry in json.loads((folder / "slower.json").read_text())["benchmarks"]:
        if entry["extra_info"]["variant"] != OURS:
            assert entry["extra_info"]["times_ours"]["high"] < 0.7, "ours beside it is slow too"


def test_a_cpu_says_that_it_is_a_smoke_run(runs: dict[str, Output]) -> None:
    assert "a smoke run" in runs["first"][1]


def test_disabled_each_runs_once(runs: dict[str, Output]) -> None:
    code, printed = runs["disabled"]
    assert code == 0, printed
    assert "3 passed" in printed
