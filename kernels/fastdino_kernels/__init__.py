"""Fused Triton kernels for self-distillation, each beside the plain-torch reference that defines it."""

from fastdino_kernels.adamw_ema import Rates, adamw_ema_
from fastdino_kernels.center import center_mean
from fastdino_kernels.ema import ema_update_
from fastdino_kernels.gather_norm import gather_layer_norm
from fastdino_kernels.ibot import ibot_loss
from fastdino_kernels.koleo import koleo_loss
from fastdino_kernels.loss import dino_loss
from fastdino_kernels.prototype_loss import prototype_loss
from fastdino_kernels.prototypes import prototype_weight
from fastdino_kernels.scatter_add import scatter_add_scaled
from fastdino_kernels.segments import Segments, make_segments, segment_squares
from fastdino_kernels.sinkhorn import sinkhorn

__all__ = [
    "Rates",
    "Segments",
    "adamw_ema_",
    "center_mean",
    "dino_loss",
    "ema_update_",
    "gather_layer_norm",
    "ibot_loss",
    "koleo_loss",
    "make_segments",
    "prototype_loss",
    "prototype_weight",
    "scatter_add_scaled",
    "segment_squares",
    "sinkhorn",
]
