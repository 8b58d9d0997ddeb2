"""``fastdino doctor``: what is in order is said, what is not is found, and what to do about it."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdino import cli, recipes
from fastdino.config import Config, RunConfig
from fastdino.distributed import Ranks
from fastdino.doctor import arithmetic, folder, machine, together
from fastdino.doctor.doctor import merged
from fastdino.doctor.finding import failed, left_out, ok
from fastdino.engine import zero
from fastdino.planning.footprint import checkpoint_bytes
from tests.children import forked
from tests.doctor import doctor_cases

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)


def examined(capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Exit code, output and messages of the command in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "demo", "--engine.device", "cpu", *flags])
    return int(ended.value.code or 0), *capfd.readouterr()


def test_a_machine_that_is_in_order(tmp_path, capfd):
    """The real thing, kernels by the interpreter included; nothing is left."""
    code, text, _ = examined(capfd, "--run.dir", str(tmp_path / "runs" / "first"), "--json")
    found = {finding["check"]: finding for finding in json.loads(text)}
    assert code == 0, text
    states = {check: finding["state"] for check, finding in found.items()}
    assert states == {
        "versions": "ok", "GPU": "left out", "kernels": "ok", "attention": "ok", "DeepSpeed": "ok", "run folder": "ok",
    }  # fmt: skip
    number = len(arithmetic.calls("cpu"))
    assert found["kernels"]["said"] == f"{number} agree with their references, by Triton's interpreter"
    assert found["attention"]["said"] == "by sdpa"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "checks", lambda config, ranks: iter([machine.attention(config, ranks.device)]))


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_written_ends_with_2(capfd):
    code, text, _ = examined(capfd, "--run.dir", "/proc/fastdino/run")
    assert code == 2
    fine, line = text.splitlines()
    assert fine == "ok        attention     by sdpa"
    assert line.startswith("failed    run folder    /proc/fastdino/run cannot be used: ")
    assert line.endswith("Choose another folder with --run.dir, or make room and rights there")


def test_a_full_disk_is_found(tmp_path, monkeypatch):
    config = Config(run=RunConfig(dir=tmp_path / "run"))
    assert folder.check(config).state == "ok"
    needed = 3 * checkpoint_bytes(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    found = folder.check(config)
    assert (found.state, f"3 checkpoints take {needed / 1e9:.1f}" in found.said) == ("failed", True)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "cannot be used: No space left on device" in folder.check(config).said


def test_a_file_system_whose_locks_do_not_hold_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert "two runs could write there" in folder.check(Config(run=RunConfig(dir=tmp_path))).said


def test_a_checkpoint_takes_what_is_said(tmp_path):
    """Beside what a real one takes."""
    import fastdino
    from tests.training.test_trainer import tiny

    config = tiny(tmp_path / "run", run__epochs=1)
    fastdino.train(config)
    saved = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints/step-00000005").iterdir())
    assert checkpoint_bytes(config) == pytest.approx(saved, rel=0.1)


def test_versions_are_those_that_are_asked_for_and_tested(tmp_path, monkeypatch):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"# exact\ntorch=={torch.__version__.split('+')[0]}\nnumpy==1.0\n")
    monkeypatch.setattr(machine, "CONSTRAINTS", constraints)
    asked = ["torch>=2.11", "numpy>=1", 'absent>=1; python_version < "3"']
    monkeypatch.setattr(machine, "_requirements", lambda: asked)
    found = machine.versions()
    assert (found.state, found.remedy) == ("warning", "pip install -c constraints.txt")
    assert "numpy " in found.said
    assert ", not 1.0" in found.said
    monkeypatch.setattr(machine, "_requirements", lambda: ["torch>=99", "absent>=1"])
    found = machine.versions()
    assert found.state == "failed"
    assert "torch 2." in found.said
    assert "absent is missing, not >=1" in found.said
    assert found.remedy == "pip install 'torch>=99' 'absent>=1'"


def test_a_kernel_that_is_wrong_is_named(monkeypatch):
    kernel, reference, inputs = arithmetic.calls("cpu")["ema_update"]
    assert arithmetic.wrong(kernel, reference, inputs) == ""
    spoiled = arithmetic.wrong(lambda *x: [y * 1.01 for y in kernel(*x)], reference, inputs)
    assert spoiled.startswith("AssertionError: error 0.0")
    answer = SimpleNamespace(returncode=0, stdout=json.dumps({"ema_update": spoiled, "koleo_loss": ""}))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: answer)
        found = machine.kernels(CPU)
    assert (found.state, found.said) == ("failed", f"1 of 2 are wrong: ema_update ({spoiled})")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert machine.kernels(CPU).said == "the process that calls them ended: exit code 1"


def test_what_deepspeed_must_have_is_asked_for_by_name(monkeypatch):
    """Another version may lack what the engines use: every name is looked for, and a missing one is named."""
    assert machine.deepspeed(ALONE).state == "ok"
    more = ("runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", ("fp16_groups", "a_name_of_another_version"))
    gone = ("runtime.engine", "AnotherEngine", ("step",))
    monkeypatch.setattr(zero, "INTERNALS", (*zero.INTERNALS, more, gone))
    found = machine.deepspeed(ALONE)
    assert found.state == "failed"
    assert found.said.endswith(
        "lacks runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.a_name_of_another_version, "
        "runtime.engine.AnotherEngine.step"
    )


class Nvml:
    """A GPU that NVML knows."""

    def __init__(self, errors: int | None, slowed: int) -> None:
        self.uncorrected, self.slowed_by = lambda: errors, lambda: slowed
        self.clocks, self.driver = lambda: (1980, 1980), lambda: "580.82"


@pytest.mark.parametrize(
    ("errors", "slowed", "state", "says"),
    [
        (0, 0, "ok", "driver 580.82, 1980 of 1980 MHz, no memory errors"),
        (None, 1, "ok", "ECC is off"),
        (2, 0, "failed", "2 memory errors that ECC could not correct"),
        (0, 0x40, "warning", "slowed by: too hot"),
    ],
)
def test_a_gpu_is_judged_by_what_nvml_says(monkeypatch, errors, slowed, state, says):
    monkeypatch.setattr(machine, "Gpu", lambda device: Nvml(errors, slowed))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=141e9))
    found = machine.gpu(torch.device("cuda", 0))
    assert found.state == state
    assert found.said.startswith("NVIDIA H200, 141 GB")
    assert says in found.said


def test_two_ranks_on_one_gpu_are_found(monkeypatch):
    ranks = Ranks(0, 3, 0, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    names = ["rank 0 (a)", "rank 1 (a)", "rank 2 (b)"]
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "34cd", value])
    assert together.gpus(ranks, names).said == "rank 0 (a) and rank 2 (b) share the GPU 12ab"
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "34cd", "56ef"])
    assert together.gpus(ranks, names) == ok("GPUs", "3, one for each rank")


@pytest.mark.parametrize("hosts", [2, 3, 7, 8])
def test_each_two_hosts_are_a_pair_once_and_as_many_at_a_time_as_there_are(hosts):
    firsts = [8 * host for host in range(hosts)]
    rounds = list(together._rounds(firsts))
    assert sorted(pair for drawn in rounds for pair in drawn) == [(a, b) for a in firsts for b in firsts if a < b]
    assert {len(drawn) for drawn in rounds} == {hosts // 2}
    for drawn in rounds:
        assert len({rank for pair in drawn for rank in pair}) == 2 * len(drawn)


def test_what_hosts_have_in_common_is_said_once():
    same, other = ok("versions", "torch 2.11.0"), failed("versions", "torch 2.10.0, not >=2.11", "pip install")
    told = [[(0, same), (0, left_out("GPU", "none"))], [(1, left_out("GPU", "none"))], [(8, other)], [(16, other)]]
    assert [finding.said for finding in merged(told)] == [
        "rank 0: torch 2.11.0", "ranks 8, 16: torch 2.10.0, not >=2.11", "none",
    ]  # fmt: skip


def test_ranks_and_the_flag_go_together(capfd):
    code, text, message = examined(capfd, "--distributed")
    assert (code, text, len(message.splitlines())) == (2, "", 1)
    assert "--distributed is for ranks that a launcher starts" in message


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Findings by check, of two ranks that differ, and exit codes."""
    place = tmp_path_factory.mktemp("doctor")
    done = forked(doctor_cases.main, place, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[1]["printed"] == "", "rank 0 speaks"
    found = {finding["check"]: finding for finding in json.loads(told[0]["printed"])}
    return {"codes": [of["code"] for of in told], **found}


def test_a_rank_with_another_version_is_found(two):
    assert two["codes"] == [2, 2]
    assert two["agreement"]["state"] == "failed"
    assert two["agreement"]["said"].startswith("rank 1 (gpu004) runs torch 2.10.0, not 2.")
    assert "pip install -c constraints.txt" in two["agreement"]["remedy"]


def test_a_clock_that_is_off_is_found(two):
    assert two["clocks"]["state"] == "warning"
    assert two["clocks"]["said"].startswith("the clock of rank 1 (gpu004) is ")
    assert " s behind rank 0's" in two["clocks"]["said"]


def test_hosts_talk_and_a_death_is_noticed(two):
    assert two["hosts"]["said"] == "gpu003: 1 ranks, gpu004: 1 ranks"
    assert two["all-reduce"]["said"].count("GB/s") == 3
    assert two["host pairs"]["said"].startswith("1 at ")
    assert "gpu003 and gpu004 at " in two["host pairs"]["said"]
    assert two["a dead rank"]["state"] == "ok", two["a dead rank"]
    assert two["GPUs"]["state"] == "left out"


def test_each_host_is_examined_once(two):
    """Rank 1 has local rank 1 here, so it looks at its GPU alone."""
    assert two["kernels"]["said"] == "not asked for, on rank 0"
    assert two["run folder"]["state"] == "ok"


def test_a_death_that_nobody_notices_is_found(monkeypatch):
    """A lone process whose last rank, itself, does not die."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = together.death(ALONE)
    assert (found.state, found.check) == ("failed", "a dead rank")
    assert "(exit code 1)" in found.said


def test_recipes_that_have_no_vit_have_their_own_attention():
    convnet = next(config for name in recipes.RECIPES if not (config := recipes.get(name)).model.is_vit)
    assert machine.attention(convnet, CPU).state == "left out"
