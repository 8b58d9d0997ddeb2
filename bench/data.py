"""Images per second and core: reading a JPEG, making its views, both, what views by the device leave to a core, and a
loader with workers; torchvision v2 beside, and DALI as a loader where it is installed (nvidia-dali-cuda130).

The files are made here: photographs they are not, but as large and as hard to decode. ``python -m bench.data`` writes
bench/results/data-cpu.json. Both of our implementations must equal torchvision's pixels, drawn alike, before anything
is timed. FASTDINO_SIMD=avx2 measures the fast one with a narrower instruction set than the processor's widest.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.peers import dali
from bench.peers import views as peers
from bench.record import positive, provenance, result_path, write
from bench.timing import Clock, Work, interleave, paired_ratio
from fastdino.config import Config, DataConfig, RunConfig, ViewsConfig
from fastdino.data import FolderSource, train_batches
from fastdino.data.makers import Decoded
from fastdino.data.views import Write, implementation, new_views, sample_params
from fastdino.data.workers import TOGETHER

OURS, REFERENCE = "fastdino", "fastdino, reference"
SAME, PEER, TENSORS, DALI = "torchvision, same draws", "torchvision", "torchvision, tensors", "DALI"
CPU = torch.device("cpu")
QUALITY = 90
DEVIATIONS = 5.0  # by which the averages over our views and a peer's, whose draws are others, may differ


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    images: int = 64
    width: int = 500  # ImageNet's most common size
    height: int = 375
    rounds: int = 30
    per_round: int = 8  # images; the draws of one decide what it costs
    batch: int = 16
    loader_rounds: int = 5
    batches: int = 4  # of each worker, that are timed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--workers", type=positive, nargs="+", help="default: 1, 2, 4, ... up to the cores")
    parser.add_argument("--rounds", type=positive, default=Sizes.rounds)
    parser.add_argument("--out", type=Path, help="default: bench/results/data-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    workers = options.workers or sorted({min(2**i, cores) for i in range(cores.bit_length() + 1)})
    document = measure(Sizes(rounds=options.rounds), ViewsConfig(), workers)
    where = {**provenance(CPU, "bench.data"), "views": implementation("fast")[1]}
    write(options.out or result_path("data", CPU), {"provenance": where, **document})
    for stage, contenders in document["stages"].items():
        for name, f in contenders.items():
            print(f"{stage:18} {name:26} {f['images_per_second']:8.1f} images/s  x {f['times_ours']['median']:.3f}")
    return 0


def measure(sizes: Sizes, views: ViewsConfig, workers: list[int]) -> dict[str, Any]:
    """All figures. Raises AssertionError, and times nothing, where pixels differ; ConfigError if fast is not built."""
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), sizes)
        check(paths, views)
        stages = {name: _stage(ways, sizes) for name, ways in stage_ways(Path(folder), paths, views).items()}
        for count in workers:
            stages[f"loader, {count} worker{'s' * (count > 1)}"] = _loaders(Path(folder), paths, views, sizes, count)
        num_bytes = statistics.mean(path.stat().st_size for path in paths)
    files = {"count": sizes.images, "width": sizes.width, "height": sizes.height, "mean_bytes": num_bytes}
    shown = f"2 x {views.global_size} + {views.num_local} x {views.local_size}"
    return {"files": files, "views": shown, "batch": sizes.batch, "stages": stages}


def make_files(folder: Path, sizes: Sizes) -> list[Path]:
    """JPEG files: smooth colours, edges and noise that differ from image to image."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(sizes.images):
        smooth, edges, noise = (
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize((sizes.width, sizes.height), kind)
            for shape, kind in (
                ((6, 8, 3), Image.Resampling.BICUBIC),
                ((40, 53, 3), Image.Resampling.NEAREST),
                ((sizes.height, sizes.width, 3), Image.Resampling.NEAREST),
            )
        )
        image = Image.blend(Image.blend(smooth, edges, 0.2), noise, 0.25)
        paths.append(folder / f"{index:04d}.jpg")
        image.save(paths[-1], quality=QUALITY)
    return paths


