"""Fused Triton kernels for self-distillation, each beside the plain-torch reference that defines it."""

from fastdino_kernels.layers.fp8_linear import fp8_linear
from fastdino_kernels.layers.gather_layer_norm import gather_layer_norm
from fastdino_kernels.layers.packed_attention import packed_attention, packed_self_attention
from fastdino_kernels.layers.prototype_weight import prototype_weight
from fastdino_kernels.layers.scatter_add_scaled import scatter_add_scaled
from fastdino_kernels.losses.dino_loss import dino_loss
from fastdino_kernels.losses.ibot_loss import ibot_loss
from fastdino_kernels.losses.koleo_loss import koleo_loss
from fastdino_kernels.losses.linear_ibot_loss import linear_ibot_loss
from fastdino_kernels.losses.sinkhorn import sinkhorn
from fastdino_kernels.optim.adamw_ema import AdamWHyper, adamw_ema_
from fastdino_kernels.optim.ema_update import ema_update_
from fastdino_kernels.optim.segment_squares import Segments, make_segments, segment_squares
from fastdino_kernels.views.multi_crop import multi_crop

__all__ = [
    "AdamWHyper",
    "Segments",
    "adamw_ema_",
    "dino_loss",
    "ema_update_",
    "fp8_linear",
    "gather_layer_norm",
    "ibot_loss",
    "koleo_loss",
    "linear_ibot_loss",
    "make_segments",
    "multi_crop",
    "packed_attention",
    "packed_self_attention",
    "prototype_weight",
    "scatter_add_scaled",
    "segment_squares",
    "sinkhorn",
]
