"""What test_stragglers.py judges: trainings on two ranks, one of which is not like the other."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastdino
from fastdino import agreement
from fastdino.config import UserError
from fastdino.model import Network
from fastdino.training.monitoring import stragglers
from tests.training.test_trainer import tiny


class Looks:
    """A clock that a second passes for each look at it, so that every part of a step takes one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@contextmanager
def clocks(longer: float, since: int) -> Iterator[None]:
    """A part takes a second; the student's forward passes ``longer``, from the ``since``th on."""
    looks, forward, passes = Looks(), Network.forward, 0

    def slowly(self: Network, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        if torch.is_grad_enabled():
            passes += 1
            looks.now += longer * (passes >= since)
        return forward(self, *args, **kwargs)

    with mock.patch.object(stragglers, "clock", looks), mock.patch.object(Network, "forward", slowly):
        yield


def cases(rank: int) -> dict[str, Any]:
    """By name what is different on a rank."""
    now, runs = time.time, agreement.what_runs()
    old, changed = ({**runs, **other} if rank else runs for other in ({"torch": "2.10.0"}, {"code": "another"}))
    return {
        "equal": clocks(0.0, 1),
        "slow": clocks(0.5 * rank, 2),
        "once": clocks(0.5 * rank, 9),  # the last two steps of ten
        "version": mock.patch.object(agreement, "what_runs", return_value=old),
        "code": mock.patch.object(agreement, "what_runs", return_value=changed),
        "clock": mock.patch.object(time, "time", side_effect=lambda: now() + 30 * rank),
    }


def main(folder: Path) -> None:
    """Writes what this rank has said to ``folder``/RANK.json."""
    rank = int(os.environ["RANK"])
    said: list[str] = []
    logger, handler = logging.getLogger("fastdino"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    found = {}
    for name, difference in cases(rank).items():
        said.clear()
        error = ""
        with difference:
            try:
                fastdino.train(tiny(folder / name, run__local_batch=4, engine__name="torch"))
            except UserError as refusal:
                error = f"{refusal.exit_code}: {refusal}"
        found[name] = {"said": [*said], "error": error}
    (folder / f"{rank}.json").write_text(json.dumps(found))
