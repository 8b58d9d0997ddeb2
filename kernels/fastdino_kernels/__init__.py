"""Fused Triton kernels for self-distillation, each beside the plain-torch reference that defines it."""

from fastdino_kernels.center import center_mean
from fastdino_kernels.ema import ema_update_
from fastdino_kernels.loss import dino_loss

__all__ = ["center_mean", "dino_loss", "ema_update_"]
