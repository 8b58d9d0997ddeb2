"""Feeds pytest-benchmark with series that were measured interleaved, and writes its JSON with our provenance."""

import traceback
from typing import Any

import pytest
import torch

from bench.kernels.case import first_line
from bench.kernels.measure import COPY, ROUNDS, Failed, Measured, NoRoom, make_cases, measure
from bench.record import provenance


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench.kernels")
    group.addoption("--only", default=None)
    group.addoption("--shapes", default="")
    group.addoption("--rounds", type=int, default=None)
    group.addoption("--device", default="cpu")
    group.addoption("--no-compile", action="store_true")
    group.addoption("--sweep", action="store_true")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each variant of each case."""
    option = metafunc.config.getoption
    device = torch.device(option("--device"))
    compiled, sweep = not option("--no-compile"), option("--sweep")
    cases = make_cases(option("--only"), option("--shapes").split(), device, compiled, sweep)
    pairs = [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in [*case.variants, COPY]]
    metafunc.parametrize(("case", "variant"), pairs)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Any:
    """Measures a case when the first of its variants asks for it."""
    device = torch.device(request.config.getoption("--device"))
    rounds = request.config.getoption("--rounds") or ROUNDS[device.type]
    found: dict[str, Measured | Exception] = {}

    def of(case: Any) -> Measured:
        if case.name not in found:
            try:
                found[case.name] = measure(case, device, rounds)
            except (AssertionError, NoRoom) as error:
                found[case.name] = error.with_traceback(None)  # which would keep the case's tensors
            except Exception as error:
                traceback.print_exc()
                found[case.name] = Failed(first_line(error))  # its causes would keep them too
        result = found[case.name]
        if isinstance(result, Exception):
            raise result
        return result

    return of


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return provenance(torch.device(config.getoption("--device")), "bench.kernels")


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    where = provenance(torch.device(config.getoption("--device")), "bench.kernels")
    return {"id": where["commit"], "dirty": where["dirty"]}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """The statistics are enough; the rounds and the options that were not used go."""
    for entry in output_json["benchmarks"]:
        del entry["stats"]["data"], entry["options"], entry["params"]
