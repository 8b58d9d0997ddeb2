"""Commands of bench as a user runs them: in a process of their own, without Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from bench.record import ROOT, python_path

Python = Callable[..., subprocess.CompletedProcess[str]]


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs python with the arguments given, and environment variables by name."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": python_path(), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def python() -> Python:
    return run_python
