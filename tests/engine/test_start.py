"""Engines made from names and shapes: the same network at every stage and world size, and no rank that holds it all."""

from typing import Any

import pytest
import torch

from fastdino import distributed
from tests.engine import start_cases
from tests.engine.start_cases import starts
from tests.engine.test_engine import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each of two processes."""
    folder = tmp_path_factory.mktemp("start")
    launch(start_cases.main, folder / "two.pt", ranks=2, builds=folder / "builds")
    return torch.load(folder / "two.pt")


def test_two_processes_start_as_the_whole_network_at_every_stage(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["starts"]) == 10
        assert all(found["starts"].values()), found["starts"]


def test_so_does_one() -> None:
    with distributed.init("cpu") as one:
        found = starts(one, ("bf16",))
    assert all(found.values()), found


def test_a_run_that_will_be_loaded_makes_no_values(ranks: list[dict[str, Any]]) -> None:
    assert all(all(found["nothing"].values()) for found in ranks)


def test_no_rank_holds_the_whole(ranks: list[dict[str, Any]]) -> None:
    """At ZeRO 3: its share, and one parameter."""
    for found in ranks:
        memory = found["memory"]
        assert memory["params"] > 125e6
        assert memory["peak"] < memory["share"] + memory["largest"] + 64 * 2**20, memory
