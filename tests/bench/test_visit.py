"""A visit's stages are commands that exist, and its runner loses nothing: limits, cuts, tools that are missing."""

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from bench import record
from bench.kernels.case import PLAIN
from bench.kernels.measure import BENCHES
from bench.visit import __main__ as command
from bench.visit import launch_configs, step_profile, visit
from bench.visit.stages import PYTEST, SECONDS, SPARE, STAGES, Stage, longest, stretch
from bench.visit.visit import LAST_WORDS, Visit
from bench.workload import step_config
from fastdino import cli, distributed
from fastdino.training.throughput.bench import Bench
from tests.bench.conftest import Python
from tests.children import wait_for

MARKERS = {
    text.split(":")[0]
    for text in tomllib.loads((record.ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
}


class Parsed(Exception):
    """A command has understood its arguments."""


def parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives ``text`` to the command's own parser; raises Parsed when it is understood, SystemExit when it is not."""
    module, *arguments = shlex.split(text.format(seconds=100, work="work", out="out", turn="turn"))

    def stop(*args: object) -> None:
        raise Parsed

    def parse(parser: argparse.ArgumentParser) -> None:
        original(parser, arguments)
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr("sys.argv", [module, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    if module == "fastdino":  # its parser is tyro's
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", original)
        monkeypatch.setattr(cli, "train", stop)
        monkeypatch.setattr(Bench, "__call__", stop)
    runpy.run_module(module, run_name="__main__")


def of_project(text: str) -> str:
    """The part of a command after ``python -m``."""
    return text.split("python -m ")[1]


ARGUMENTS = [(s.name, of_project(s.command)) for s in STAGES if of_project(s.command).startswith(("bench", "fastdino"))]
TESTS = [(s.name, of_project(s.command)) for s in STAGES if of_project(s.command).startswith("pytest")]


@pytest.mark.parametrize("text", dict(ARGUMENTS).values(), ids=dict(ARGUMENTS))
def test_every_stage_is_a_command_that_exists(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Parsed):
        parsed(text, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "bench.step --arch vit_small --no-such-flag",
        "bench.kernels --only no_such_kernel",
        "fastdino train vit_small_16 --run.no-such-flag 1",
        "fastdino train no_such_recipe",
    ],
)
def test_a_renamed_flag_would_be_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as error:
        parsed(text, monkeypatch)
    assert error.value.code == 2


@pytest.mark.parametrize("text", dict(TESTS).values(), ids=dict(TESTS))
def test_every_stage_of_tests_finds_some(text: str, python: Python) -> None:
    arguments = shlex.split(text)
    if "-m" in arguments:
        assert set(arguments[arguments.index("-m") + 1].split()) - {"not", "and"} <= MARKERS
    done = python("-m", *arguments, "--collect-only", "-q", "--assert=plain")  # no assertion is to explain itself
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_other_stages_are_modules_without_arguments() -> None:
    others = [of_project(s.command) for s in STAGES if s.name not in dict(ARGUMENTS).keys() | dict(TESTS).keys()]
    assert set(others) == {"torch.utils.collect_env", "tests.kernels.calls"}
    assert all(importlib.util.find_spec(module) for module in others)
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_limits_add_up() -> None:
    names = [stage.name for stage in STAGES]
    first = STAGES[: names.index("step-vit_large") + 1]
    assert longest(first) == SECONDS, "the default length is what the tests and the most valuable figures may take"
    assert stretch(STAGES, SECONDS) == 1, "a short visit leaves stages out rather than cut all of them"
    for seconds in (longest(STAGES), 1800):
        assert SPARE + stretch(STAGES, seconds) * (longest(STAGES) - SPARE) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("operation", "shape"), [("dino_loss", "3,2,2,100"), ("sinkhorn", "8,100"), ("ibot_loss", "4,600")]
)
def test_other_launch_configurations_reach_the_kernel_and_are_right(
    operation: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdino_kernels._backend.INTERPRETED", True)
    case = BENCHES[operation].case(shape, torch.device("cpu"), compiled=False)
    tried = launch_configs.with_alternatives(case)
    assert len(tried.variants) > 4
    launched = set()
    original = InterpretedFunction.__getitem__

    def launch(kernel: Any, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            launched.add(f"{kernel.fn.__name__} {kwargs}")
            original(kernel, grid)(*args, **kwargs)

        return run

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launch)
    expected, *others = (v.bind(case.make(0))() for name, v in tried.variants.items() if name != PLAIN)
    for results in others:
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
    assert len(launched) > len(tried.variants) - 2, "each was launched in its own way"


def test_a_profile_accounts_for_the_step() -> None:
    """On a CPU operators stand for kernels: on one thread they take no longer than the step."""
    with distributed.init("cpu") as ranks:
        speed, total, *kernels = step_profile.profile(step_config("vit_nano", ranks.device, batch=2), ranks)
    assert "at batch 2, MFU" in speed
    launches, busy, wall = (float(number) for number in re.findall(r"[\d.]+", total))
    assert launches > 500
    assert 0.3 * wall < busy < wall
    times = [float(line.split()[0]) for line in kernels]
    assert times == sorted(times, reverse=True)
    assert sum(times) <= busy


def test_list_needs_no_gpu_and_names_every_stage(python: Python) -> None:
    done = python("-m", "bench.visit", "--list", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == [stage.name for stage in STAGES]
    few = python("-m", "bench.visit", "--list", "--only", "kernels,tests", CUDA_VISIBLE_DEVICES="")
    assert [line.split()[0] for line in few.stdout.splitlines()[:-1]] == ["tests", "kernels"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [([], "torch sees no GPU"), (["--only", "kernel"], "no stage kernel"), (["5"], "10 seconds are needed")],
)
def test_what_cannot_run_is_one_message(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.visit", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        command.main()
    assert error.value.code == 2
    assert word in capsys.readouterr().err


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's bench/results/ with one file, from before the visit."""
    folder = tmp_path / "bench/results"
    folder.mkdir(parents=True)
    (folder / "old.json").write_text("{}")
    monkeypatch.setattr(visit, "RESULTS", folder)
    monkeypatch.setattr(visit, "ROOT", tmp_path)
    monkeypatch.setattr(visit, "commit", lambda: "0" * 40)
    return folder


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_visit_keeps_what_was_found(results: Path, tmp_path: Path) -> None:
    out, child = tmp_path / "out", tmp_path / "child"
    stages = [
        Stage("right", "sh -c 'echo a figure; echo no figure; echo {{}} > bench/results/new.json'", 5, shows="^a"),
        Stage("packed", "sh -c 'tar tzf {out}/visit.tar.gz; test -s {out}/summary.txt'", 5),
        Stage("wrong", "sh -c 'echo reason; exit 3'", 5, shows="figure"),
        Stage("hangs", f"sh -c 'sleep 60 & echo $! > {child}; echo begun; wait'", 1),
        Stage("absent", "no-such-tool", 5),
        Stage("absent too", "env A=1 no-such-tool", 5),
        Stage("late", "true", 10_000),
        Stage("last", "python -c 'import bench, fastdino_kernels'", 20),
    ]
    done = Visit(stages, SPARE + 60, out)
    assert not done.run()
    assert done.states["right"] == done.states["packed"] == done.states["last"] == visit.OK
    assert done.states["wrong"] == "FAILED with code 3"
    assert done.states["hangs"] == "STOPPED at 1 s"
    assert [name for name, state in done.states.items() if state.startswith(visit.SKIPPED)] == [
        "absent", "absent too", "late",
    ]  # fmt: skip
    wait_for(lambda: gone(int(child.read_text())), 5)  # what a stage has started ends with it
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines[1:3] == ["== right: ok, 0 s", "   a figure"]
    assert "   reason" in lines, "the end of a log that tells of a failure"
    with tarfile.open(out / "visit.tar.gz") as tar:
        names = tar.getnames()
    assert "bench/results/new.json" in names
    assert "bench/results/old.json" not in names
    packed = (done.work / "packed.log").read_text()
    assert "bench/results/new.json" in packed, "after every stage, not at the end"


def test_a_stage_of_tests_that_takes_too_long_says_why_one_failed(results: Path, tmp_path: Path) -> None:
    tests = "import time\ndef test_wrong():\n    assert False, 'the reason'\ndef test_long():\n    time.sleep(100)\n"
    (tmp_path / "test_some.py").write_text(tests)
    limit = LAST_WORDS + 20  # time for two workers to start and the first test to fail, on a machine that is busy
    stages = [Stage("tests", f"{PYTEST} -n 2 test_some.py", limit, shows="^x")]
    done = Visit(stages, SPARE + limit, tmp_path / "out")
    assert not done.run()
    assert done.states["tests"] == "FAILED with code 124"
    assert "AssertionError: the reason" in (tmp_path / "out/summary.txt").read_text()


def test_lanes_run_side_by_side_and_before_what_is_timed(results: Path, tmp_path: Path) -> None:
    """Each of two lanes waits for the other's file; the stage alone sees both."""
    meet = "sh -c 'touch {{work}}/{0}; until test -e {{work}}/{1}; do sleep 0.05; done'"
    stages = [
        Stage("alone", "sh -c 'test -e {work}/second'", 60),
        Stage("a", meet.format("first", "second"), 60, "x"),
        Stage("b", meet.format("second", "first"), 60, "y"),
        Stage("c", "sh -c 'test -e {work}/first'", 60, "x"),
    ]
    done = Visit(stages, SPARE + 300, tmp_path / "out")
    assert done.run(), done.states
    assert list(done.states)[-1] == "alone"


def test_a_stage_that_begins_early_waits_for_its_turn(results: Path, tmp_path: Path) -> None:
    """Beside the lanes; the second one when the first is over; one that has no turn any more is stopped."""
    began, early = tmp_path / "began", "sh -c 'echo {0} >> {1}; until test -e {{turn}}; do sleep 0.05; done; cat {1}'"
    stages = [
        Stage("first", early.format("first", began), 60),
        Stage("alone", f"sh -c 'cat {began}; sleep 1'", 60),
        Stage("lane", f"sh -c 'until test -e {began}; do sleep 0.05; done; sleep 1; cat {began}'", 60, "x"),
        Stage("second", early.format("second", began), 60),
        Stage("third", f"sh -c 'echo $$ > {tmp_path}/third; sleep 600 {{turn}}'", 60_000),
    ]
    done = Visit(stages, SPARE + 300, tmp_path / "out")
    assert done.run(), done.states
    assert done.states["third"].startswith(visit.SKIPPED)
    wait_for(lambda: gone(int((tmp_path / "third").read_text())), 5)
    seen = {stage.name: (done.work / f"{stage.name}.log").read_text().split("\n", 1)[1] for stage in stages[:4]}
    assert seen == {"lane": "first\n", "first": "first\n", "alone": "first\nsecond\n", "second": "first\nsecond\n"}


def test_a_visit_that_is_ended_ends_its_stages(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import signal, sys
from pathlib import Path
from bench.visit import visit
from bench.visit.stages import Stage
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
stages = [Stage("a", "sh -c 'echo $$ > {child}.part; mv {child}.part {child}; sleep 60'", 600, "x")]
visit.Visit([*stages, Stage("b", "true", 1)], 700, Path({str(tmp_path / "out")!r})).run()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=record.ROOT)
    while not child.exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143
    wait_for(lambda: gone(int(child.read_text())), 5)
