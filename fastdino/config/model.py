"""Settings of the networks: the backbone and the projection head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdino.config.group import Group

VIT_SIZES = (
    "nano", "tiny", "small", "base", "large", "huge", "giant",
    "small_plus", "large_swiglu", "huge_plus", "giant2", "7b",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Group):
    """The backbone: an image becomes a feature vector."""

    arch: str = "vit_small"
    """vit_tiny|small|base|large|huge|giant (vit_nano for tests and the demo), with SwiGLU vit_large_swiglu|giant2 (the
    wider ViT-g of DINOv2) and vit_small_plus|huge_plus|7b (DINOv3's), or timm:NAME for any backbone of timm."""
    patch_size: int = 16
    """Side of a patch in pixels; ViT only."""
    drop_path: float = 0.1
    """Probability of dropping a residual branch at the last block. Student only."""
    drop_path_rule: Literal["linear", "uniform"] = "linear"
    """linear: drop_path rises from 0 over depth, as in DINO v1. uniform: the same in every block, and a branch runs on
    the views that keep it alone, as many at every step, as in DINOv2; in the last block each view drops by chance."""
    attention: Literal["auto", "triton", "varlen", "xformers", "sdpa"] = "auto"
    """triton: our kernels for many short sequences, which give the same bits in every run; varlen: torch's attention
    over packed views of all sizes; xformers: its memory-efficient one, which torch.compile cannot take in; sdpa:
    torch's, one call per size. auto: what was measured to be fastest on this GPU (or, of its generation, on an H200),
    else the first of varlen, xformers and sdpa that runs."""
    packed: Literal["auto", "on", "off"] = "auto"
    """Views of all sizes go through our ViT in one sequence, or one size after the other. auto: what was measured to be
    faster on this GPU (or, of its generation, on an H200), and packed where nothing was."""
    pos_embed: Literal["learned", "sincos", "rope"] = "learned"
    """learned: position embeddings that start from noise as in DINO v1; sincos: from sines and cosines (short runs).
    rope: none, queries and keys are rotated by their patch's place, as in DINOv3."""
    interpolation: Literal["offset", "antialias"] = "offset"
    """How position embeddings fit another grid of patches: bicubic, by the factor (new + 0.1) / old as in DINO v1 and
    DINOv2 without registers, or to the new size with antialiasing as in DINOv2 with registers."""
    image_size: int | None = None
    """Side in pixels of the images whose patches have a position embedding each. Default: as model.weights have, else
    views.global_size."""
    rope_scale: float = 2.0
    """s: in training rope stretches a view's coordinates by a random factor in [1/s, s]; 1 does not. Student only."""
    registers: int | None = None
    """Extra tokens that belong to no patch: 4 keep the patches' features clean of global ones (Darcet et al. 2024).
    Default: as model.weights have, else 0."""
    layer_scale: float = 0.0
    """Start of a learned factor per channel on each residual branch, 1e-5 in DINOv2; 0: there is none."""
    init: Literal["trunc_normal", "xavier"] = "trunc_normal"
    """How linear layers start: trunc_normal(0.02) as in DINO v1, or Xavier-uniform (short runs of narrow models)."""
    weights: Path | None = None
    """Backbone weights to start from: a file or a folder of DINO v1 to v3, timm or Hugging Face (docs/weights.md). They
    decide registers, layer_scale, pos_embed, interpolation and image_size. Default: start from noise."""

    def check(self) -> None:
        vit = self.arch.removeprefix("vit_")
        known = ", ".join(f"vit_{size}" for size in VIT_SIZES)
        ours = self.arch.startswith("vit_") and vit in VIT_SIZES
        self.require(ours or self.arch.startswith("timm:"), "arch", f"one of {known} or timm:NAME")
        self.require(self.patch_size > 0, "patch_size", "a positive number of pixels")
        whole = self.image_size is None or (self.image_size > 0 and self.image_size % self.patch_size == 0)
        self.require(whole, "image_size", f"a multiple of model.patch_size={self.patch_size}")
        self.require(0 <= self.drop_path < 1, "drop_path", "in [0, 1)", "at 1 no block would be left")
        self.require(
            self.rope_scale >= 1, "rope_scale", "1 or more", "coordinates are stretched by up to it, or 1 / it"
        )
        self.require(self.registers is None or self.registers >= 0, "registers", "0 or more")
        self.require(self.layer_scale >= 0, "layer_scale", "0 or more")

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
    """A full training checkpoint of DINO v1 or v2 whose head to start from, as from its backbone by model.weights."""
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
