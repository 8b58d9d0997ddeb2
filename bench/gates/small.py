"""What the recipe ``small`` learns from 10,000 pictures of Fashion-MNIST, beside pixels and its own random start.

``python -m bench.gates.small --seeds 0 1 2`` writes the pictures as PNG files in class folders, trains the recipe once
for each seed, and records bench/results/small-cpu.json. ``--trial "--loss.koleo-weight 0"`` trains with other settings
instead and adds their figures to the file; the flags are those of ``fastdino train``. Runs that are there go on.

The pictures are the first 10,000 of Fashion-MNIST's training set and its 10,000 test pictures (Xiao et al. 2017), of
which figures of the first 2,000 stand beside. ``--validation`` judges by 6,000 others of the training set, on which
settings are chosen, and records bench/results/small-trials-cpu.json. Debian's package dataset-fashion-mnist puts its
files where ``--source`` looks; ``--write DIR`` unpacks 10,000 and 2,000 of its pictures and does no more.
"""

import gzip
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from bench.gates.trials import Case, arguments, record
from bench.record import RESULTS
from fastdino import recipes
from fastdino.cli import configured
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.source import Source
from fastdino.eval import Features, Knn, Reading, extract
from fastdino.eval.unlabelled.rank import rankme
from fastdino.files import whole_folder
from fastdino.model import build_network
from fastdino.training.export import run_backbone
from fastdino.training.trainer import train

# Folder: the name of its files, pictures taken.
SPLITS = {
    "train": ("train", range(10_000)),
    "test": ("t10k", range(10_000)),
    "val": ("train", range(10_000, 16_000)),
}
FIRST = 2_000  # test pictures whose figures stand beside those of all
KNN = Knn(neighbors=(5, 20))
BATCH = 256  # images per forward pass of an evaluation


def main() -> int:
    parser = arguments("small", __doc__)
    parser.add_argument("--validation", action="store_true", help="judge by pictures on which settings are chosen")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="only write train/ and the first 2,000 of test/ to DIR"
    )
    options = parser.parse_args()
    if options.write:
        with whole_folder(options.write, set()) as folder:
            write_pictures(options.source, folder, "test", FIRST)
        return 0
    judged, file = ("val", "small-trials-cpu.json") if options.validation else ("test", "small-cpu.json")
    pictures = options.dir / f"fashion-mnist-{judged}"
    if not pictures.exists():
        with whole_folder(pictures, set()) as folder:
            write_pictures(options.source, folder, judged)
    return record(
        "small",
        options,
        options.out or RESULTS / file,
        lambda: baselines(pictures),
        lambda flags, seed, folder: trial(flags, seed, pictures, folder),
    )


def write_pictures(source: Path, folder: Path, judged: str, most: int | None = None) -> None:
    """Class folders of PNG files below ``folder``/train and ``folder``/``judged``, from the files in ``source``.

    ``most``: of those that are judged the first so many.
    """
    for split in ("train", judged):
        stem, taken = SPLITS[split]
        pixels = read_idx(source / f"{stem}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz", header=8)
        for index in taken[:most] if split == judged else taken:
            path = folder / split / str(labels[index]) / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(path)


def read_idx(file: Path, header: int) -> np.ndarray:
    """uint8 numbers of a file of Fashion-MNIST after its header of so many bytes."""
    with gzip.open(file) as bytes_:
        return np.frombuffer(bytes_.read(), np.uint8, offset=header)


def baselines(pictures: Path) -> list[Case]:
    """Figures of pixels as features, and of pixels less each picture's mean, divided by its deviation."""

    def pixels(source: Source) -> Features:
        images, labels = zip(*(source.read(index) for index in range(len(source))), strict=True)
        return Features(
            torch.from_numpy(np.stack(images)).flatten(1) / 255, torch.tensor(labels), torch.arange(len(images))
        )

    def standardised(source: Source) -> Features:
        x, labels, index = pixels(source)
        return Features((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp_min(1e-6), labels, index)

    return [
        {"features": "pixels", "flags": "", "seed": None, **figures(pictures, pixels)},
        {"features": "pixels, standardised", "flags": "", "seed": None, **figures(pictures, standardised)},
    ]


def trial(flags: list[str], seed: int, pictures: Path, folder: Path) -> list[Case]:
    """Trains the recipe with ``flags``; figures of the random backbone that it starts from and of the teacher's."""
    own = ["--data.root", str(pictures / "train"), "--run.dir", str(folder), "--run.seed", str(seed)]
    config = configured("small", [*flags, *own])
    fresh = build_network(config, teacher=True).backbone
    result = train(config)
    reading = Reading(size=config.views.global_size, crop=config.data.eval_crop, normalize=config.data.normalize)

    def of(backbone: nn.Module) -> dict[str, float]:
        return figures(pictures, lambda source: extract(backbone, source, reading, batch=BATCH, num_workers=0))

    teacher = of(run_backbone(folder)[0])
    return [
        {"features": "random start", **of(fresh)},
        {"features": "teacher", **teacher, "steps": result.steps, "seconds": _seconds(folder)},
    ]


def _seconds(run: Path) -> float:
    """Of all steps of a run, whichever processes took them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    paces = [(line["step"], line["step_seconds"]) for line in lines if "step_seconds" in line]
    return sum((now - before) * pace for (before, _), (now, pace) in pairwise([(0, 0.0), *paces]))


def figures(pictures: Path, read: Callable[[Source], Features]) -> dict[str, float]:
    """k-NN accuracy in percent for each k, of all pictures that are judged and of the first; RankMe of the others."""
    sources = bank_and_test(str(pictures), recipes.get("small").data)[:2]
    bank, test = (read(source) for source in sources)
    first = torch.tensor([int(Path(sources[1].name(index)).stem) < FIRST for index in range(len(sources[1]))])
    found = KNN.accuracy(bank, test)
    if first.any():
        some = KNN.accuracy(bank, Features(*(x[first] for x in test)))
        found |= {f"first_{name}": score for name, score in some.items()}
    return {name: 100 * score for name, score in found.items()} | {"rankme": rankme(bank.vectors)}


if __name__ == "__main__":
    sys.exit(main())
