"""Evaluation of frozen features."""

from fastdino.eval.classify.fewshot import FewShot
from fastdino.eval.classify.knn import KNeighbors, Knn
from fastdino.eval.classify.linear import Linear
from fastdino.eval.classify.logreg import LogReg
from fastdino.eval.dense.attention_maps import AttentionMaps, head_maps, keep_mass
from fastdino.eval.dense.patches import PatchProbe
from fastdino.eval.dense.pictures.pca import Pca
from fastdino.eval.dense.pictures.similarity import Similarity
from fastdino.eval.dense.segment.segment import Segment
from fastdino.eval.evaluation import Evaluation, Subject
from fastdino.eval.features import EvaluationError, Features, Reading, extract
from fastdino.eval.finetune.finetune import FineTune
from fastdino.eval.objects.discover import Discover
from fastdino.eval.objects.video import VideoObjects
from fastdino.eval.retrieve.copydetect import CopyDetection
from fastdino.eval.retrieve.retrieval import Retrieval
from fastdino.eval.unlabelled.clusters import Cluster
from fastdino.eval.unlabelled.rank import Rank

KINDS: tuple[type[Evaluation], ...] = (
    Knn,
    Linear,
    LogReg,
    FewShot,
    FineTune,
    Cluster,
    Rank,
    Retrieval,
    CopyDetection,
    AttentionMaps,
    Segment,
    Discover,
    VideoObjects,
    PatchProbe,
    Pca,
    Similarity,
)
EVALUATIONS = {kind.kind: kind for kind in KINDS}
"""The kinds of ``fastdino eval KIND WEIGHTS``."""

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
    "extract",
    "head_maps",
    "keep_mass",
]
