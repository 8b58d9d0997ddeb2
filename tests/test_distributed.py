"""Ranks that come together under every launcher and none, talk, and leave; and what they say when they cannot."""

import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from fastdino import distributed
from fastdino.config import ConfigError
from fastdino.distributed import Ranks, _gpu, _rendezvous, init
from fastdino.launch import LaunchError, Place
from tests.children import environment, forked, python

PROGRAM = """
import sys
import torch
from fastdino import distributed
for run in range(2):  # one after the other in a process
    with distributed.init("cpu") as ranks:
        mean, total = torch.tensor([float(ranks.rank)]), torch.tensor([1.0])
        work = ranks.mean_(mean, async_op=True)
        if work is not None:
            work.wait()
        ranks.sum_(total)
        assert total == ranks.world_size
        assert ranks.gather(str(ranks.rank)) == [str(rank) for rank in range(ranks.world_size)]
        assert ranks.on_main(lambda: ranks.rank) == 0
        last = ranks.any(ranks.rank == ranks.world_size - 1)
        seen = (ranks.rank, ranks.world_size, ranks.local_rank, ranks.device, float(mean), last, ranks.any(False))
sys.stdout.write(" ".join(map(str, seen)) + "\\n")  # in one piece, because two ranks share a pipe
"""
# Counts its own threads once nothing but the interpreter is left: what is registered first is called last.
LEAVING = """
import atexit, sys
from pathlib import Path
names = lambda: [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: sys.stdout.write(f"left {names().count('pt_gloo_runloop')}\\n"))
from fastdino import distributed
from tests.method.rank_cases import LOSSES, train
def main(code):
    with distributed.init("cpu") as ranks:
        for stage in map(int, sys.argv[2]):
            results = train(ranks, LOSSES["center"], stage, 16, own_head=False)
        ranks.gather(results)
        assert "pt_gloo_runloop" in names()
        if code:
            sys.exit(code)
main(int(sys.argv[1]))
"""
LAUNCHER = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[017-020]",
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def outputs(environments: list[dict[str, str]]) -> list[str]:
    """What processes with these variables print, by rank."""
    done = forked(python, "-c", PROGRAM, ranks=environments, timeout=200)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_plain_python_needs_nothing() -> None:
    assert outputs([{}, {}]) == ["0 1 0 cpu 0.0 True False"] * 2, "two at once: no port is taken"


def test_slurm_starts_a_group() -> None:
    common = SLURM | {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": free_port()}
    tasks = [common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    assert outputs(tasks) == ["0 2 0 cpu 0.5 True False", "1 2 1 cpu 0.5 True False"]


def test_deepspeed_launcher(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}"]
    done = subprocess.run([*command, str(program)], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert {"0 2 0 cpu 0.5 True False", "1 2 1 cpu 0.5 True False"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("launcher", ["Open MPI", "Kubeflow"])
def test_launchers_that_are_not_installed_here(launcher: str) -> None:
    """Their variables, as they would set them for two processes on this machine."""
    port = {"MASTER_PORT": free_port()}
    if launcher == "Open MPI":
        common = port | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        names: tuple[str, ...] = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    else:
        common, names = port | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, ("RANK",)
    local = 1 if launcher == "Open MPI" else 0
    environments = [common | dict.fromkeys(names, str(rank)) for rank in range(2)]
    assert outputs(environments) == ["0 2 0 cpu 0.5 True False", f"1 2 {local} cpu 0.5 True False"]


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        here = Place(0, 2, 0, ("localhost", taken.getsockname()[1]), "RANK")
        with pytest.raises(LaunchError, match=f"port {here.address[1]}.* is in use .*set MASTER_PORT"):  # type: ignore[index]
            _rendezvous(here)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_named(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a line that said at once where this one waits."""
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=0.5))
    caplog.set_level("INFO")
    here = Place(rank, 2, 0, ("localhost", int(free_port())), "SLURM_PROCID")
    says = "1 of 2 ranks have not come .*rank 1:.*SLURM_PROCID" if rank == 0 else "no rank 0 at localhost.*MASTER_ADDR"
    with pytest.raises(LaunchError, match=says):
        _rendezvous(here)
    assert "waiting for 2 ranks at localhost" in caplog.text
    assert "to train with this process alone, unset SLURM_PROCID" in caplog.text


def test_a_rank_that_waits_hears_ctrl_c() -> None:
    env = environment() | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's "&" ignores it
    code = heard + "import logging; logging.basicConfig(level=20)\n" + PROGRAM
    waiting = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    assert any("waiting for 2 ranks" in line for line in waiting.stderr)
    waiting.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in waiting.communicate(timeout=60)[1]


def test_a_group_of_somebody_else_is_left_alone() -> None:
    with init("cpu"):
        with pytest.raises(LaunchError, match="destroy_process_group"):
            init("cpu")
        assert torch.distributed.is_initialized()


@pytest.mark.parametrize(("code", "stages"), [(0, "0"), (0, "12"), (3, "2")])
def test_no_thread_of_a_group_meets_the_end_of_the_interpreter(code: int, stages: str) -> None:
    """gloo's would abort there: after DeepSpeed's engines at each stage, on success and with an exception under way."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    command = [sys.executable, "-c", LEAVING, str(code), stages]
    ranks = [
        subprocess.Popen(command, env=environment(RANK=str(rank), **common), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=200)[0].splitlines()[-1] for rank in ranks] == ["left 0"] * 2
    assert [rank.returncode for rank in ranks] == [code] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        init("cuda")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="local rank 1 has no GPU"):
        init("auto")


def test_srun_shows_each_task_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpus-per-task=1: one GPU in sight, whatever the local rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _gpu(3, SLURM | {"SLURM_GPUS_PER_TASK": "1"}) == 0
    with pytest.raises(LaunchError, match="local rank 3 has no GPU"):
        _gpu(3, SLURM)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _gpu(3, SLURM | {"SLURM_GPUS_PER_TASK": "1"}) == 3


@pytest.mark.parametrize(("backend", "ranks", "left"), [("nccl", 2, False), ("nccl", 1, True), ("gloo", 2, True)])
def test_failure_does_not_wait_for_other_ranks(
    monkeypatch: pytest.MonkeyPatch, backend: str, ranks: int, left: bool
) -> None:
    """Neither at the barrier, nor in nccl's farewell; without a failure a rank leaves as it should."""
    calls: list[str] = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(Ranks, "barrier", lambda self: calls.append("barrier"))
    group = Ranks(0, ranks, 0, torch.device("cpu"))
    group.leave_with(lambda: calls.append("release"), lambda: calls.append("destroy"))
    with pytest.raises(ValueError, match="of this rank"), group:
        raise ValueError("of this rank")
    assert calls == (["release", "destroy"] if left else [])
    calls.clear()
    with group:
        pass
    assert calls == (["barrier", "destroy"] if left else ["barrier", "release", "destroy"]), "released once"
