"""Which rank a process is, under every launcher and none."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdino.distributed import Ranks, _gpu, init
from fastdino.launch import first_host, place
from tests.children import environment

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
        last = ranks.any(ranks.rank == ranks.world_size - 1)
        seen = (ranks.rank, ranks.world_size, ranks.local_rank, ranks.device, float(mean), last, ranks.any(False))
sys.stdout.write(" ".join(map(str, seen)) + "\\n")  # in one piece, because two ranks share a pipe
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
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for env in environments
    ]
    finished = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), finished
    return [out.strip() for out, _ in finished]


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


def test_launcher_variables() -> None:
    assert place(LAUNCHER) == (3, 8, 1, "tcp://host:29500")
    assert place(LAUNCHER | {"TORCHELASTIC_RUN_ID": "x"}) == (3, 8, 1, "env://")
    assert place(LAUNCHER | SLURM)[:3] == (3, 8, 1), "torchrun within a SLURM job"
    assert place({}) == (0, 1, 0, None)


def test_slurm_variables() -> None:
    assert place(SLURM) == (5, 16, 1, f"tcp://gpu017:{20000 + 123456 % 20000}")
    assert place(SLURM | {"SLURM_STEP_NUM_TASKS": "8"})[1] == 8, "srun -n 8 within a job of 16"
    assert place(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})[3] == "tcp://10.0.0.1:7"
    assert place({**SLURM, "SLURM_NTASKS": "1"}) == (0, 1, 0, None)


@pytest.mark.parametrize("name", LAUNCHER)
def test_half_set_launcher_variables(name: str) -> None:
    env = {key: value for key, value in LAUNCHER.items() if key != name}
    with pytest.raises(RuntimeError, match=f"half set.*{name} missing"):
        place(env)


def test_slurm_without_srun() -> None:
    with pytest.raises(RuntimeError, match="srun"):
        place({key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[003-010,020],login", "gpu003"), ("node7", "node7"), ("a1,a2", "a1"), ("rack-2-n[9,11]", "rack-2-n9"),
     ("n[1-3]-ib", "n1-ib")],
)  # fmt: skip
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(RuntimeError, match="no GPU"):
        init("cuda")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="local rank 1 has no GPU"):
        init("auto")


def test_srun_shows_each_task_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpus-per-task=1: one GPU in sight, whatever the local rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _gpu(3, SLURM | {"SLURM_GPUS_PER_TASK": "1"}) == 0
    with pytest.raises(RuntimeError, match="local rank 3 has no GPU"):
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
    group.leave_with(lambda: calls.append("destroy"))
    with pytest.raises(ValueError, match="of this rank"), group:
        raise ValueError("of this rank")
    assert calls == (["destroy"] if left else [])
    calls.clear()
    with group:
        pass
    assert calls == ["barrier", "destroy"]
