"""Commands of bench as a user runs them: in a process of their own, without Triton's interpreter."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from bench.record import ROOT
from tests.children import environment

Python = Callable[..., subprocess.CompletedProcess[str]]


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs python with the arguments given, and environment variables by name."""
    command, env = [sys.executable, *arguments], environment(**variables)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def python() -> Python:
    return run_python
