"""Scores that the authors of released weights report, by which a user knows that an evaluation is right."""

import re
from typing import NamedTuple

IMAGENET = "imagenet-1k"
"""What a result calls a data set of ImageNet's 1,000 classes and 50,000 validation images."""


class Published(NamedTuple):
    """A score of released weights."""

    kind: str
    headline: str
    weights: str
    """A pattern of the file's name."""
    data: str
    score: float
    source: str


def _rows(source: str, pattern: str, scores: dict[str, tuple[float, float]]) -> list[Published]:
    """k-NN (k = 20) and linear accuracy on ImageNet-1k by what the pattern's place is filled with."""
    return [
        Published(kind, "accuracy", pattern.format(name), IMAGENET, score, source)
        for name, pair in scores.items()
        for kind, score in zip(("knn", "linear"), pair, strict=True)
    ]


DINO = {
    "deitsmall16": (74.5, 77.0),
    "deitsmall8": (78.3, 79.7),
    "vitbase16": (76.1, 78.2),
    "vitbase8": (77.4, 80.1),
    "resnet50": (67.5, 75.3),
}
TIMM = {
    "small_patch16_224": (74.5, 77.0),
    "small_patch8_224": (78.3, 79.7),
    "base_patch16_224": (76.1, 78.2),
    "base_patch8_224": (77.4, 80.1),
}
HUGGING_FACE = {"s16": (74.5, 77.0), "s8": (78.3, 79.7), "b16": (76.1, 78.2), "b8": (77.4, 80.1)}
DINOV2 = {"s": (79.0, 81.1), "b": (82.1, 84.5), "l": (83.5, 86.3), "g": (83.5, 86.5)}
HUGGING_FACE_V2 = {
    "small": DINOV2["s"], "base": DINOV2["b"], "large": DINOV2["l"], "giant": DINOV2["g"]
}  # fmt: skip

SMALL_16, SMALL_8, BASE_16 = (  # of DINO, in a file of its own, timm's or Hugging Face's
    rf"dino_{own}_pretrain|vit_{timm}\.dino|dino-vit{hugging_face}$"
    for own, timm, hugging_face in zip(DINO, TIMM, ("s16", "s8", "b16"), strict=False)
)
CORLOC = {  # by method: trainval of VOC 2007 and of VOC 2012
    "lost": {SMALL_16: (61.9, 64.0), SMALL_8: (55.5, 57.0), BASE_16: (60.1, 63.3)},
    "tokencut": {SMALL_16: (68.8, 72.1), SMALL_8: (67.3, 71.6), BASE_16: (68.8, 72.4)},
}
CORLOC_SOURCE = {"lost": "README of valeoai/LOST", "tokencut": "README of YangtaoWANG95/TokenCut"}

PUBLISHED = [
    *_rows("README of facebookresearch/dino", r"dino_{}_pretrain", DINO),
    *_rows("README of facebookresearch/dino", r"vit_{}\.dino", TIMM),
    *_rows("README of facebookresearch/dino", r"dino-vit{}$", HUGGING_FACE),
    *_rows("README of facebookresearch/dinov2", r"dinov2_vit{}14_pretrain", DINOV2),
    *_rows("README of facebookresearch/dinov2", r"dinov2-{}$", HUGGING_FACE_V2),
    *(
        Published("discover", f"corloc_{method}", weights, f"VOC{year}, trainval.txt", score, CORLOC_SOURCE[method])
        for method, rows in CORLOC.items()
        for weights, scores in rows.items()
        for year, score in zip((2007, 2012), scores, strict=True)
    ),
]

OXFORD, PARIS, COPYDAYS = "roxford5k v1", "rparis6k v1", "copydays v1"
"""What a result calls these data sets where all is as DINO v1 has it."""
PUBLISHED += [
    Published("retrieval", "map_medium", "dino_deitsmall16_pretrain", OXFORD, 41.8, "README of facebookresearch/dino"),
    Published("retrieval", "map_medium", "dino_deitsmall16_pretrain", PARIS, 63.1, "README of facebookresearch/dino"),
    Published("copydetect", "map_strong", "dino_vitbase8_pretrain", COPYDAYS, 85.8, "README of facebookresearch/dino"),
]


def published(kind: str, headline: str, file: str, data: str) -> Published | None:
    """What is reported of the weights in a file of that name, where data and kind are the same; else None."""
    return next(
        (
            row
            for row in PUBLISHED
            if (row.kind, row.headline, row.data) == (kind, headline, data) and re.search(row.weights, file)
        ),
        None,
    )
