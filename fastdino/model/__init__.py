"""Views become points: backbone and head. Also how weights come in and go out."""

from fastdino.model.head import Head
from fastdino.model.network import (
    Backbone,
    Network,
    Outputs,
    build_backbone,
    build_network,
    outline,
    restore_backbone,
    start_of,
)
from fastdino.model.vit import ViT
from fastdino.model.weights import WeightsError, export_backbone, load_backbone, load_head

__all__ = [
    "Backbone",
    "Head",
    "Network",
    "Outputs",
    "ViT",
    "WeightsError",
    "build_backbone",
    "build_network",
    "export_backbone",
    "load_backbone",
    "load_head",
    "outline",
    "restore_backbone",
    "start_of",
]
