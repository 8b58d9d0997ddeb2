"""What ranks must have in common: what they run, and nearly the time. test_stragglers.py has two that train."""

import time
from typing import Any

import pytest
import torch

from fastdino import agreement
from fastdino.agreement import check_ranks, clock_offsets, off, refuse_others, what_runs
from fastdino.config import ConfigError
from fastdino.distributed import Ranks

RUNS = {"torch": "2.11.0", "code": "0a"}


class Gathered(Ranks):
    """Rank 0 of those whose clocks have shown these times before and after a barrier."""

    def __init__(self, *others: tuple[float, float]) -> None:
        super().__init__(0, 1 + len(others), 0, torch.device("cpu"))
        self.others = others

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_what_runs_changes_with_any_line_of_code(monkeypatch):
    before = what_runs()
    assert before["torch"] == torch.__version__.split("+")[0]
    assert what_runs() == before
    monkeypatch.setattr(agreement, "CODE", ("fastdino",))
    what_runs.cache_clear()
    assert what_runs()["code"] != before["code"]
    monkeypatch.undo()
    what_runs.cache_clear()
    assert what_runs() == before


def test_all_that_differs_is_said_of_the_first_rank():
    names = ["rank 0 (a)", "rank 1 (b)", "rank 2 (c)", "rank 3 (c)"]
    refuse_others(names, [RUNS] * 4)
    old = {"torch": "2.10.0", "code": "1b"}
    with pytest.raises(ConfigError, match=r"^rank 2 \(c\) runs torch 2.10.0, not 2.11.0 and code 1b, not 0a") as error:
        refuse_others(names, [RUNS, RUNS, old, old])
    assert "; other ranks that differ: 1. All" in str(error.value)
    with pytest.raises(ConfigError) as error:
        refuse_others(names, [RUNS, RUNS, RUNS, old])
    assert "other ranks" not in str(error.value)


def test_a_lone_process_agrees_with_itself(monkeypatch):
    monkeypatch.setattr(agreement, "what_runs", None)
    check_ranks(Ranks(0, 1, 0, torch.device("cpu")))


def test_a_host_that_is_slow_to_answer_has_no_wrong_clock(monkeypatch):
    """Its times lie far apart, but those of rank 0 are between them."""
    times = iter([100.0, 100.1])
    monkeypatch.setattr(time, "time", lambda: next(times))
    others = [(100.0, 100.1), (70.0, 100.2), (95.0, 95.1), (160.0, 160.2), (101.05, 101.1)]
    assert clock_offsets(Gathered(*others)) == pytest.approx([0.0, 0.0, 0.0, -4.9, 59.9, 0.0])
    assert off("rank 3 (b)", -4.9).startswith("the clock of rank 3 (b) is 4.9 s behind rank 0's: ")
