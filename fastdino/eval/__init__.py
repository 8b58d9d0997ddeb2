"""What the features are worth, with no labels used in training and none in the backbone."""

from fastdino.eval.attention_maps import best_head_iou, draw_sheet, evaluate_attention, head_maps, keep_mass
from fastdino.eval.features import EvaluationError, Protocol, extract
from fastdino.eval.knn import KNeighbors, evaluate_knn, online_knn

__all__ = [
    "EvaluationError",
    "KNeighbors",
    "Protocol",
    "best_head_iou",
    "draw_sheet",
    "evaluate_attention",
    "evaluate_knn",
    "extract",
    "head_maps",
    "keep_mass",
    "online_knn",
]
