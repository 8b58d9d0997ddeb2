"""What features are worth with few labels: some images of each class are drawn, and classify all test images.

DINO has no text, so nothing is zero-shot in CLIP's sense; one image of each class comes nearest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastdino.config import ConfigError
from fastdino.config.errors import require
from fastdino.data.benchmarks.class_folders import Sets
from fastdino.data.sources.source import Source
from fastdino.eval.classify.calibration import percent_right
from fastdino.eval.classify.classification import Classification
from fastdino.eval.classify.knn import PUBLISHED, KNeighbors
from fastdino.eval.classify.logreg import MOST, fit, solver, standardized, told_by, within_span
from fastdino.eval.evaluation import Subject
from fastdino.eval.features import Features, Tokens
from fastdino.eval.intervals import Score, Shares, normal
from fastdino.eval.pictures import new_figure
from fastdino.eval.result import Found, Picture

SHOTS, EPISODE_SHOTS = (1, 2, 5, 10, 20), (1, 5)
HEADLINE = 5  # shots
EPISODES_TOGETHER = 64

Classifier = Literal["centroid", "knn", "logreg"]
CLASSIFIERS: tuple[Classifier, ...] = ("centroid", "knn", "logreg")
C = 1.0  # of logistic regression
Told = dict[tuple[Classifier, int], list[Tensor]]
"""By classifier and shots: (n,) predictions of each draw."""


def cl2n(features: Tensor, mean: Tensor) -> Tensor:
    """Features (..., D) less ``mean`` (D,), at length 1: the CL2N of SimpleShot (Wang et al. 2019)."""
    return F.normalize(features - mean, dim=-1)


def centroids(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(n, D) and (n,) -> (C, D), the mean of each class, not normalised again; infinite for one without images."""
    counts = labels.bincount(minlength=num_classes)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return torch.where(counts[:, None] > 0, sums / counts[:, None], torch.inf)


def nearest(queries: Tensor, points: Tensor) -> Tensor:
    """(..., n, D) and (..., C, D) -> (..., n), the nearest point by Euclid."""
    distance = points.square().sum(-1).unsqueeze(-2) - 2 * queries @ points.mT
    return distance.nan_to_num(torch.inf).argmin(-1)


def drawn_order(labels: Tensor, seed: int, draw: int) -> Tensor:
    """(n,) the place of each image among those of its class in a random order: below k, it is among the k drawn."""
    own = labels.numpy()
    order = np.lexsort((np.random.default_rng((seed, draw)).random(len(own)), own))  # by class, at random within one
    counts = np.bincount(own)
    place = np.empty_like(own)
    place[order] = np.arange(len(own)) - np.repeat(counts.cumsum() - counts, counts)
    return torch.from_numpy(place)


def episodes(
    bank: Features, test: Features, classes: Tensor, size: tuple[int, int, int], count: int, seed: int
) -> Iterator[Tensor]:
    """Accuracies, in percent, of ``count`` episodes by the nearest centroid, some at a time.

    Args:
        bank, test: features to compare, of which shots and queries are drawn.
        classes: those that occur in episodes, int64.
        size: classes of an episode, shots and queries of each class.
        count: of episodes.
        seed: of the draws.
    """
    way, shots, queries = size
    generator = torch.Generator().manual_seed(seed)
    tables = [_members(features.labels.cpu(), classes) for features in (bank, test)]
    truth = torch.arange(way).repeat_interleave(queries)
    for start in range(0, count, EPISODES_TOGETHER):
        together = min(EPISODES_TOGETHER, count - start)
        drawn = torch.rand(together, len(classes), generator=generator).argsort(1)[:, :way]
        places = [_drawn(table[drawn], k, generator) for table, k in zip(tables, (shots, queries), strict=True)]
        few, asked = (x.vectors[at.to(x.vectors.device)] for x, at in zip((bank, test), places, strict=True))
        told = nearest(asked.flatten(1, 2), few.mean(2))  # (together, way * queries)
        yield 100 * (told.cpu() == truth).double().mean(1)


def _members(labels: Tensor, classes: Tensor) -> Tensor:
    """(C', m) the places of the images of each class, and -1 where there are no more."""
    places = [(labels == label).nonzero().flatten() for label in classes]
    return torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)


