"""Settings of the networks: the backbone and the projection head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdino.config.group import Group

VIT_SIZES = ("nano", "tiny", "small", "base", "large", "huge", "giant")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Group):
    """The backbone: an image becomes a feature vector."""

    arch: str = "vit_small"
    """vit_tiny|small|base|large|huge|giant (vit_nano for tests and the demo), or timm:NAME for any backbone of timm."""
    patch_size: int = 16
    """Side of a patch in pixels; ViT only."""
    drop_path: float = 0.1
    """Probability of dropping a residual branch at the last block; rises linearly from 0 over depth. Student only."""
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    """auto: xformers' memory-efficient attention over all packed views where it runs, torch's SDPA elsewhere."""
    pos_embed: Literal["learned", "sincos"] = "learned"
    """How position embeddings start: learned from noise as in DINO v1, or from sines and cosines (short runs)."""
    init: Literal["trunc_normal", "xavier"] = "trunc_normal"
    """How linear layers start: trunc_normal(0.02) as in DINO v1, or Xavier-uniform (short runs of narrow models)."""
    weights: Path | None = None
    """Backbone weights to start from (.safetensors, timm's or DINO v1's names); default: start from noise."""

    def check(self) -> None:
        vit = self.arch.removeprefix("vit_")
        known = ", ".join(f"vit_{size}" for size in VIT_SIZES)
        ours = self.arch.startswith("vit_") and vit in VIT_SIZES
        self.require(ours or self.arch.startswith("timm:"), "arch", f"one of {known} or timm:NAME")
        self.require(self.patch_size > 0, "patch_size", "a positive number of pixels")
        self.require(0 <= self.drop_path < 1, "drop_path", "in [0, 1)", "at 1 no block would be left")

    @property
    def is_vit(self) -> bool:
        """True for our own ViT, which has patches and packs views of several sizes."""
        return not self.arch.startswith("timm:")


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Group):
    """The projection head: a feature vector becomes K logits."""

    num_prototypes: int = 65536
    """K, width of the head's output (DINO v1: out_dim)."""
    num_layers: int = 3
    """Linear layers before the prototypes."""
    hidden_dim: int = 2048
    """Width of the MLP's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the L2-normalised vector that is compared with the prototypes."""
    batch_norm: bool = False
    """BatchNorm between the MLP's layers (DINO v1: use_bn_in_head). Over several GPUs each one waits for its device."""
    weights: Path | None = None
    """A full training checkpoint of DINO v1 whose head to start from, as from its backbone by model.weights."""
    freeze_prototype_norm: bool = True
    """Keep each prototype at length 1 (DINO v1: norm_last_layer). False usually scores higher for ViT-S; True is safer
    for ViT-B and larger."""

    def check(self) -> None:
        for name in ("num_prototypes", "num_layers", "hidden_dim", "bottleneck_dim"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.num_prototypes >= 2, "num_prototypes", "at least 2", "one prototype tells nothing apart")


@dataclass(frozen=True, kw_only=True)
class PatchHeadConfig(HeadConfig):
    """A head of the patches' own, beside that of the CLS token."""
