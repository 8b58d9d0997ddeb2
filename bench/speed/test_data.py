"""Images to views on the processor, beside torchvision and, where it is installed, DALI: each stage, then loaders.

The pixels are compared with torchvision's before anything is timed. A round is a few images, or batches of a warm
loader; of loaders, whose work is done by other processes, it is wall time.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import data
from bench.kernels.case import OURS
from bench.peers import dali
from bench.peers import views as peers
from bench.speed.turns import Seconds, Turns, label
from bench.timing import Clock
from fastdino.config import ConfigError, ViewsConfig
from fastdino.data.views import implementation

SIZES = data.Sizes(images=8, per_round=4, batch=2)
VIEWS = ViewsConfig()
WORKERS = 1
STAGES = {  # as bench.data.stage_ways has them
    "for the device": [OURS, data.REFERENCE],
    "decode": [OURS, data.PEER, data.TENSORS],
    "views": [OURS, data.REFERENCE, data.SAME, data.PEER, data.TENSORS],
    "decode and views": [OURS, data.REFERENCE, data.PEER, data.TENSORS],
}
LOADERS = [OURS, data.PEER, data.DALI]
WAYS = [(stage, name) for stage, names in STAGES.items() for name in names]


@dataclass(frozen=True)
class Files:
    """JPEG files in a folder, and the ways to go through each stage with them."""

    folder: Path
    paths: list[Path]
    stages: dict[str, dict[str, data.Way]]


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    try:
        implementation("fast")
    except ConfigError as error:  # without a C compiler it is not built
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as folder:
        paths = data.make_files(Path(folder), SIZES)
        data.check(paths, VIEWS)
        stages = data.stage_ways(Path(folder), paths, VIEWS)
        assert {stage: list(ways) for stage, ways in stages.items()} == STAGES
        yield Files(Path(folder), paths, stages)


@pytest.mark.benchmark(timer=time.process_time, disable_gc=True)
@pytest.mark.parametrize(("stage", "name"), WAYS, ids=[f"{label(stage)}-{label(name)}" for stage, name in WAYS])
def test_data(stage: str, name: str, files: Files, timed: Turns) -> None:
    peers.seed_all(1)
    ways = files.stages[stage]
    works = {key: data.way_work(ways[key], SIZES.per_round) for key in dict.fromkeys([OURS, name])}
    timed.begin(f"data, {stage}", name)
    seconds = timed(name, works, Clock(data.CPU))
    _tell(timed, SIZES.per_round, seconds, name)


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("name", LOADERS, ids=label)
def test_data_loader(name: str, files: Files, timed: Turns) -> None:
    if name == data.DALI and (why := dali.why_not()):
        pytest.skip(f"{name}: {why}")
    loaders = data.loader_ways(files.folder, files.paths, VIEWS, SIZES.batch, WORKERS)
    count, ours = SIZES.batches * WORKERS, []
    running = ExitStack()

    def setup() -> tuple[tuple[Iterator[object], int], dict[str, Any]]:
        with loaders[OURS]() as batches:
            started = time.perf_counter()
            data.take(batches, count)
            ours.append(time.perf_counter() - started)
        return (running.enter_context(loaders[name]()), count), {}

    timed.begin(f"data, loader, {WORKERS} worker", name)
    timed.benchmark.pedantic(data.take, setup=setup, teardown=lambda *_: running.close(), rounds=timed.min_rounds)
    running.close()  # --benchmark-disable calls no teardown
    if timed.benchmark.enabled:
        _tell(timed, count * SIZES.batch, timed.end(name, {OURS: ours} if name != OURS else {}), name)


def _tell(timed: Turns, images: int, seconds: Seconds, name: str) -> None:
    if seconds:
        timed.benchmark.extra_info["images_per_second"] = images / statistics.median(seconds[name])
