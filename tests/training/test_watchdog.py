"""A rank that hangs ends the run with the stacks of all; one that is slow is left alone."""

import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import fastdino
from fastdino import status
from fastdino.config import RunConfig
from fastdino.data.benchmarks import class_folders
from fastdino.distributed import Ranks
from fastdino.training import watchdog
from fastdino.training.watchdog import FOREVER, SLOW, Pulse, Watchdog
from tests.children import environment, forked, python, wait_for
from tests.training.test_trainer import tiny

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class Clock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(pulse: Pulse, clock: Clock, seconds: list[float]) -> None:
    """Steps that take so long, none of which may be overdue at any time."""
    for number, taken in enumerate(seconds, 1):
        clock.now += taken
        assert pulse.overdue() is None, f"step {number} of {taken} s"
        pulse.step(number)


def test_a_slow_run_that_moves_is_left_alone(clock):
    """Steps of minutes that become slower and slower, after a first one that compiles for a quarter of an hour."""
    pulse = Pulse(120.0, clock)
    steps(pulse, clock, [899.0, 899.0, 100.0, 100.0, 150.0, *(100.0 * 1.05**n for n in range(100))])


def test_a_step_that_does_not_end_is_overdue(clock):
    pulse = Pulse(120.0, clock)
    steps(pulse, clock, [30.0, *[0.5] * 5])
    clock.now += 120.5
    assert pulse.overdue() == "no progress for 120 s in step 7 (limit 120 s)"
    pulse.beat()
    assert pulse.overdue() is None


def test_the_limit_is_20_median_steps(clock):
    pulse = Pulse(120.0, clock)
    steps(pulse, clock, [30.0, 10.0, 10.0, 800.0, 10.0, 190.0])
    clock.now += 201.0
    assert "(limit 200 s)" in (pulse.overdue() or "")


def test_a_section_has_its_own_limit_and_is_no_part_of_a_step(clock):
    pulse = Pulse(1.0, clock)
    steps(pulse, clock, [1.0] * 5)
    with pulse.section("the checkpoint"):
        clock.now += SLOW - 1
        assert pulse.overdue() is None
        clock.now += 2
        assert pulse.overdue() == "no progress for 901 s in the checkpoint (limit 900 s)"
    assert pulse.limit == 20.0
    with pulse.section("an evaluation", FOREVER):
        clock.now += 1e6
        assert pulse.overdue() is None
    steps(pulse, clock, [1.0] * 5)
    assert pulse.limit == 20.0


def test_a_trainer_says_what_it_does(tmp_path, monkeypatch):
    """Of a real run: every step, checkpoint and batch of the k-NN, within limits that fit."""
    seen: list[tuple[str, float]] = []
    step, beat = Pulse.step, Pulse.beat
    monkeypatch.setattr(Pulse, "step", lambda self, n: (seen.append((self.where, self.limit)), step(self, n))[1])
    monkeypatch.setattr(Pulse, "beat", lambda self: (seen.append((self.where, self.limit)), beat(self))[1])
    monkeypatch.setattr(class_folders, "NUM_SHAPES", 24)
    fastdino.train(tiny(tmp_path / "run", run__knn_every=2))
    places = [where for where, _ in seen]
    assert [where for where in places if where != "the k-NN"] == ["the start", *(f"step {n}" for n in range(2, 11))]
    assert places.count("the k-NN") > 1
    assert {limit for where, limit in seen if where in ("the start", "step 2", "the k-NN")} == {SLOW}
    assert dict(seen)["step 8"] == 120.0


def test_a_watchdog_leaves_nothing_behind():
    before = signal.getsignal(signal.SIGUSR2), threading.active_count()
    with Watchdog(RunConfig(), ALONE):
        assert threading.active_count() == before[1] + 1
    with Watchdog(RunConfig(hang_after=0), ALONE):
        assert threading.active_count() == before[1]
    assert (signal.getsignal(signal.SIGUSR2), threading.active_count()) == before


def test_time_that_a_process_was_stopped_is_forgiven(monkeypatch):
    """SIGSTOP, a suspended machine: its threads find a time gone in which nothing could have been done."""
    times = iter([0.0, 0.0, 1.0, 2.0, 5000.0, 5001.0])
    guard = Watchdog(RunConfig(), ALONE)
    forgiven: list[float] = []
    monkeypatch.setattr(guard.pulse, "forgive", forgiven.append)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(times)))
    looks = iter([False] * 4)
    monkeypatch.setattr(guard, "_left", SimpleNamespace(wait=lambda seconds: next(looks, True)))
    guard._watch()
    assert forgiven == [4997.0]


