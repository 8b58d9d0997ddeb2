"""Views become logits: a backbone and a head. timm's backbones enter here."""

import copy
import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, ModelConfig
from fastdino.model.head import Head
from fastdino.model.vit import ViT
from fastdino.model.weights import WeightsError, load_backbone, read_metadata


class Network(nn.Module):
    """Student or teacher: ``backbone`` gives features, ``head`` compares them with K prototypes."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, groups: list[Tensor]) -> Tensor:
        """(V_i, B, 3, h_i, w_i) normalised views per size -> (sum of V_i, B, K) logits, views in the order given."""
        return self.head(self.features(groups))

    def features(self, groups: list[Tensor]) -> Tensor:
        """The same views -> (sum of V_i, B, D), what the head is given."""
        if isinstance(self.backbone, ViT):
            return self.backbone.forward_groups(groups)
        dtype = next(self.backbone.parameters()).dtype
        parts = [self.backbone(views.flatten(0, 1).to(dtype)).unflatten(0, views.shape[:2]) for views in groups]
        return torch.cat(parts)


def build_network(config: Config, teacher: bool = False) -> Network:
    """The network of ``config`` in fp32 on the CPU, started from torch's generator (seed it first) or model.weights.

    Args:
        config: model, head and view sizes are read.
        teacher: without drop path and without gradients. BatchNorm layers of a teacher stay in training mode, as in
            DINO v1: their running statistics are the teacher's own, no average of the student's.

    Raises ConfigError for a backbone that does not exist or cannot take the views' sizes.
    """
    model = dataclasses.replace(config.model, drop_path=0.0) if teacher else config.model
    views = config.views
    backbone = build_backbone(model, views.global_size, views.local_size if views.num_local else None)
    if model.weights is not None:
        load_backbone(backbone, model.weights)
    network = Network(backbone, Head(backbone.num_features, config.head, model.init))
    return network.requires_grad_(False) if teacher else network


def build_backbone(model: ModelConfig, image_size: int, local_size: int | None = None) -> Any:
    """A module with ``num_features`` that maps (B, 3, h, w) to (B, D), in fp32 on the CPU.

    Args:
        model: arch and its options; ``weights`` is not read here.
        image_size: side in pixels of a global view; position embeddings are made for it.
        local_size: side of a local view, if there are any; checked for timm's backbones.
    """
    if not model.is_vit:
        return _build_timm(model, image_size, local_size)
    return ViT(
        model.arch.removeprefix("vit_"),
        patch_size=model.patch_size,
        image_size=image_size,
        drop_path=model.drop_path,
        attention=model.attention,
        pos_embed=model.pos_embed,
        init=model.init,
    )


def restore_backbone(path: Path) -> Any:
    """The backbone of a file written by :func:`export_backbone` with metadata["config"] = Config.to_json().

    It needs neither DeepSpeed nor the run it came from. Raises WeightsError for a file without that entry.
    """
    metadata = read_metadata(path)
    if "config" not in metadata:
        raise WeightsError(
            f"{path} does not say which backbone it holds: build_backbone(...) and load_backbone(...) it"
        )
    config = Config.from_json(metadata["config"])
    model = dataclasses.replace(config.model, drop_path=0.0, attention="auto")
    backbone = build_backbone(model, config.views.global_size)
    load_backbone(backbone, path)
    return backbone


def _build_timm(model: ModelConfig, image_size: int, local_size: int | None) -> nn.Module:
    """timm's backbone without its classifier, made for several image sizes where it can be."""
    backbone: Any = _create_timm(model, image_size)
    for name, size in (("global", image_size), ("local", local_size)):
        if size is not None:
            backbone.num_features = _probe(backbone, model.arch, name, size)
    return backbone


def _create_timm(model: ModelConfig, image_size: int) -> nn.Module:
    import timm  # here, because it takes seconds to import and our own ViT does without

    name = model.arch.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["any of timm.list_models()"]
        raise ConfigError(f"model.arch='{model.arch}': timm has no such model; did you mean {', '.join(near)}?")
    options: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True}
    if model.drop_path:
        options["drop_path_rate"] = model.drop_path
    while True:
        try:
            return timm.create_model(name, num_classes=0, **options)
        except TypeError as error:  # each family of models knows some of the options
            unknown = next((option for option in options if f"'{option}'" in str(error)), None)
            if unknown is None:
                raise
            if unknown == "drop_path_rate":
                raise ConfigError(f"model.drop_path={model.drop_path}: {name} has no drop path, set it to 0") from error
            del options[unknown]


def _probe(backbone: nn.Module, arch: str, view: str, size: int) -> int:
    """D, the width of the features of a view, from shapes alone: nothing is computed."""
    shadow = copy.deepcopy(backbone).eval().to("meta")  # a copy, because a forward pass may leave caches behind
    try:
        features = shadow(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"model.arch='{arch}' cannot take {view} views of {size} px (views.{view}_size): {error}. "
            "Use a size it can take or a backbone without a fixed size"
        ) from error
    if features.ndim != 2:
        raise ConfigError(f"model.arch='{arch}' gives features of shape {tuple(features.shape)}, not (images, width)")
    return features.shape[1]
