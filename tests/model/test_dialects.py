"""Every dialect against the classes that speak it, and against the official networks' outputs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.model import ViT, export_backbone, load_backbone, restore_backbone
from fastdino.model.block import Shape
from fastdino.model.vit import SIZES
from fastdino.model.weights import form_of
from fastdino.model.weights.dialects import DIALECTS, from_published, to_published, without_key_biases
from fastdino.model.weights.exports import hf_config, timm_model
from fastdino.model.weights.form import Form, recognise

LAYOUTS = json.loads((Path(__file__).parents[1] / "fixtures/dino_layouts.json").read_text())
OFFICIAL = [*LAYOUTS["dinov2"], *LAYOUTS["dinov3"]]
ROTARY = [layout["name"] in {x["name"] for x in LAYOUTS["dinov3"]} for layout in OFFICIAL]


def gen(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def official_weights(layout: dict[str, Any]) -> dict[str, Tensor]:
    """As the fixture says: each tensor from a seed made of its name."""
    state = {}
    for name, shape in layout["repository_keys"].items():
        x = 0.2 * gen(int(hashlib.sha1(name.encode()).hexdigest()[:6], 16), *shape)
        around_one = name.endswith("gamma") or (name.endswith(".weight") and name.split(".")[-2].startswith("norm"))
        state[name] = 1 + 0.5 * x if around_one else x
    return state


def vit_of(layout: dict[str, Any]) -> ViT:
    keys, rotary = layout["repository_keys"], layout in LAYOUTS["dinov3"]
    swiglu = not any("fc1" in name for name in keys)
    hidden = next(shape[1] for name, shape in keys.items() if name.endswith(("mlp.fc2.weight", "mlp.w3.weight")))
    registers = 4 if rotary else layout["registers"]
    return ViT(
        Shape(48, 2, 3, hidden, swiglu), image_size=64, layer_scale=1e-5, registers=registers,
        pos_embed="rope" if rotary else "learned", interpolation="antialias" if registers else "offset",
    ).eval()  # fmt: skip
