"""scripts/train.sbatch under a real SLURM of two nodes on this machine."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.record import ROOT
from fastdino import status
from tests.children import environment, wait_for
from tests.cluster.runs import STEPS, arguments, logged

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}:/usr/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(MISSING),
    reason=f"needs root and {', '.join(MISSING or PROGRAMS)}: Debian's slurmctld, slurmd, slurm-client and munge",
)

CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
FirstJobId={job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster whose every file is below ``folder``; it ends with :meth:`close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=PATH, MASTER_ADDR="127.0.0.1")
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        (folder / "state").mkdir()
        job = os.getpid() % 10_000 + 1  # ranks meet at a port by the job's number
        conf = CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports, job=job)
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self.run("mungekey", "-c", "-k", str(folder / "munge.key"))
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._start("munged", "--foreground", "--force", *(f"--{o}={folder}/munge.{n}" for o, n in munge.items()))
        wait_for((folder / "munge.socket").exists)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)

    def _start(self, program: str, *words: str) -> None:
        path = shutil.which(program, path=PATH)
        assert path
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(subprocess.Popen([path, *words], env=self.env, stdout=log, stderr=log))

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)

    def log(self) -> str:
        path = self.folder / "daemons.log"
        return path.read_text()[-4000:] if path.exists() else ""

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    (tmp_path / "slurm").mkdir()
    cluster = Slurm(tmp_path / "slurm")
    yield cluster
    cluster.close()


def test_a_job_that_is_told_to_stop_is_requeued_and_trains_to_the_end(tmp_path, slurm):
    """USR1, as --signal=USR1@300 sends it: both ranks save and exit with 85, the script requeues, the run resumes."""
    folder = tmp_path / "run"
    _, recipe, *flags = arguments(folder)
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--parsable", f"--output={tmp_path}/job.log"]
    job = slurm.run("sbatch", *size, str(ROOT / "scripts/train.sbatch"), str(folder), recipe, *flags).strip()
    log = tmp_path / "job.log"
    said = lambda: log.read_text() if log.exists() else ""  # noqa: E731
    wait_for(lambda: logged(folder) >= 15, 120)
    slurm.run("scancel", "--signal=USR1", job)
    wait_for(lambda: "start it again: preempted (85)" in said(), 60)
    stopped = status.read(folder)
    assert (stopped["state"], stopped["exit"], stopped["ranks"]) == ("preempted", 85, 2)
    assert stopped["checkpoint"] == stopped["step"] < STEPS
    wait_for(lambda: slurm.job(job)["JobState"] == "PENDING", 60)
    slurm.run(
        "scontrol", "update", f"JobId={job}", "StartTime=now+3"
    )  # not in two minutes, and not in the second of its end
    wait_for(lambda: status.read(folder)["state"] == "finished", 120)
    wait_for(lambda: slurm.job(job)["JobState"] == "COMPLETED", 60)
    assert slurm.job(job)["Restarts"] == "1"
    assert f"resumed from {folder}/checkpoints/step-{stopped['step']:08d}" in said()
