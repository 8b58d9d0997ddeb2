"""Small runs of batches, and the processes that make them."""

import os
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from fastdino.config import Config, DataConfig, EngineConfig, ModelConfig, RunConfig, ViewsConfig
from fastdino.data import Batch, Source, TrainBatches, train_batches

CPU = torch.device("cpu")


def make_config(
    num_workers: int = 0,
    local_batch: int = 4,
    accumulate: int = 1,
    max_bad: float = 1.0,
    num_local: int = 2,
    by: Literal["auto", "reference"] = "auto",
) -> Config:
    return Config(
        model=ModelConfig(patch_size=8),
        views=ViewsConfig(global_size=32, local_size=16, num_local=num_local),
        data=DataConfig(num_workers=num_workers, max_bad=max_bad, views=by),
        engine=EngineConfig(accumulate=accumulate),
        run=RunConfig(local_batch=local_batch, seed=3),
    )


def start(
    config: Config,
    source: Source,
    step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
) -> TrainBatches:
    return train_batches(config, source, rank=rank, world_size=world_size, start_step=step, device=device)


def take(count: int, *args, **options) -> list[Batch]:
    batches = start(*args, **options)
    found = list(islice(batches, count))
    batches.close()
    return found


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.views.keys() == b.views.keys()
        assert all(torch.equal(a.views[name], b.views[name]) for name in a.views)
        assert a.bad == b.bad


def children() -> set[int]:
    """Living processes that this one started."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in found if "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]}
