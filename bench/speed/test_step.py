"""A training step of fastdino beside its other engines and the public peer. On a CPU nothing is compiled."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.kernels.case import OURS
from bench.peers.contenders import build, check, counted, usual
from bench.speed.turns import DEVICE, Turns, device_seconds, label, room
from bench.step import NUM_BATCHES, speed
from bench.timing import Clock, paired_ratio
from bench.workload import random_batch, step_config
from fastdino import distributed
from fastdino.distributed import Ranks
from fastdino.training.flops import matmul_flops

pytestmark = pytest.mark.benchmark(timer=device_seconds, disable_gc=True)
ARCH = {"cuda": "vit_small", "cpu": "vit_nano"}[DEVICE.type]
NAMES = [OURS, *(name for name in usual(DEVICE) if DEVICE.type == "cuda" or "compile" not in name)]


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with distributed.init("cuda" if DEVICE.type == "cuda" else "cpu") as ranks:
        yield ranks


@pytest.fixture
def ranks(group: Ranks) -> Iterator[Ranks]:
    """Without what the case before has left in memory."""
    yield group
    group.release()
    gc.collect()


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock(DEVICE)


@pytest.fixture(scope="module")
def peak_flops(clock: Clock) -> float:
    return matmul_flops(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32, clock)


@pytest.mark.parametrize("name", NAMES, ids=[f"{ARCH}-{label(name)}" for name in NAMES])
def test_step(name: str, ranks: Ranks, timed: Turns, clock: Clock, peak_flops: float, tmp_path: Path) -> None:
    config = step_config(ARCH, DEVICE)
    batches = [random_batch(config, DEVICE, seed) for seed in range(NUM_BATCHES)]
    with room(name):
        made = build(config, ranks, tmp_path, list(dict.fromkeys([OURS, name])))
        losses = check(made, batches, config.engine.precision)
        works = {key: contender.work(batches) for key, contender in made.items()}
        timed.begin(f"step {ARCH}", name)
        seconds = timed(name, works, clock, hide_launches=False)
        if seconds:
            info = timed.benchmark.extra_info
            info.update(speed(config, seconds[name], paired_ratio(seconds[name], seconds[OURS]), peak_flops))
            info.update(counted(made[name], name, batches[0]), losses=losses[name], fallback=made[name].fallback)