def test_what_hangs_itself_does_not_keep_a_process_from_ending(tmp_path, monkeypatch):
    """A disk that is gone: neither stacks nor status can be written."""
    ended: list[int] = []
    guard = Watchdog(RunConfig(dir=tmp_path), ALONE)
    stuck = threading.Event()
    came_back: list[bool] = []
    monkeypatch.setattr(watchdog, "PATIENCE", 0.4)
    monkeypatch.setattr(watchdog, "end_now", ended.append)
    monkeypatch.setattr(guard, "_write_stacks", lambda reason: came_back.append(stuck.wait(30)))
    guard.last_words = lambda code, reason: came_back.append(stuck.wait(30))
    guard._end("rank 0 made no progress")
    assert (ended, came_back) == ([86], [])
    stuck.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_is_well_is_told_of_one_that_hangs(tmp_path, monkeypatch):
    """It may wait for that one as long as it likes, and for no other: each ends once both have written."""
    (tmp_path / "config.json").touch()
    store, ended = dist.HashStore(), []

    def end_now(code: int) -> None:
        ended.append((code, len(list((tmp_path / "stacks").iterdir()))))
        sys.exit()  # of the thread

    monkeypatch.setattr(watchdog, "end_now", end_now)
    monkeypatch.setattr(watchdog, "PERIOD", 0.1)
    run = RunConfig(dir=tmp_path, hang_after=0.5)
    guards = [Watchdog(run, Ranks(rank, 2, 0, torch.device("cpu"), store=store)) for rank in range(2)]
    steps(guards[1].pulse, Clock(), [0.0] * 5)
    with guards[0].pulse.section("a wait", FOREVER):
        for guard in guards:
            guard.__enter__()
        wait_for(lambda: len(ended) == 2)
    for guard in guards:
        guard.__exit__(KeyboardInterrupt, None, None)
    assert ended == [(86, 2), (86, 2)]
    for rank, where in enumerate(("a wait", "step 6")):
        text = (tmp_path / f"stacks/rank-{rank:05d}.txt").read_text()
        assert "rank 1 made no progress" in text
        assert f"rank {rank} was in {where}" in text


PROGRAM = """
import time
from fastdino import cli
from fastdino.config import Config
from fastdino.training import trainer
original = trainer.Trainer.train_step
def waits_for_a_ghost():
    time.sleep(1000)
def train_step(self, batches):
    if self.step == 6 and self.ranks.rank == {rank}:
        waits_for_a_ghost()
    return original(self, batches)
trainer.Trainer.train_step = train_step
cli.configured = lambda *_: Config.from_json({config!r})
cli.main(["train", "demo"])
"""


@pytest.mark.parametrize(("world", "hangs"), [(1, 0), (2, 0), (2, 1)])
def test_a_hang_of_one_rank_ends_all_with_86_and_their_stacks(tmp_path, world, hangs):
    """The place where the one hangs, and that where the other waits for it, can be read."""
    config = tiny(tmp_path / "run", run__hang_after=3.0, run__save_every_steps=3, run__local_batch=8 // world)
    done = forked(python, "-c", PROGRAM.format(rank=hangs, config=config.to_json()), ranks=world, timeout=300)
    assert done.args == [86] * world, done.stderr
    stacks = [(config.run.dir / f"stacks/rank-{rank:05d}.txt").read_text() for rank in range(world)]
    for rank, text in enumerate(stacks):
        assert re.search(r"rank \d made no progress for \d+ s in step 7", text)
        assert f"rank {rank} was in step 7" in text
        assert ("waits_for_a_ghost" in text) == (rank == hangs)
        assert "in run" in text, "the loop, down to what it waits for"
    assert "the stacks of all ranks; the run ends with exit code 86" in done.stderr
    assert "Traceback" not in done.stderr
    told = status.read(config.run.dir)
    assert [told[name] for name in ("state", "exit", "step", "checkpoint")] == ["hung", 86, 6, 5], "6 was not committed"
    assert "made no progress" in told["reason"]


def test_stacks_can_be_asked_for(tmp_path):
    """SIGUSR2, of a process that goes on."""
    code = """
import time, torch
from fastdino.config import RunConfig
from fastdino.distributed import Ranks
from fastdino.training.watchdog import Watchdog
def here_it_is():
    print("ready", flush=True)
    time.sleep(600)
with Watchdog(RunConfig(), Ranks(0, 1, 0, torch.device("cpu"))):
    here_it_is()
"""
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    wait_for(lambda: "here_it_is" in log.read_text())
    assert process.poll() is None
    process.kill()
    process.wait(timeout=60)
