"""Weights in and out of files: safetensors with timm's names; DINO v1's checkpoints are read. No code is unpickled."""

import argparse
import contextlib
import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdino.config import UserError
from fastdino.model.positions import resample_positions
from fastdino.model.vit import ViT

if TYPE_CHECKING:
    from fastdino.model.network import Backbone

State = dict[str, Tensor]

NETWORKS = ("teacher", "model", "state_dict", "student")  # where training checkpoints keep weights, best first
CLASSIFIERS = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias")


class WeightsError(UserError, ValueError):
    """A file of weights that cannot be read or does not fit."""


def load_backbone(backbone: "Backbone", path: Path) -> None:
    """Copies the weights in ``path`` into ``backbone``; every parameter must be there, with its name and shape.

    Args:
        backbone: our ViT or a backbone of timm.
        path: .safetensors, or a .pth read with weights_only=True: a state dict, or a training checkpoint of DINO v1, of
            which the teacher is taken. Prefixes (module., backbone.) and heads are dropped.

    Our ViT takes position embeddings of another square grid and resamples them.
    Raises WeightsError naming all that is missing, unexpected or misshaped.
    """
    state = _without_prefix(_read(path))
    if any(name.startswith("backbone.") for name in state):
        state = {name[9:]: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    published = backbone.published
    own = published.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or name not in CLASSIFIERS}
    if isinstance(backbone, ViT) and "pos_embed" in state:
        state["pos_embed"] = _fit_positions(state["pos_embed"], backbone)
    _load(published, state, path)


def load_head(head: nn.Module, path: Path) -> None:
    """Copies the projection head in ``path`` into ``head``: ours, or one of DINO v1 from a training checkpoint.

    Raises WeightsError naming all that is missing, unexpected or misshaped.
    """
    state = _without_prefix(_read(path))
    state = {name[5:]: tensor for name, tensor in state.items() if name.startswith("head.")}
    _load(head, {_head_name(name): tensor for name, tensor in state.items()}, path)


def export_backbone(backbone: "Backbone", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the backbone as safetensors under timm's names; the file appears whole or not at all.

    timm.create_model(NAME, num_classes=0, checkpoint_path=path) reads it.

    Raises WeightsError when the file cannot be written.
    """
    state = {name: x.detach().cpu().contiguous() for name, x in backbone.published.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(state, partial, metadata={"format": "pt", **(metadata or {})})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise WeightsError(f"{path} cannot be written: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that :func:`export_backbone` was given; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with _open(path) as file:
        return file.metadata() or {}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def _read(path: Path) -> State:
    """The tensors of a file by name; of a training checkpoint, those of its best network."""
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: there is no such file")
    if path.suffix == ".safetensors":
        with _open(path):  # for its clear error
            return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO v1 keeps its command line, plain values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path} is not a file of weights, or holds code, which is never run: {error}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not weights by name")
    content = next((content[key] for key in NETWORKS if isinstance(content.get(key), Mapping)), content)
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _without_prefix(state: State) -> State:
    """Names without the "module." that data-parallel wrappers put before them."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _head_name(name: str) -> str:
    """Our name for a tensor of DINO v1's head; our own names stay."""
    renamed = {
        "mlp.weight": "mlp.0.weight",  # a head of one layer is not a Sequential there
        "mlp.bias": "mlp.0.bias",
        "last_layer.weight_v": "last_layer.v",
        "last_layer.weight_g": "last_layer.g",
        "last_layer.parametrizations.weight.original1": "last_layer.v",  # torch's newer weight_norm
        "last_layer.parametrizations.weight.original0": "last_layer.g",
    }
    return renamed.get(name, name)


def _fit_positions(positions: Tensor, backbone: ViT) -> Tensor:
    """Position embeddings for the backbone's grid; as they are where their number fits or no square holds them."""
    patches = positions.shape[1] - 1
    side = math.isqrt(patches)
    if patches == math.prod(backbone.grid) or side * side != patches:
        return positions
    return resample_positions(positions, (side, side), backbone.grid)


def _load(module: nn.Module, state: State, path: Path) -> None:
    """Strict load with one error for everything that does not fit."""
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshaped": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if own[name].shape != state[name].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise WeightsError(
            f"{path} does not fit the {type(module).__name__}: {found}. Is it the same arch and patch size?"
        )
    module.load_state_dict(state)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