def check(paths: list[Path], config: ViewsConfig) -> None:
    """Same draws, same pixels; and torchvision's own draws give views of our sizes, means and deviations."""
    ours: list[list[Tensor]] = []
    for index, path in enumerate(paths):
        image = peers.read_pil(path)
        params = sample_params(0, 0, index, config, image.size)
        theirs = peers.same_draws(image, params, config)
        for name in ("reference", "fast"):
            ours[index:] = [_views(implementation(name)[0], np.asarray(image), params, config)]
            for number, (a, b) in enumerate(zip(ours[index], theirs, strict=True)):
                assert torch.equal(a, b), f"no figure: view {number} of image {index} by {name} is not torchvision's"
    peers.seed_all(0)
    for name, theirs in _of_peers(paths, config).items():
        assert [x.shape for x in theirs[0]] == [x.shape for x in ours[0]], (
            f"no figure: {name} makes views of other sizes"
        )
        for of in (torch.mean, torch.std):
            want, got = (np.array([float(of(view.float())) for image in v for view in image]) for v in (ours, theirs))
            allowed = DEVIATIONS * math.sqrt((want.var() + got.var()) / len(want))
            assert abs(got.mean() - want.mean()) < allowed, (
                f"no figure: {of.__name__} of the views by {name} is {got.mean():.1f}, by us {want.mean():.1f}"
            )


def _of_peers(paths: list[Path], config: ViewsConfig) -> dict[str, list[list[Tensor]]]:
    """The views of every image by each library that draws for itself."""
    found = {}
    for name, read, tensors in ((PEER, peers.read_pil, False), (TENSORS, peers.read_tensor, True)):
        transform = peers.multi_crop(config, tensors=tensors)
        found[name] = [transform(read(path)) for path in paths]
    if not dali.why_not():
        (batch,) = itertools.islice(dali.loader(paths, config, len(paths), 1), 1)
        found[DALI] = [list(views) for views in zip(*batch, strict=True)]
    return found


def _views(write: Write, image: np.ndarray, params: Tensor, config: ViewsConfig) -> list[Tensor]:
    out = new_views(config)
    write(image, params, out)
    return [view for group in out.values() for view in group]


Way = Callable[[int], object]  # what is done with image number ``index``, counted without end


