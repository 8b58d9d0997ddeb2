"""Commands of bench as a user runs them: in a process of their own, without Triton's interpreter."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        process = children.start([said, said], {}, children.python, *arguments)
        try:
            while not ready():
                assert process.is_alive(), said.read_text()
                assert time.monotonic() < until, "it was never ready"
                time.sleep(0.05)
        finally:
            process.kill()
            process.join()


@pytest.fixture
def python() -> Python:
    return run_python
