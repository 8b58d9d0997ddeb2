"""The record of a first step that compiles: what it trains, and when it says that equal blocks are compiled apart."""

import json
import os
import sys

import pytest
import torch

from bench.gates import first_step as room
from fastdino.engine.graphs import CACHES, compile_regions
from fastdino.model.vit import SIZES

CPU = torch.device("cpu")


def test_the_first_step_is_that_of_a_compiled_network_of_so_many_blocks(tmp_path, monkeypatch):
    compiled = []

    def traced(regions):
        compiled.extend(regions)
        compile_regions(regions, "eager")

    monkeypatch.setattr("fastdino.engine.graphs.compile_regions", traced)
    for cache in CACHES:
        monkeypatch.setenv(cache, "")  # nobody's wish, and so again after the test
    before, shape = torch._dynamo.utils.counters["stats"]["unique_graphs"], SIZES["tiny"]
    assert room.first_step(3, CPU, tmp_path) > 0
    assert sum(type(module).__name__ == "Block" for module, _ in compiled) == 6, "three of each network"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert all(os.environ[cache].startswith(str(tmp_path)) for cache in CACHES)
    assert SIZES["tiny"] == shape


@pytest.mark.parametrize(
    ("seconds", "says"),
    [({6: 40.0, 12: 41.0, 24: 45.0}, ""), ({6: 40.0, 12: 70.0, 24: 120.0}, "24 blocks take 3.00 times what 6 take")],
)
def test_equal_blocks_that_are_compiled_apart_are_named(tmp_path, monkeypatch, capsys, seconds, says):
    caches = []

    def alone(blocks, device, cache):
        warm = cache in caches
        caches.append(cache)
        return 9.0 if warm else seconds[blocks]

    monkeypatch.setattr(room, "_alone", alone)
    monkeypatch.setattr(sys, "argv", ["first_step", "--device", "cpu", "--out", str(tmp_path / "found.json")])
    assert room.main() == bool(says)
    assert says in capsys.readouterr().out
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert [(case["blocks"], case["cache"], case["seconds"]) for case in cases] == [
        (6, "cold", 40.0), (12, "cold", seconds[12]), (24, "cold", seconds[24]), (24, "warm", 9.0),
    ]  # fmt: skip
