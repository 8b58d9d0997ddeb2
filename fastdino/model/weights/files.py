"""Files of weights, read: safetensors, PyTorch's own, and folders of Hugging Face. No code is unpickled."""

import argparse
import codecs
import functools
import json
import logging
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, ModelConfig
from fastdino.model.block import Attention, SwiGlu
from fastdino.model.head import Head
from fastdino.model.positions import ROPE_BASE, rope_periods
from fastdino.model.vit import ViT
from fastdino.model.weights.dialects import ROTARY, Published, State, below, best_prefix, from_published
from fastdino.model.weights.form import Form, WeightsError, recognise, some

if TYPE_CHECKING:
    from fastdino.model.network import Backbone

log = logging.getLogger(__name__)

NETWORKS = (  # where training checkpoints keep weights, best first
    "teacher", "state_dict_ema", "model_ema", "ema", "model", "state_dict", "student",
)  # fmt: skip
_scalar: Any = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [  # what training checkpoints keep beside weights, a command line, numbers and paths: no code
    argparse.Namespace, PosixPath, codecs.encode, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    (_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar"),
]  # fmt: skip
CLASSIFIERS = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias")
HEAD_NAMES = {  # of DINO's head, v1 and v2: ours
    "mlp.weight": "mlp.0.weight",  # a head of one layer is not a Sequential there
    "mlp.bias": "mlp.0.bias",
    "last_layer.weight_v": "last_layer.v",
    "last_layer.weight_g": "last_layer.g",
    "last_layer.parametrizations.weight.original1": "last_layer.v",  # torch's newer weight_norm
    "last_layer.parametrizations.weight.original0": "last_layer.g",
}
PATCH_HEADS = ("ibot_head", "patch_head")  # the word of its names that tells DINOv2's second head
HF_WEIGHTS, HF_INDEX, HF_CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def is_weights_folder(path: Path) -> bool:
    """True for a folder that is, or claims to be, one of Hugging Face; a run folder is none."""
    if (path / HF_WEIGHTS).is_file() or (path / HF_INDEX).is_file():
        return True
    try:
        return "model_type" in json.loads((path / HF_CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_backbone(backbone: "Backbone", path: Path) -> None:
    """Copies the weights in ``path`` into ``backbone``; every parameter must be there, with its name and shape.

    Args:
        backbone: our ViT or a backbone of timm.
        path: .safetensors, a .pth read with weights_only=True, or a folder of Hugging Face. A state dict, or a training
            checkpoint, of which the averaged weights are taken if it has them: the teacher, or an EMA beside the plain
            ones. Wrappers' prefixes (module., _orig_mod., model., backbone. and any other, in any nesting) and heads
            are dropped. For our ViT in any dialect, see :mod:`fastdino.model.weights.dialects`.

    Our ViT takes over the grid of the file's position embeddings. A mask token is taken where the ViT has one; where
    the file has none, it starts at zeros, and the log says so.
    Raises WeightsError naming all that is missing, unexpected or misshaped.
    """
    backbone.published.load_state_dict(backbone_state(backbone, path))


def backbone_state(backbone: "Backbone", path: Path, whole: bool = True) -> State:
    """What :func:`load_backbone` loads, which may lie in the file until it is read.

    ``whole``: see :func:`fastdino.model.weights.dialects.from_published`.
    """
    module, state = backbone.published, read(path)
    own = module.state_dict()
    if isinstance(backbone, ViT):
        published = from_published(state, whole)
        _check_config(path, backbone)
        _check_periods(path, backbone, published)
        _remark(path, published)
        state = _with_mask_token(path, published.state, own)
        own |= {"pos_embed": state["pos_embed"]} if _other_grid(state, own) else {}
    else:
        state = below(state, best_prefix(state, own)[0])
    state = {name: tensor for name, tensor in state.items() if name in own or name not in CLASSIFIERS}
    _check(type(module).__name__, own, state, path, "Are arch, patch size and data.channels the same?")
    if isinstance(backbone, ViT) and _other_grid(state, module.state_dict()):
        backbone.keep_grid_of(state["pos_embed"])
    return state


def load_head(head: Head, path: Path, patches: bool = False) -> None:
    """Copies a projection head in ``path`` into ``head``: DINO v1's or v2's, from a full training checkpoint.

    Args:
        head: ours. The lengths of its prototypes become the file's; the log says so where they are frozen and not 1.
        path: a file, as for :func:`load_backbone`.
        patches: take DINOv2's second head, which is the patches'.

    Raises WeightsError for a file without such a head, and naming all that is missing, unexpected or misshaped.
    """
    head.load_state_dict(head_state(head, path, patches))


def head_state(head: nn.Module, path: Path, patches: bool = False) -> State:
    """What :func:`load_head` loads, which may lie in the file until it is read."""
    assert isinstance(head, Head)
    own = head.state_dict()
    state = {name: x for name, x in read(path).items() if patches != {*name.split(".")}.isdisjoint(PATCH_HEADS)}
    ours = {_renamed(name): tensor for name, tensor in state.items()}
    found = below(ours, best_prefix(ours, own)[0])
    if own.keys().isdisjoint(found):
        kind = f"head for patches ({', '.join(PATCH_HEADS)})" if patches else "projection head"
        raise WeightsError(f"{path} holds no {kind}: a full training checkpoint does, a released backbone not")
    _check(type(head).__name__, own, found, path, "Are num_prototypes, hidden_dim and the other widths the same?")
    frozen = not head.last_layer.g.requires_grad
    if frozen and not torch.allclose(found["last_layer.g"].float(), torch.ones(1)):
        _say(f"{path} has prototypes of other lengths than 1, and freeze_prototype_norm keeps them: set it to False")
    return found


def form_of(path: Path) -> Form:
    """Which of our ViTs the weights at ``path`` are of. Raises WeightsError when they are of none."""
    state = read(path)
    try:
        return recognise(from_published(state, whole=False))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def settled(config: Config) -> Config:
    """``config`` with the model's form as model.weights have it: registers, LayerScale, positions and their grid.

    The log says what was asked for otherwise and has no effect. Raises ConfigError when the weights are of another arch
    or patch size than the model or of images with other channels, or have another number of registers or another grid
    than it asks for.
    """
    model = config.model
    if model.weights is None or not model.is_vit:
        return config
    form = form_of(model.weights)
    asked = {"arch": model.arch, "patch_size": model.patch_size, "registers": model.registers}
    asked["image_size"] = None if model.image_size is None or form.image_size is None else model.image_size
    if form.channels != config.data.channels:
        raise ConfigError(
            f"model.weights={str(model.weights)!r} are of images with {form.channels} channels, and data.channels="
            f"{config.data.channels}: set data.channels={form.channels}, or start from other weights or from noise"
        )
    differ = [name for name, value in asked.items() if value is not None and value != getattr(form, name)]
    if differ:
        theirs = ", ".join(f"{name} {getattr(form, name)}" for name in asked)
        ours = ", ".join(f"{name} {asked[name]}" for name in differ)
        flags = {f"model.{name}": getattr(form, name) for name in differ} | _whole_views(config, form.patch_size)
        typed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
        raise ConfigError(
            f"model.weights={str(model.weights)!r} has {theirs}, and the run asks for {ours}: start it with {typed}, "
            "or from other weights"
        )
    for name, value in form.settings.items():
        was = getattr(model, name)
        if was not in (value, getattr(ModelConfig(), name)):
            log.warning("model.%s=%s has no effect: model.weights have %s", name, was, value)
    return replace(config, model=form.of(model))


def _whole_views(config: Config, patch_size: int) -> dict[str, int]:
    """Sizes of views that are not whole patches, rounded up to such."""
    names = ["global_size", "local_size"] if config.views.num_local else ["global_size"]
    sizes = {f"views.{name}": getattr(config.views, name) for name in names}
    return {name: -(-size // patch_size) * patch_size for name, size in sizes.items() if size % patch_size}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that were exported with the weights; empty for other files."""
    path = path / HF_WEIGHTS if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with _open(path) as file:
        return file.metadata() or {}


def read(path: Path) -> State:
    """The tensors of a file or a folder by name; of a training checkpoint, those of its best network.

    They are maps of the file, of which memory is taken for what is read. PyTorch's format of before 1.6, which is no
    archive, is read whole.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: there is no such file")
    if path.suffix == ".safetensors":
        with _open(path):  # for its clear error
            return load_file(path)
    try:
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds code, {code[1]}, which is never run" if code else f"is not a file of weights: {error}"
        raise WeightsError(f"{path} {reason}. Save its state_dict() alone, or as .safetensors") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not weights by name")
    networks = (content[key] for key in NETWORKS if key in content)
    content = next((network for network in networks if network and isinstance(network, Mapping)), content)
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _read_folder(path: Path) -> State:
    """Of Hugging Face: one file, or several that an index names."""
    whole = (path / HF_WEIGHTS).is_file()
    if not (path / HF_CONFIG).is_file() or not (whole or (path / HF_INDEX).is_file()):
        found = sorted(file.name for file in path.iterdir())
        run = f". It is a run: write its backbone to a file by fastdino export {path}" if "checkpoints" in found else ""
        raise WeightsError(
            f"{path} is no folder of weights: looked for {HF_CONFIG} beside {HF_WEIGHTS} or {HF_INDEX}, found "
            f"{some(found) or 'nothing'}{run}"
        )
    if whole:
        return read(path / HF_WEIGHTS)
    places = _json(path / HF_INDEX).get("weight_map")
    files: set[Any] = {*places.values()} if isinstance(places, dict) else {None}
    if not all(isinstance(file, str) and file == Path(file).name for file in files):
        raise WeightsError(f"{path / HF_INDEX} is no index of files beside it: looked for weight_map, name to file")
    return {name: tensor for file in sorted(files) for name, tensor in read(path / file).items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__}, not settings by name")
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def _check_config(path: Path, vit: ViT) -> None:
    """Raises WeightsError when a folder's config.json tells of a network that computes otherwise than ``vit``."""
    theirs = _json(path / HF_CONFIG) if path.is_dir() else {}
    heads = next(layer.num_heads for layer in vit.modules() if isinstance(layer, Attention))
    gated = any(isinstance(layer, SwiGlu) for layer in vit.modules())
    ours: dict[str, Any] = {"num_attention_heads": heads, "layer_norm_eps": vit.norm.eps, "rope_theta": ROPE_BASE}
    if vit.pos_embed is None:
        ours["hidden_act"] = "silu" if gated else "gelu"
    differ = [f"{name} {theirs[name]} for {x}" for name, x in ours.items() if theirs.get(name, x) != x]
    if differ:
        raise WeightsError(f"{path / HF_CONFIG} is of another network than our ViT of its shapes: {', '.join(differ)}")


def _check_periods(path: Path, vit: ViT, published: Published) -> None:
    """Raises WeightsError for rotary positions of another base; files have the periods rounded to bf16."""
    ours = rope_periods(vit.head_width)
    for theirs in (x.float() for name, x in published.ignored.items() if name.endswith("periods")):
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-2):
            found = some([f"{x:.4g}" for x in theirs.flatten().tolist()])
            raise WeightsError(f"{path} has rotary positions of other periods than ours: {found}")


def _remark(path: Path, published: Published) -> None:
    """Logs the licence of DINOv3's weights and what of a file is left out."""
    if published.dialect in ROTARY and "config" not in read_metadata(path):
        _say(f"{path}: released weights of DINOv3 are under the DINOv3 License; it binds what is made of them too")
    if norms := [name for name in published.ignored if "local_cls_norm" in name]:
        _say(f"{path}: left out {', '.join(norms)}, which evaluation does not use")


@functools.cache
def _say(text: str) -> None:
    """Logs it once: student and teacher load the same file."""
    log.info(text)


def _with_mask_token(path: Path, state: State, own: State) -> State:
    """``state`` with a mask token exactly where ``own`` has one."""
    if "mask_token" not in own:
        return {name: tensor for name, tensor in state.items() if name != "mask_token"}
    if "mask_token" not in state:
        _say(f"{path} has no mask token: it starts at zeros")
    return {"mask_token": torch.zeros(own["mask_token"].shape), **state}


def _other_grid(state: State, own: State) -> bool:
    """Whether ``state`` has the position embeddings of a square of patches, as many as ``own`` has not."""
    theirs, ours = state.get("pos_embed"), own.get("pos_embed")
    if theirs is None or ours is None or theirs.ndim != 3 or theirs.shape[::2] != ours.shape[::2]:
        return False
    patches = theirs.shape[1] - 1
    return patches != ours.shape[1] - 1 and patches > 0 and math.isqrt(patches) ** 2 == patches


def _renamed(name: str) -> str:
    """A name of DINO's head, whatever its prefix, as ours; our own names stay."""
    for theirs, ours in HEAD_NAMES.items():
        if name == theirs or name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    return name


def _check(kind: str, own: State, state: State, path: Path, hint: str) -> None:
    """Raises WeightsError naming everything in ``state`` that does not fit ``own``."""
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
        found = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names)
        raise WeightsError(f"{path} does not fit the {kind}: {found}. {hint}")
