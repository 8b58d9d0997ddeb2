"""Evaluation of frozen features."""

from fastdino.eval.classify.finetune import FineTune
from fastdino.eval.classify.knn import KNeighbors, Knn
from fastdino.eval.dense.attention_maps import AttentionMaps, best_head_iou, draw_sheet, head_maps, keep_mass
from fastdino.eval.dense.patches import PatchProbe
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Features, Reading, extract

EVALUATIONS: dict[str, type[Evaluation]] = {
    "knn": Knn,
    "finetune": FineTune,
    "attention": AttentionMaps,
    "patches": PatchProbe,
}
"""The kinds of ``fastdino eval KIND PATH``."""

__all__ = [
    "EVALUATIONS",
    "AttentionMaps",
    "Evaluation",
    "EvaluationError",
    "Features",
    "FineTune",
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