def _drawn(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(..., m) -> (..., count) different ones of each row, which has as many."""
    keys = torch.rand(table.shape, generator=generator).masked_fill(table < 0, torch.inf)
    return table.gather(-1, keys.topk(count, largest=False).indices)


@dataclass(frozen=True, kw_only=True)
class FewShot(Classification):
    """Accuracy with few labelled images of each class: nearest centroids, k-NN and logistic regression.

    --data is as for knn. Some images of each class of the bank are drawn, several times, and all test images judged.
    --episodes N draws a few classes too, as papers on few-shot learning do. DINO knows no words, so there is no
    zero-shot: one image of each class comes nearest to it, and cluster needs no label at all.
    """

    kind: ClassVar[str] = "fewshot"

    tokens: Tokens = "cls"
    """What is classified."""
    shots: tuple[int, ...] = ()
    """Images of each class that are drawn; a class that has fewer gives all. Default: 1 2 5 10 20, as far as there are
    classes with so many; of episodes, 1 5."""
    draws: int = 20
    """How often they are drawn."""
    classifiers: tuple[Classifier, ...] = CLASSIFIERS
    """centroid: the nearest mean of centred features at length 1. knn: as many neighbours as shots. logreg: on
    standardised features. The first is the headline."""
    episodes: int = 0
    """Judge so many episodes of --way classes instead; SimpleShot reports 10,000."""
    way: int = 5
    """Classes of an episode."""
    queries: int = 15
    """Test images of each class of an episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(k >= 1 for k in self.shots), "--shots", self.shots, "1 or more", "counts of images")
        require(len({*self.shots}) == len(self.shots), "--shots", self.shots, "different", "each is judged once")
        require(self.draws >= 2, "--draws", self.draws, "at least 2", "their spread is the interval")
        chosen = self.classifiers
        require(len({*chosen}) == len(chosen) > 0, "--classifiers", chosen, "one or more, each once")
        require(self.episodes == 0 or self.episodes >= 2, "--episodes", self.episodes, "0, or at least 2")
        require(self.way >= 2, "--way", self.way, "at least 2", "one class needs no classifier")
        require(self.queries >= 1, "--queries", self.queries, "at least 1", "a count of images")

    def open(self, subject: Subject) -> Sets:
        """Bank and test. Raises ConfigError also where they hold too few images."""
        sets = super().open(subject)
        counts, others = (_counts(source) for source in (sets.bank, sets.test))
        if self.episodes:
            shots = max(self.shots_of(counts))
            fitting = int(((counts >= shots) & (others >= self.queries)).sum())
            if fitting < self.way:
                raise ConfigError(
                    f"{fitting} classes of {self.data} have {shots} training and {self.queries} test images, and an "
                    f"episode needs --way {self.way}: lower it, --shots or --queries"
                )
        elif self.shots and (most := max(self.shots)) > (largest := int(counts.max())):
            raise ConfigError(f"--shots {most}: the largest class of the bank has {largest} images: ask for fewer")
        if "logreg" in self.classifiers and not self.episodes:
            solver()
        return sets

    def shots_of(self, counts: Tensor) -> tuple[int, ...]:
        """Images of each class that are drawn, where the (C,) classes have so many."""
        if self.shots:
            return tuple(sorted(self.shots))
        if self.episodes:
            return EPISODE_SHOTS
        return tuple(k for k in SHOTS if k <= int(counts.max()))

    def judge(self, subject: Subject, data: Sets) -> Found:
        """accuracy is that of the first classifier with 5 shots, or with the most of them."""
        bank, test = self.both(subject, data, self.tokens)
        counts = bank.labels.cpu().bincount(minlength=len(data.bank.labels))
        shots = self.shots_of(counts)
        k = min(PUBLISHED, len(bank.labels))
        all_labels = KNeighbors(k).fit(bank.vectors, bank.labels).predict(test.vectors)
        protocol = self.protocol(subject, self.tokens) | {"shots": shots}
        whole = self.found(data, self.predictions(data, bank, test, all_labels), protocol)
        if self.episodes:
            return self._of_episodes(bank, test, counts, whole)
        used = self._affordable(bank, counts, shots)
        notes = ["logreg would take hours and is left out"] if len(used) < len(self.classifiers) else []
        short = {k: int(((counts > 0) & (counts < k)).sum()) for k in shots}
        notes += [f"{n} classes have fewer than {k} training images and gave all" for k, n in short.items() if n]
        told = self._told(bank, test, shots, used)
        return _of_draws(replace(whole, notes=notes), told, test.labels.cpu())

    def _affordable(self, bank: Features, counts: Tensor, shots: tuple[int, ...]) -> list[Classifier]:
        """The classifiers but for logistic regression where that would take hours."""
        images = self.draws * sum(int(counts.clamp(max=k).sum()) for k in shots)
        too_many = images * bank.vectors.shape[1] * len(counts) > MOST
        return [name for name in self.classifiers if not (name == "logreg" and too_many)]

    def _told(self, bank: Features, test: Features, shots: tuple[int, ...], used: list[Classifier]) -> Told:
        """What each classifier tells of the test images with so many shots, (draws, n)."""
        y, classes, mean = bank.labels, int(bank.labels.max()) + 1, bank.vectors.mean(0)
        found: Told = {(name, k): [] for name in used for k in shots}
        by_length = [cl2n(features.vectors, mean) for features in (bank, test)]
        by_number = [standardized(x.vectors, bank.vectors).cpu() for x in (bank, test)]
        for draw in tqdm(range(self.draws), desc="few shots", unit="draw", leave=False, disable=None):
            place = drawn_order(y.cpu(), self.seed, draw)
            for k in shots:
                few = (place < k).nonzero().flatten().to(y.device)
                if "centroid" in used:
                    points = centroids(by_length[0][few], y[few], classes)
                    found["centroid", k].append(nearest(by_length[1], points).cpu())
                if "knn" in used:
                    fitted = KNeighbors(min(k, len(few))).fit(bank.vectors[few], y[few])
                    found["knn", k].append(fitted.predict(test.vectors).cpu())
                if "logreg" in used:
                    model, here = solver(), few.cpu()
                    own, asked = within_span(by_number[0][here], by_number[1])
                    fit(model, own, y[few].cpu(), C)
                    found["logreg", k].append(told_by(model, asked, classes).argmax(1))
        return found

    def _of_episodes(self, bank: Features, test: Features, counts: Tensor, whole: Found) -> Found:
        others = test.labels.cpu().bincount(minlength=len(counts))
        mean = bank.vectors.mean(0)
        bank, test = (x._replace(vectors=cl2n(x.vectors, mean)) for x in (bank, test))
        scores = dict[str, Score]()
        for shots in self.shots_of(counts):
            classes = ((counts >= shots) & (others >= self.queries)).nonzero().flatten()
            size = self.way, shots, self.queries
            made = torch.cat([*episodes(bank, test, classes, size, self.episodes, self.seed)])
            scores[f"{self.way}_way_{shots}_shot"] = normal(made.numpy(), "episodes")
        main = f"{self.way}_way_{HEADLINE}_shot"
        first = {"accuracy": scores.get(main, [*scores.values()][-1])}
        protocol = {"episodes": self.episodes, "way": self.way, "queries": self.queries, "classifier": "centroid, CL2N"}
        protocol = whole.protocol | protocol
        return replace(whole, scores=first | scores, protocol=protocol, also={}, shares=None, arrays={}, pictures=[])


