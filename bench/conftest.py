"""``pytest bench``: what pytest-benchmark is told of this machine, and the fixture that times a case."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from bench.record import UNKNOWN, commit, device_name
from bench.speed.turns import DEVICE, Turns

SMOKE = (
    "bench: a smoke run. This is a CPU: small shapes, one thread, processor time, the kernels' references, and nothing "
    "compiled. The figures are not those of a GPU."
)
PEERS = ("lightly", "timm", "torchvision", "kornia")  # others are left out where they are missing


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "bench: pytest-benchmark times it, and it is not here: make install, and no -p no:benchmark"
        )
    if missing := [name for name in PEERS if find_spec(name) is None]:
        raise pytest.UsageError(f"bench: to measure beside us, {', '.join(missing)} must be installed: make install")


@pytest.fixture(scope="session")
def alternatives() -> dict[str, dict[str, Any]]:
    return {}


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest, alternatives: dict[str, dict[str, Any]]) -> Turns:
    """Times a case; see :class:`bench.speed.turns.Turns`."""
    option = request.config.getoption
    return Turns(benchmark, float(option("benchmark_max_time")), option("benchmark_min_rounds"), alternatives)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a comparison with figures of another device is warned of."""
    machine_info.update(device=device_name(DEVICE), torch=torch.__version__)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """A copy without git may say its commit in FASTDINO_COMMIT."""
    if (found := commit()) != UNKNOWN:
        commit_info["id"] = found


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if DEVICE.type == "cpu":
        terminalreporter.write_line(SMOKE)
