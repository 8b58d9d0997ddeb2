"""A small set of very unequal classes, from no labels to fine-tuning: python -m bench.tables.longtail.

It writes a long tail of Fashion-MNIST (1,000 pictures of the first class, 10 of the last, 2,480 in all; Xiao et al.
2017) and its 10,000 test pictures, 1,000 of each class, as class folders; trains the recipe ``small`` on them without
labels; and runs the commands of docs/small-data.md one after another. Of a test set with as many pictures of each class
accuracy is balanced accuracy. Debian's package dataset-fashion-mnist puts its files where ``--source`` looks. What is
there goes on.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.gates.small import read_idx
from bench.record import RESULTS, ROOT, provenance, write
from fastdino.cli import configured
from fastdino.commands.evaluate import evaluate
from fastdino.eval.intervals import difference
from fastdino.eval.result import read_result, read_shares
from fastdino.files import whole_folder
from fastdino.training.trainer import train

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
LARGEST, RATIO = 1000, 100  # pictures of the first class, and how many times those of the last
LENGTH = "--run.epochs 12 --run.knn-every 6"
# What is done, and its command: from no label to all of them, and from frozen features to none.
STEPS = {
    "no label, clusters": "cluster",
    "5 labels of each class": "fewshot --shots 5",
    "all labels, k-NN": "knn",
    "all labels, logistic regression": "logreg",
    "its logits adjusted": "logreg --balance logit-adjust",
    "fine-tuned from the solved head": "finetune --balance logit-adjust --baselines no",
    "fine-tuned whole, from a new head": "finetune --mode full --balance logit-adjust --epochs 20 --baselines no",
}
HEADER = ["step", "`fastdino eval`", "balanced accuracy, %", "over the step before", "pixels", "random start"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables.longtail", description=__doc__)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--dir", type=Path, default=ROOT / "runs", help="pictures, run and results are in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "longtail-cpu.json", help="the file of results")
    options = parser.parse_args()
    pictures = options.dir / "fashion-mnist-longtail"
    if not pictures.exists():
        with whole_folder(pictures, set()) as folder:
            write_pictures(options.source, folder)
    run = options.dir / "longtail"
    flags = f"--data.root {pictures}/train --run.knn-root {pictures} --run.dir {run} {LENGTH}"
    result = train(configured("small", shlex.split(flags)))
    cases = [*steps(pictures, run, options.dir / "longtail-eval")]
    where = provenance(torch.device("cpu"), "bench.tables.longtail")
    counts = {path.name: len([*path.iterdir()]) for path in sorted((pictures / "train").iterdir())}
    write(options.out, {"provenance": where, "steps": result.steps, "counts": counts, "cases": cases})
    return 0


def sizes() -> list[int]:
    """Pictures of each class: falling by one factor from class to class."""
    return [round(LARGEST * RATIO ** (-c / (len(CLASSES) - 1))) for c in range(len(CLASSES))]


def write_pictures(source: Path, folder: Path) -> None:
    """``folder``/train and ``folder``/test: the first of each class, as many as :func:`sizes` says, and 1,000."""
    for split, stem, counts in (("train", "train", sizes()), ("test", "t10k", [1000] * len(CLASSES))):
        pixels = read_idx(source / f"{stem}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz", header=8)
        for number, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (folder / split / name).mkdir(parents=True)
            for index in np.flatnonzero(labels == number)[:count]:
                Image.fromarray(pixels[index]).save(folder / split / name / f"{index:05}.png")


def steps(pictures: Path, run: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Runs each command; its score, and by how much it exceeds that of the one before, by a paired bootstrap."""
    before = None
    for number, (step, command) in enumerate(STEPS.items()):
        kind, *flags = command.split()
        folder = out / str(number)
        if not (folder / f"{kind}.json").exists():
            evaluate([kind, str(run), "--data", str(pictures), "--out", str(folder), "--num-workers", "1", *flags])
        told, shares = read_result(folder / f"{kind}.json"), read_shares(folder / f"{kind}.json")
        name = next(name for name in ("balanced_accuracy", "accuracy") if name in told["scores"])
        gain = difference(shares, before).json() if before else None
        baselines = {name: score["value"] for name, score in told["baselines"].items()}
        seconds = told["made_by"]["seconds"]
        score = told["scores"][name]
        yield {"step": step, "command": command, "score": score, "gain": gain, **baselines, "seconds": seconds}
        before = shares


def caption(document: dict[str, Any]) -> str:
    """The command, and what it was given."""
    where, counts = document["provenance"], document["counts"].values()
    pictures = f"{sum(counts):,} training pictures, {max(counts):,} to {min(counts)} of a class"
    return f"`{where['command']}` on {where['device']}. {pictures}; {document['steps']:,} steps; "


def rows(document: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each step."""
    for case in document["cases"]:
        baselines = [f"{case[name]:.1f}" if name in case else "" for name in ("pixels", "random_init")]
        gain = _interval(case["gain"], "+") if case["gain"] else ""
        yield [case["step"], f"`{case['command']}`", _interval(case["score"]), gain, *baselines]


def _interval(score: dict[str, float], sign: str = "") -> str:
    value, low, high = (format(score[end], f"{sign}.1f") for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