def stage_ways(folder: Path, paths: list[Path], config: ViewsConfig) -> dict[str, dict[str, Way]]:
    """The ways to go through each stage, which one process goes alone."""
    source, count = FolderSource(folder), len(paths)
    images = [peers.read_pil(path) for path in paths]
    arrays, pixels = [np.asarray(image) for image in images], [peers.read_tensor(path) for path in paths]
    on_pil, on_tensors = (peers.multi_crop(config, tensors=tensors) for tensors in (False, True))
    ours = {OURS: implementation("fast")[0], REFERENCE: implementation("reference")[0]}

    config_of_slots = Config(views=config, data=DataConfig(views="device"), run=RunConfig(local_batch=TOGETHER))
    maker = Decoded(config_of_slots, source)
    slot = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in maker.fields.items()}

    def decode_into_slot(index: int) -> None:
        """Of so many at once, with the last of them."""
        if index % TOGETHER == TOGETHER - 1:
            keys = [(index // count, i % count) for i in range(index - TOGETHER + 1, index + 1)]
            maker.make(slot, 0, keys, lambda _: None)

    def params(index: int) -> Tensor:
        return sample_params(0, index // count, index % count, config, images[index % count].size)

    def make(write: Write, image: np.ndarray, index: int) -> list[Tensor]:
        return _views(write, image, params(index), config)

    return {
        "for the device": {
            OURS: decode_into_slot,
            REFERENCE: lambda i: make(ours[REFERENCE], source.read(i % count)[0], i),
        },
        "decode": {
            OURS: lambda i: source.read(i % count),
            PEER: lambda i: peers.read_pil(paths[i % count]),
            TENSORS: lambda i: peers.read_tensor(paths[i % count]),
        },
        "views": {
            **{name: lambda i, write=write: make(write, arrays[i % count], i) for name, write in ours.items()},
            SAME: lambda i: peers.same_draws(images[i % count], params(i), config),
            PEER: lambda i: on_pil(images[i % count]),
            TENSORS: lambda i: on_tensors(pixels[i % count]),
        },
        "decode and views": {
            **{name: lambda i, write=write: make(write, source.read(i % count)[0], i) for name, write in ours.items()},
            PEER: lambda i: on_pil(peers.read_pil(paths[i % count])),
            TENSORS: lambda i: on_tensors(peers.read_tensor(paths[i % count])),
        },
    }


def _stage(ways: dict[str, Way], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Processor time of one thread, in turns; all go through the same images."""
    peers.seed_all(1)
    works = {name: way_work(way, sizes.per_round) for name, way in ways.items()}
    seconds, _ = interleave(works, sizes.rounds, Clock(CPU))
    return _figures(seconds, sizes.per_round, cores=1)


def way_work(way: Way, per_round: int) -> Work:
    """Goes through ``per_round`` other images in each round."""

    def run(index: int) -> None:
        for number in range(per_round):
            way((index + 3) * per_round + number)  # rounds that warm up count from -3

    return Work(run)


def _loaders(
    folder: Path, paths: list[Path], views: ViewsConfig, sizes: Sizes, workers: int
) -> dict[str, dict[str, Any]]:
    """Wall time between batches that nobody waits to use, once what was made ahead is taken."""
    timed = sizes.batches * workers
    loaders = loader_ways(folder, paths, views, sizes.batch, workers)
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for index in range(sizes.loader_rounds):
        for name in list(loaders) if index % 2 else reversed(loaders):
            with loaders[name]() as batches:
                started = time.perf_counter()
                take(batches, timed)
                seconds[name].append(time.perf_counter() - started)
    return _figures(seconds, timed * sizes.batch, cores=workers)


def loader_ways(
    folder: Path, paths: list[Path], views: ViewsConfig, batch: int, workers: int
) -> dict[str, Callable[[], AbstractContextManager[Iterator[object]]]]:
    """Loaders by name. Entering one starts it and takes what it made ahead; it yields batches without end."""
    ways = {
        OURS: lambda: _ours(folder, views, batch, workers),
        PEER: lambda: _peer(peers.loader(paths, views, batch, workers)),
    }
    if not dali.why_not():
        ways[DALI] = lambda: _peer(dali.loader(paths, views, batch, workers))

    @contextmanager
    def started(way: Callable[[], AbstractContextManager[Iterator[object]]]) -> Iterator[Iterator[object]]:
        with way() as batches:
            take(batches, 2 * workers + 1)
            yield batches

    return {name: partial(started, way) for name, way in ways.items()}


def take(batches: Iterator[object], count: int) -> None:
    """Takes so many and drops them."""
    for _ in itertools.islice(batches, count):
        pass


@contextmanager
def _ours(folder: Path, views: ViewsConfig, batch: int, workers: int) -> Iterator[Iterator[object]]:
    config = Config(
        views=views, data=DataConfig(root=str(folder), num_workers=workers), run=RunConfig(local_batch=batch)
    )
    batches = train_batches(config, FolderSource(folder), rank=0, world_size=1, start_step=0, device=CPU)
    yield batches
    batches.close()


@contextmanager
def _peer(loader: Iterable[object]) -> Iterator[Iterator[object]]:
    batches = (x for x in loader)
    yield batches
    batches.close()  # drops its iterator, which ends its workers


def _figures(seconds: dict[str, list[float]], images: int, cores: int) -> dict[str, dict[str, Any]]:
    figures = {}
    for name, series in seconds.items():
        rate = images / statistics.median(series)
        ratio = asdict(paired_ratio(series, seconds[OURS]))
        figures[name] = {"images_per_second": rate, "per_core": rate / cores, "times_ours": ratio}
    return figures


if __name__ == "__main__":
    sys.exit(main())
