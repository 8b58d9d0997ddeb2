"""The demo: a small ViT learns, with no labels, to tell rendered shapes apart, and shows what it has learned."""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastdino.config import Config
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.benchmarks.masks import Masked, ShapeMasks
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.sources.source import Source
from fastdino.eval import Features, Knn, Reading, extract
from fastdino.eval.dense.attention_maps import attend, draw_sheet, jaccard
from fastdino.eval.features import our_vit
from fastdino.eval.pictures import SHEET_ROWS, new_figure
from fastdino.model import build_network
from fastdino.training.export import run_backbone
from fastdino.training.trainer import train

NUM_INITIALISATIONS = 5  # random backbones that the trained one is compared with
BATCH = 256  # images per forward pass of an evaluation
KNN = Knn(neighbors=(20,))
MASK_SEED = 2**31 + 103  # of shapes that are rendered for the attention maps alone
NUM_MASKS = 200


def run_demo(config: Config) -> dict[str, float]:
    """Trains ``config``, of rendered shapes, and writes summary.json, curves.png and attention.png in its folder.

    Returns the summary: ``seconds`` for everything; k-NN top-1 in percent of the teacher, of random backbones and of
    raw pixels; intersection over union of the attention with the object masks. Same config, same summary but for time.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)  # the same sums on any machine; a second core makes the views
    folder = config.run.dir
    train(config)
    teacher, _, _ = run_backbone(folder)
    fresh = [_random_backbone(config, seed) for seed in range(NUM_INITIALISATIONS)]
    bank, test, _ = bank_and_test("shapes", config.data)
    masks = ShapeMasks(ShapesSource(NUM_MASKS, config.data.image_size, MASK_SEED))
    sheet = folder / "attention.png"
    summary = {
        "knn_teacher": _knn(teacher, bank, test, config),
        "knn_random_init": statistics.mean(_knn(backbone, bank, test, config) for backbone in fresh),
        "knn_raw_pixels": _pixel_knn(bank, test, standardise=False),
        "knn_raw_pixels_standardised": _pixel_knn(bank, test, standardise=True),
        "attention_iou_teacher": _attention_iou(teacher, masks, config, sheet),
        "attention_iou_random_init": statistics.mean(_attention_iou(backbone, masks, config) for backbone in fresh),
    }
    _draw_curves(folder, summary)
    summary["seconds"] = time.perf_counter() - started
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(_table(summary, folder))
    return summary


def _random_backbone(config: Config, seed: int) -> nn.Module:
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
    return build_network(config, teacher=True).backbone


def _knn(backbone: nn.Module, bank: Source, test: Source, config: Config) -> float:
    reading = Reading(size=config.views.global_size, normalize=config.data.normalize)
    return _accuracy(*(extract(backbone, source, reading, batch=BATCH, num_workers=0) for source in (bank, test)))


def _accuracy(bank: Features, test: Features) -> float:
    (score,) = KNN.accuracy(bank, test).values()
    return 100 * score


def _pixel_knn(bank: Source, test: Source, standardise: bool) -> float:
    """k-NN on pixels as features: what needs no network at all."""

    def pixels(source: Source) -> Features:
        images, labels = zip(*(source.read(i) for i in range(len(source))), strict=True)
        x = torch.from_numpy(np.stack(images)).float() / 255  # (n, h, w, 3)
        if standardise:  # each channel of each image
            x = (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True).clamp_min(1e-6)
        return Features(x.flatten(1), torch.tensor(labels), torch.arange(len(x)))

    return _accuracy(pixels(bank), pixels(test))


def _attention_iou(backbone: nn.Module, source: Masked, config: Config, sheet: Path | None = None) -> float:
    # The whole image at its own size, above that of the views: more patches, so finer maps.
    reading = Reading(size=config.data.image_size, normalize=config.data.normalize)
    vit = our_vit(backbone, "attention maps")
    found = jaccard(vit, source, reading, batch=BATCH)
    if sheet is not None:
        ((images, maps),) = attend(vit, source, reading, SHEET_ROWS, range(SHEET_ROWS), masks=True)
        draw_sheet(sheet, images, maps, head=found.head)
    return found.one_head.mean().item()


def _draw_curves(folder: Path, summary: dict[str, float]) -> None:
    """curves.png: the loss over steps; the teacher's k-NN over steps beside what needs no training."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scores = [(line["step"], line["knn"]) for line in lines if "knn" in line]
    figure = new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*losses, strict=True), color="C0")
    left.set(xlabel="step", ylabel="loss", title="The student predicts the teacher")
    right.plot(*zip(*scores, strict=True), "o-", color="C0", label="teacher")
    baselines = {
        "knn_random_init": "random init",
        "knn_raw_pixels": "pixels",
        "knn_raw_pixels_standardised": "pixels, standardised",
    }
    for style, (name, label) in zip(("--", ":", "-."), baselines.items(), strict=True):
        right.axhline(summary[name], color="0.5", linestyle=style, label=label)
    right.set(xlabel="step", ylabel="k-NN top-1, %", ylim=(0, 100), title="Its features tell 12 classes apart")
    right.legend(loc="lower right", fontsize=8)
    figure.canvas.print_png(folder / "curves.png")


def _table(summary: dict[str, float], folder: Path) -> str:
    rows = [f"  {name:30} {value:8.2f}" for name, value in summary.items()]
    return "\n".join([*rows, f"pictures: {folder / 'curves.png'}, {folder / 'attention.png'}"])