def _counts(source: Source) -> Tensor:
    """(C,) images of each class."""
    labels = torch.tensor([source.label(i) for i in range(len(source))], dtype=torch.int64)
    return labels.bincount(minlength=len(source.labels))


def _of_draws(whole: Found, told: Told, truth: Tensor) -> Found:
    """Accuracies over shots, beside ``whole``, of k-NN with all labels."""
    scores, balanced = dict[str, Score](), dict[str, Score]()
    for (name, k), draws in told.items():
        scores[f"{name}_{k}"] = normal([percent_right(each, truth).item() for each in draws], "draws")
        balanced[f"{name}_{k}"] = normal([percent_right(each, truth, True).item() for each in draws], "draws")
    shots, first = sorted({k for _, k in told}), next(iter(told))[0]
    main = first, HEADLINE if HEADLINE in shots else shots[-1]
    all_labels = whole.scores["accuracy"]
    reached = {
        name: next((k for k in shots if scores[f"{name}_{k}"].value >= all_labels.value), None) for name, _ in told
    }
    also = {
        "headline": f"{main[0]}, {main[1]} shots",
        "balanced_accuracy": {name: score.json() for name, score in balanced.items()},
        "shots_to_reach_knn_of_all_labels": reached,
    }
    right = (torch.stack(told[main]) == truth).double().mean(0).numpy()
    names = {name: whole.arrays[name] for name in ("images", "classes", "labels")}
    head = f"{main[0]}_{main[1]}"
    first_scores = {"accuracy": scores[head], "balanced_accuracy": balanced[head]}
    return replace(
        whole,
        scores=first_scores | scores | {"knn_all_labels": all_labels},
        also=also,
        shares=Shares.mean(whole.arrays["images"].tolist(), right),
        arrays=names | {"right": right.astype(np.float32)},
        pictures=[Picture("", lambda path: _draw(path, scores, all_labels))],
    )


def _draw(path: Path, scores: dict[str, Score], all_labels: Score) -> None:
    figure = new_figure(5.2, 3.8, dpi=110)
    axes = figure.subplots()
    for name in dict.fromkeys(key.rpartition("_")[0] for key in scores):
        own = {int(key.rpartition("_")[2]): score for key, score in scores.items() if key.rpartition("_")[0] == name}
        axes.plot([*own], [score.value for score in own.values()], marker="o", markersize=4, label=name)
        axes.fill_between([*own], *zip(*((x.low, x.high) for x in own.values()), strict=True), alpha=0.2)
    axes.axhline(all_labels.value, color="0.4", linestyle="--", linewidth=1, label="k-NN, all labels")
    axes.set(xscale="log", xlabel="labelled images of each class", ylabel="accuracy, %", title="Few shots")
    shots = sorted({int(key.rpartition("_")[2]) for key in scores})
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.canvas.print_png(path)
