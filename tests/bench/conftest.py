"""Commands of bench as a user runs them: in a process of their own, without Triton's interpreter."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from bench.record import ROOT
from tests import children
from tests.children import environment, forked

Python = Callable[..., subprocess.CompletedProcess[str]]


def run_python(*arguments: str, fresh: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs python with the arguments given, and environment variables by name.

    Args:
        fresh: by an interpreter of its own; else in a fork that has imported torch, which does not read them again.
    """
    if not fresh:
        return forked(children.python, *arguments, **variables)
    command, env = [sys.executable, *arguments], environment(**variables)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def kill_python_when(ready: Callable[[], bool], *arguments: str, seconds: float = 120) -> None:
    """Starts python as :func:`run_python` and kills it once ``ready``, as a machine does whose time is over."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    until = time.monotonic() + seconds
    try:
        while not ready():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, "it was never ready"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def python() -> Python:
    return run_python
