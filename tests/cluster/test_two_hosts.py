"""Two hosts, which are network namespaces with a cable between them: one is lost, and both are started again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdino import status
from tests.children import environment, forked, python, wait_for
from tests.cluster.runs import STEPS, arguments, final, logged

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and ip (iproute2), which make network namespaces",
)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """Hosts 1 and 2 at 10.77.0.1 and 10.77.0.2."""

    def __init__(self) -> None:
        self.names = {number: f"fd{os.getpid()}-{number}" for number in (1, 2)}
        self.devices = {number: f"fd{os.getpid()}v{number}" for number in (1, 2)}
        for name in self.names.values():
            ip("netns", "add", name)
        ends = [("netns", self.names[n], "name", self.devices[n]) for n in (1, 2)]
        ip("link", "add", self.devices[1], "netns", self.names[1], "type", "veth", "peer", *ends[1][2:], *ends[1][:2])
        for number, name in self.names.items():
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", self.devices[number])
            for device in ("lo", self.devices[number]):
                ip("-n", name, "link", "set", device, "up")

    def torchrun(self, number: int, folder: Path) -> subprocess.Popen[bytes]:
        """Starts the host's agent, with one process."""
        device, log = self.devices[number], folder.with_name(f"host-{number}.log")
        env = environment(GLOO_SOCKET_IFNAME=device, TP_SOCKET_IFNAME=device)
        meeting = ["--rdzv-backend=c10d", "--rdzv-id=run", "--rdzv-endpoint=10.77.0.1:29400"]
        place = [f"--node-rank={number - 1}", f"--rdzv-conf=is_host={2 - number}", f"--local-addr=10.77.0.{number}"]
        agent = [
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--max-restarts=0",
            *meeting,
            *place,
        ]
        inside = ["ip", "netns", "exec", self.names[number], sys.executable]
        with log.open("ab") as out:
            return subprocess.Popen(
                [*inside, *agent, "-m", "fastdino", *arguments(folder)], env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def kill(self, number: int) -> None:
        """The host loses its power: every process that runs there."""
        for pid in ip("netns", "pids", self.names[number]).split():
            os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        for number, name in self.names.items():
            if name in ip("netns", "list"):
                self.kill(number)
                ip("netns", "del", name)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts()
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield made
    made.close()


def test_a_host_is_lost_and_nothing_of_the_run(tmp_path, hosts):
    """At a moment of chance. The other host's agent ends by itself; the same two commands train to the end, with the
    files of two processes on one host."""
    folder, alone, moment = tmp_path / "run", tmp_path / "alone", random.randrange(12, 60)
    agents = [hosts.torchrun(number, folder) for number in (1, 2)]
    wait_for(lambda: logged(folder) >= moment, 120)
    hosts.kill(2)
    lost = time.monotonic()
    assert agents[0].wait(60) == 1, "torchrun has one code for all failures"
    assert time.monotonic() - lost < 15
    agents[1].wait(60)
    assert moment <= logged(folder) < STEPS
    assert status.requeue(folder)[0]
    agents = [hosts.torchrun(number, folder) for number in (1, 2)]
    codes, said = [agent.wait(120) for agent in agents], (tmp_path / "host-1.log").read_text()
    assert codes == [0, 0], said
    assert "resumed from" in said
    done = forked(python, "-m", "fastdino", *arguments(alone), ranks=2)
    assert done.returncode == 0, done.stderr
    assert final(folder) == final(alone), f"host 2 was lost at step {moment}"
    assert not status.requeue(folder)[0]
