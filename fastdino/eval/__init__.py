"""Evaluation of frozen features."""

from fastdino.eval.classify.knn import KNeighbors, Knn
from fastdino.eval.dense.attention_maps import AttentionMaps, head_maps, keep_mass
from fastdino.eval.dense.patches import PatchProbe
from fastdino.eval.dense.pictures.pca import Pca
from fastdino.eval.dense.pictures.similarity import Similarity
from fastdino.eval.dense.segment.segment import Segment
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Features, Reading, extract

EVALUATIONS: dict[str, type[Evaluation]] = {
    "knn": Knn,
    "attention": AttentionMaps,
    "patches": PatchProbe,
    "segment": Segment,
    "pca": Pca,
    "similarity": Similarity,
}
"""The kinds of ``fastdino eval KIND PATH``."""

__all__ = [
    "EVALUATIONS",
    "AttentionMaps",
    "Evaluation",
    "EvaluationError",
    "Features",
    "KNeighbors",
    "Knn",
    "PatchProbe",
    "Pca",
    "Reading",
    "Segment",
    "Similarity",
    "Subject",
    "extract",
    "head_maps",
    "keep_mass",
]
