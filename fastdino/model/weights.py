"""Weights in and out of files: safetensors with timm's names; DINO v1's checkpoints are read. No code is unpickled."""

import argparse
import codecs
import math
import pickle
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdino.config import UserError
from fastdino.files import whole_file
from fastdino.model.vit import SIZES

if TYPE_CHECKING:
    from fastdino.model.network import Backbone

State = dict[str, Tensor]

NETWORKS = (  # where training checkpoints keep weights, best first
    "teacher", "state_dict_ema", "model_ema", "ema", "model", "state_dict", "student",
)  # fmt: skip
_scalar: Any = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [  # what training checkpoints keep beside weights, a command line, numbers and paths: no code
    argparse.Namespace, PosixPath, codecs.encode, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    (_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar"),
]  # fmt: skip
AVERAGED = ("teacher", "ema", "momentum")  # what the prefix of averaged weights has in it
CLASSIFIERS = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias")
HEAD_NAMES = {  # of DINO v1's head: ours
    "mlp.weight": "mlp.0.weight",  # a head of one layer is not a Sequential there
    "mlp.bias": "mlp.0.bias",
    "last_layer.weight_v": "last_layer.v",
    "last_layer.weight_g": "last_layer.g",
    "last_layer.parametrizations.weight.original1": "last_layer.v",  # torch's newer weight_norm
    "last_layer.parametrizations.weight.original0": "last_layer.g",
}


class WeightsError(UserError, ValueError):
    """A file of weights that cannot be read or does not fit."""


def load_backbone(backbone: "Backbone", path: Path) -> None:
    """Copies the weights in ``path`` into ``backbone``; every parameter must be there, with its name and shape.

    Args:
        backbone: our ViT or a backbone of timm.
        path: .safetensors, or a .pth read with weights_only=True: a state dict, or a training checkpoint, of which the
            averaged weights are taken if it has them: the teacher, or an EMA beside the plain ones. Wrappers' prefixes
            (module., _orig_mod., model., backbone. and any other, in any nesting) and heads are dropped.

    A backbone may change what it is given to fit, as our ViT does with position embeddings of another square grid.
    Raises WeightsError naming all that is missing, unexpected or misshaped.
    """
    published = backbone.published
    own = published.state_dict()
    state = _below_prefix(_read(path), own.keys())
    state = {name: tensor for name, tensor in state.items() if name in own or name not in CLASSIFIERS}
    _load(published, backbone.fitted(state), path)


def load_head(head: nn.Module, path: Path) -> None:
    """Copies the projection head in ``path`` into ``head``: ours, or one of DINO v1 from a training checkpoint.

    Raises WeightsError for a file without a head, and naming all that is missing, unexpected or misshaped.
    """
    state, own = _read(path), head.state_dict().keys()
    ours = {_renamed(name): tensor for name, tensor in state.items()}
    found = _below_prefix(ours, own)
    if not own & found.keys():
        raise WeightsError(f"{path} holds no projection head: a full training checkpoint does, a released backbone not")
    _load(head, found, path)


def find_vit(path: Path) -> tuple[str, int, int]:
    """Which of our ViTs a file holds, by its shapes: model.arch, the side of a patch and that of an image in pixels.

    Raises WeightsError when it holds none of them.
    """
    marks = {"cls_token", "pos_embed", "patch_embed.proj.weight"}
    state = _below_prefix(_read(path), marks)
    if marks <= state.keys():
        width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        sizes = [name for name, shape in SIZES.items() if (shape.width, shape.depth) == (width, depth)]
        if sizes:
            return f"vit_{sizes[0]}", patch, patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    raise WeightsError(
        f"{path} does not say which backbone it holds, and its shapes are those of none of our ViTs: name it, as in "
        "--arch timm:resnet50"
    )


def export_backbone(backbone: "Backbone", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the backbone as safetensors under timm's names; the file appears whole or not at all.

    timm.create_model(NAME, num_classes=0, checkpoint_path=path) reads it.

    Raises ConfigError when the file cannot be written.
    """
    state = {name: x.detach().cpu().contiguous() for name, x in backbone.published.state_dict().items()}
    with whole_file(path) as partial:
        try:
            save_file(state, partial, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # its word for what the disk refused
            raise OSError(str(error)) from error


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
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds code, {code[1]}, which is never run" if code else f"is not a file of weights: {error}"
        raise WeightsError(f"{path} {reason}. Save its state_dict() alone, or as .safetensors") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not weights by name")
    networks = (content[key] for key in NETWORKS if key in content)
    content = next((network for network in networks if network and isinstance(network, Mapping)), content)
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _below_prefix(state: State, own: Collection[str]) -> State:
    """The tensors under one prefix, without it: the prefix under which most of the names ``own`` are found.

    Of several with as many, that of averaged weights comes first and a student's last, then the shortest.
    """
    found: Counter[str] = Counter()
    for name in state:
        words = name.split(".")
        found.update(".".join([*words[:i], ""]) for i in range(len(words)) if ".".join(words[i:]) in own)

    def order(prefix: str) -> tuple[int, bool, bool, int, str]:
        words = {*re.split(r"[._]", prefix)}
        return -found[prefix], words.isdisjoint(AVERAGED), "student" in words, len(prefix), prefix

    prefix = min(found, key=order, default="")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    """A name of DINO v1's head, whatever its prefix, as ours; our own names stay."""
    for theirs, ours in HEAD_NAMES.items():
        if name == theirs or name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    return name


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
