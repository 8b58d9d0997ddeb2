"""Evaluation of frozen features."""

from fastdino.eval.classify.knn import KNeighbors, Knn
from fastdino.eval.dense.attention_maps import AttentionMaps, best_head_iou, draw_sheet, head_maps, keep_mass
from fastdino.eval.dense.patches import PatchProbe
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Features, Reading, extract
from fastdino.eval.unlabelled.clusters import Cluster
from fastdino.eval.unlabelled.rank import Rank

EVALUATIONS: dict[str, type[Evaluation]] = {
    "knn": Knn,
    "attention": AttentionMaps,
    "patches": PatchProbe,
    "rank": Rank,
    "cluster": Cluster,
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
    "Reading",
    "Subject",
    "best_head_iou",
    "draw_sheet",
    "extract",
    "head_maps",
    "keep_mass",
]
