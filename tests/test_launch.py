"""Which rank a process is, by the variables of every launcher and of none."""

from itertools import pairwise

import pytest

from fastdino.launch import LaunchError, Place, first_host, launched_rank, place, ranks_here, without_local_rank

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[017-020]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
INTEL_MPI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
ALONE = Place(0, 1, 0, None)


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def test_torchrun_and_the_deepspeed_launcher():
    assert place(TORCHRUN) == Place(3, 8, 1, ("host", 29500), "RANK", served=False)
    assert place(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).served, "its agent listens on MASTER_PORT"
    assert not place(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).served
    assert place(TORCHRUN | SLURM | OPEN_MPI)[:3] == (3, 8, 1), "torchrun within a SLURM job"


def test_kubeflow_sets_no_local_rank():
    assert place(without(TORCHRUN, "LOCAL_RANK")) == Place(3, 8, 0, ("host", 29500), "RANK")


@pytest.mark.parametrize("env", [
    {}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": "host", "MASTER_PORT": "1"},
    {**SLURM, "SLURM_NTASKS": "1"}, {"SLURM_PROCID": "0"},
])  # fmt: skip
def test_a_lone_process_needs_no_launcher(env):
    assert place(env) == ALONE


@pytest.mark.parametrize("env", [
    {"RANK": "0", "WORLD_SIZE": "1"}, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
])  # fmt: skip
def test_one_process_of_a_launcher_takes_no_port(env):
    assert place(env).world_size == 1
    assert place(env).address is None


def test_slurm():
    assert place(SLURM) == Place(5, 16, 1, ("gpu017", 23456), "SLURM_PROCID")
    assert place(SLURM | {"SLURM_STEP_NUM_TASKS": "8"})[1] == 8, "srun -n 8 within a job of 16"
    assert place(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}).address == ("10.0.0.1", 7)
    assert place(SLURM | {"WORLD_SIZE": "1"})[:2] == (5, 16), "exported by the image of the container"
    assert place(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "16"})[:3] == (5, 16, 1), "srun --mpi=pmi2"


def test_jobs_and_steps_of_slurm_meet_at_ports_of_their_own():
    ports = []
    for job in range(300):
        for step in range(3):
            found = place(SLURM | {"SLURM_JOB_ID": str(123456 + job), "SLURM_STEP_ID": str(step)})
            assert found.address is not None
            ports.append(found.address[1])
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 20000
    assert max(ports) < 32768, "from there on Linux takes ports for outgoing connections"
    assert place(SLURM | {"SLURM_STEP_ID": "4294967290"}).address is not None, "that of an interactive step"


def test_mpirun():
    assert place(OPEN_MPI | {"MASTER_ADDR": "node1"}) == Place(3, 4, 1, ("node1", 29500), "OMPI_COMM_WORLD_RANK")
    assert place(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).address == ("localhost", 29500)
    assert place(OPEN_MPI | SLURM) == Place(3, 4, 1, ("gpu017", 23456), "OMPI_COMM_WORLD_RANK"), "not its daemon"
    assert place(INTEL_MPI) == Place(3, 4, 1, ("localhost", 29500), "PMI_RANK")
    assert place(INTEL_MPI | {"MASTER_PORT": "7"}).address == ("localhost", 7)
    mvapich = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
    assert place(mvapich | {"MASTER_ADDR": "node1"})[:3] == (3, 4, 1)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        *(
            (without(TORCHRUN, name), f"half set.*{name} is missing beside")
            for name in TORCHRUN
            if name != "LOCAL_RANK"
        ),
        ({"WORLD_SIZE": "2"}, "RANK is missing beside WORLD_SIZE;.* unset them all for one process"),
        ({"LOCAL_RANK": "0"}, "RANK is missing beside LOCAL_RANK"),
        ({"RANK": "0"}, "WORLD_SIZE is missing"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, but there are 8 ranks, counted from 0"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first' is not a number"),
        (TORCHRUN | {"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is not a number"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        (without(SLURM, "SLURM_STEP_ID"), "start it with srun, or unset SLURM_PROCID"),
        (SLURM | {"SLURM_JOB_NODELIST": "[]"}, "names no host: set MASTER_ADDR"),
        (OPEN_MPI, "pass MASTER_ADDR, the host of rank 0"),
    ],
)
def test_variables_that_cannot_work_say_what_to_change(env, says):
    with pytest.raises(LaunchError, match=says):
        place(env)
    assert launched_rank(env) == 0, "export and eval work all the same"


@pytest.mark.parametrize(
    ("env", "count"),
    [({}, 1), ({"LOCAL_WORLD_SIZE": "8"}, 8), ({"LOCAL_SIZE": "4"}, 4), (OPEN_MPI, 2), (INTEL_MPI, 4), (SLURM, 1),
     ({"LOCAL_WORLD_SIZE": "0"}, 1), ({"LOCAL_WORLD_SIZE": "all"}, 1)],
)  # fmt: skip
def test_ranks_of_this_machine(env, count):
    assert ranks_here(env) == count


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[003-010,020],login", "gpu003"), ("node7", "node7"), ("a1,a2", "a1"), ("rack-2-n[9,11]", "rack-2-n9"),
     ("n[1-3]-ib", "n1-ib")],
)  # fmt: skip
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


ADDED = [["--local_rank=0"], ["--local-rank=7"], ["--local_rank", "0"], ["--local-rank", "12"]]


@pytest.mark.parametrize("added", ADDED, ids=" ".join)
@pytest.mark.parametrize("command", [["train", "demo", "--run.seed", "3"], [], ["train", ""], ["", "a"]])
def test_what_launchers_add_to_a_command_is_dropped(command, added):
    for position in range(len(command) + 1):
        assert without_local_rank([*command[:position], *added, *command[position:]]) == command
    twice = [*added, *command, *added]
    assert without_local_rank(twice) == command
    assert all(without_local_rank(one + two) == [] for one, two in pairwise(ADDED))


@pytest.mark.parametrize("kept", [["--local-rank-of", "3"], ["--local-rank", "many"], ["a--local-rank=3"]])
def test_what_they_do_not_add_stays(kept):
    assert without_local_rank(kept) == kept
