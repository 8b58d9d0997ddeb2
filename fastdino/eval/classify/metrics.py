"""What predictions are worth, also where classes are of very different sizes."""

from pathlib import Path
from typing import Any

import numpy as np

from fastdino.eval.intervals import Score, Shares, wilson
from fastdino.eval.pictures import new_figure
from fastdino.eval.result import Picture

MANY, FEW = 100, 20  # training images of a class: more are many, fewer few (Liu et al. 2019)
NAMED = 40  # classes up to which a picture names them


class Predictions:
    """Classes that were told, beside the true ones.

    Args:
        truth: (n,) int64, classes by number.
        told: (n,) int64.
        classes: their names.
        counts: (C,) training images of each class.
        images: (n,) names of the images.
    """

    def __init__(
        self, truth: np.ndarray, told: np.ndarray, classes: list[str], counts: np.ndarray, images: list[str]
    ) -> None:
        self.truth, self.told, self.classes, self.counts, self.images = truth, told, classes, counts, images
        num = len(classes)
        self.confusion = np.bincount(truth * num + told, minlength=num * num).reshape(num, num)
        """(C, C) counts by true and by told class."""

    @property
    def hits(self) -> np.ndarray:
        """(n,) bool."""
        return self.truth == self.told

    def scores(self) -> dict[str, Score]:
        """accuracy, balanced_accuracy (the mean recall) and macro_f1, in percent."""
        balanced = self.shares("balanced_accuracy")
        return {
            "accuracy": wilson(int(self.hits.sum()), len(self.truth)),
            "balanced_accuracy": balanced.score(strata=self.truth),
            "macro_f1": self.shares("macro_f1").score(strata=self.truth),
        }

    def shares(self, name: str = "accuracy") -> Shares:
        """What each image adds to a score."""
        each = np.arange(len(self.truth))
        hits, ones = self.hits.astype(np.float64), np.ones(len(self.truth))
        if name == "accuracy":
            return Shares.mean(self.images, hits)
        if name == "balanced_accuracy":
            return Shares(self.images, each, self.truth, hits, ones)
        # 2 TP / (2 TP + FP + FN) of a class: an image is once in the sum for its own class, once for the told one.
        both = np.concatenate([self.truth, self.told])
        return Shares(self.images, np.tile(each, 2), both, np.tile(hits, 2), np.tile(ones, 2))

    def also(self) -> dict[str, Any]:
        """Recall of each class that is judged, with its interval, the worst one, and those of many, medium and few
        training images."""
        totals = self.confusion.sum(1)
        judged = np.flatnonzero(totals)
        recall = {self.classes[c]: wilson(int(self.confusion[c, c]), int(totals[c])) for c in judged}
        worst = min(recall, key=lambda name: recall[name].value)
        found: dict[str, Any] = {
            "worst_class": [worst, round(recall[worst].value, 2)],
            "recall": {name: score.json() for name, score in recall.items()},
        }
        sizes = {"many": self.counts > MANY, "few": self.counts < FEW}
        sizes["medium"] = ~(sizes["many"] | sizes["few"])
        for name, chosen in sizes.items():
            values = [recall[self.classes[c]].value for c in judged if chosen[c]]
            if values and len(values) < len(judged):
                found[f"recall_{name}"] = round(sum(values) / len(values), 2)
        return found

    def data(self) -> dict[str, Any]:
        """How many classes there are, and how unequal they are in training."""
        there = self.counts[self.counts > 0]
        share = self.counts / self.counts.sum()
        return {
            "classes": len(self.classes),
            "imbalance": round(float(there.max() / there.min()), 2),
            "prior": {name: round(float(x), 4) for name, x in zip(self.classes, share, strict=True)},
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Per image."""
        return {
            "images": np.array(self.images, dtype=np.str_),
            "classes": np.array(self.classes, dtype=np.str_),
            "labels": self.truth,
            "predictions": self.told,
        }

    def picture(self) -> Picture:
        """The confusion matrix, by rows in percent, and the recall of each class."""
        return Picture("", self._draw)

    def _draw(self, path: Path) -> None:
        totals = self.confusion.sum(1)
        share = 100 * self.confusion / np.maximum(totals, 1)[:, None]
        num, named = len(self.classes), len(self.classes) <= NAMED
        side = min(max(3.0, 0.28 * num), 12.0)
        figure = new_figure(2 * side + 1.5, side + 0.8, dpi=110)
        left, right = figure.subplots(1, 2)
        shown = left.imshow(share, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(shown, ax=left, shrink=0.8, label="% of the true class")
        left.set(xlabel="told", ylabel="true", title="Confusion")
        order = np.argsort(share.diagonal(), kind="stable")[::-1]
        order = order[totals[order] > 0]
        right.barh(np.arange(len(order)), share.diagonal()[order], color="C0", height=0.8)
        right.invert_yaxis()
        right.set(xlabel="recall, %", xlim=(0, 100), title="Recall by class")
        right.set_yticks(np.arange(len(order)), [self.classes[c] for c in order] if named else [""] * len(order))
        ticks, names = np.arange(num), self.classes if named else [""] * num
        left.set_xticks(ticks, names, rotation=90, fontsize=7)
        left.set_yticks(ticks, names, fontsize=7)
        right.tick_params(axis="y", labelsize=7)
        figure.canvas.print_png(path)
