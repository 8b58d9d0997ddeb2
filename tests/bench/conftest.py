"""Commands of bench as a user runs them: in a process of their own, without Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python() -> Python:
    """Runs python with the arguments given, and environment variables by name."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **variables}
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    return run
