"""Views become logits: backbone and head. Also how weights come in and go out."""

from fastdino.model.head import Head
from fastdino.model.network import Network, build_backbone, build_network, restore_backbone
from fastdino.model.vit import ViT
from fastdino.model.weights import WeightsError, export_backbone, load_backbone, load_head

__all__ = [
    "Head",
    "Network",
    "ViT",
    "WeightsError",
    "build_backbone",
    "build_network",
    "export_backbone",
    "load_backbone",
    "load_head",
    "restore_backbone",
]
