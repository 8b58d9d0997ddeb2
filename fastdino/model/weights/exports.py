"""Backbones, written: what timm, Hugging Face and the repositories of DINO load."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fastdino.config import ConfigError
from fastdino.files import whole_file, whole_folder
from fastdino.model.block import NORM_EPS, ROPE_NORM_EPS
from fastdino.model.positions import ROPE_BASE, rope_periods
from fastdino.model.vit import ViT
from fastdino.model.weights.dialects import Published, State, to_published, without_key_biases
from fastdino.model.weights.files import HF_CONFIG, HF_WEIGHTS
from fastdino.model.weights.form import Form, recognise

if TYPE_CHECKING:
    from fastdino.model.network import Backbone

log = logging.getLogger(__name__)

Format = Literal["timm", "hf", "repository", "onnx"]


def export_backbone(
    backbone: "Backbone",
    path: Path,
    metadata: Mapping[str, str] | None = None,
    format: Format = "timm",
    head: nn.Linear | None = None,
) -> str:
    """Writes a backbone, whole or not at all. Returns the Python expression that loads it.

    Args:
        backbone: our ViT in any format; a backbone of timm in timm's.
        path: a file, or the folder of "hf".
        metadata: texts to write beside the weights; a .pth has no place for them.
        format: "timm": safetensors under timm's names. "hf": model.safetensors and config.json of Hugging Face.
            "repository": the names of DINO v1 and v2, those of v3 with rotary positions; .pth or safetensors. A graph
            of ONNX is :func:`fastdino.model.weights.onnx_graph.export_onnx`'s.
        head: a classifier of its features, under timm's names for one; for that format alone.

    What the format has no place for, and what its classes compute otherwise, goes to the log.
    Raises ConfigError when nothing can be written there, or the format has no such network.
    """
    state = {name: x.detach().cpu().contiguous() for name, x in backbone.published.state_dict().items()}
    texts = {"format": "pt", **(metadata or {})}
    assert head is None or format == "timm"
    if not isinstance(backbone, ViT):
        if format != "timm":
            raise ConfigError(f"{backbone.arch} has no names but timm's: leave out --format {format}")
        _write(path, state if head is None else state | _classifier(head, backbone.classifier), texts)
        name = backbone.arch.removeprefix("timm:")
        channels = "" if backbone.channels == 3 else f"in_chans={backbone.channels}, "
        classes = 0 if head is None else head.out_features
        return f'timm.create_model("{name}", num_classes={classes}, {channels}checkpoint_path={str(path)!r})'
    rotary = backbone.pos_embed is None
    form = replace(recognise(Published(state, "DINO", rotary, {})), interpolation=backbone.interpolation)
    state = without_key_biases(state) if rotary else state
    if format == "timm":
        loads = _export_timm(state, form, path, texts, head)
    else:
        loads = {"hf": _export_hf, "repository": _export_repository}[format](state, form, path, texts)
    for remark in _remarks(form, format, "mask_token" in state):
        log.info(remark)
    return loads


def _remarks(form: Form, format: Format, has_mask_token: bool) -> list[str]:
    """What the format has no place for, and what its own classes do otherwise."""
    remarks = []
    if format == "timm" and has_mask_token:
        remarks.append("timm's ViT has no mask token: left out. The formats hf and repository keep it")
    if not form.layer_scale and (format == "hf" or (format == "timm" and form.image_size is None)):
        remarks.append("its class has a LayerScale and this network has none: written as ones, which change nothing")
    family = "antialias" if form.registers else "offset"
    rule = {"timm": "antialias", "hf": family if form.registers else "", "repository": family}[format]
    if form.image_size is not None and rule != form.interpolation:
        remarks.append(
            f"at other sizes than {form.image_size} px features differ: its class interpolates position embeddings "
            f"otherwise than by model.interpolation={form.interpolation}"
        )
    return remarks


# ---------------------------------------------------------------------------------------------------------- timm


def _export_timm(state: State, form: Form, path: Path, texts: dict[str, str], head: nn.Linear | None) -> str:
    state = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    if form.registers and form.image_size is not None:  # there positions are the patches' alone
        positions = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:].contiguous()}
    rotary = form.image_size is None
    state = _with_layer_scale(state, form) if rotary else state
    _write(path, to_published(state, "timm Eva" if rotary else "timm") | _classifier(head, "head"), texts)
    name, options = timm_model(form, 0 if head is None else head.out_features)
    return f'timm.create_model("{name}", {", ".join([*options, f"checkpoint_path={str(path)!r}"])})'


def _classifier(head: nn.Linear | None, name: str) -> State:
    """The tensors of a classifier that timm calls ``name``; none without one."""
    return {} if head is None else {f"{name}.{kind}": x.detach().cpu() for kind, x in head.state_dict().items()}


def timm_model(form: Form, num_classes: int = 0) -> tuple[str, list[str]]:
    """timm's name of the nearest model that it has, and the options that make it the model of ``form``."""
    name, base = _timm_base(form)
    rotary, shape = form.image_size is None, form.shape
    options = [f"num_classes={num_classes}"] + ['global_pool="token"'] * rotary
    if form.channels != 3:
        options.append(f"in_chans={form.channels}")
    if form.patch_size != base.patch_size:
        options.append(f"patch_size={form.patch_size}")
    if form.image_size != base.image_size:
        options.append(f"img_size={form.image_size}")
    if form.arch != base.arch:
        hidden = shape.hidden * (2 if shape.swiglu and not rotary else 1)
        options += [f"embed_dim={shape.width}", f"depth={shape.depth}", f"num_heads={shape.num_heads}"]
        options += [f"mlp_ratio={hidden}/{shape.width}"]
        if shape.swiglu:
            packed = ["mlp_layer=timm.layers.SwiGLUPacked", "act_layer=torch.nn.SiLU"]
            options += ["swiglu_mlp=True", "swiglu_align_to=8"] if rotary else packed
    if form.registers != base.registers:
        options += [f"num_reg_tokens={form.registers}"] if rotary else [f"reg_tokens={form.registers}"]
        options += [] if rotary or base.registers else ["no_embed_class=True"]
    if form.layer_scale != base.layer_scale and not rotary:
        options.append(f"init_values={form.layer_scale}")
    return name, options + ["qkv_bias=True"] * (name == "vit_7b_patch16_dinov3")


def _timm_base(form: Form) -> tuple[str, Form]:
    """A model of timm by name, and its form; of the same arch where timm has that."""
    size = form.arch.removeprefix("vit_")
    if form.image_size is None:
        known = size if size in ("small", "small_plus", "base", "large", "huge_plus", "7b") else "small"
        name = f"vit_{known}_patch16_dinov3" + ("" if known == "7b" else "_qkvb")
        return name, replace(form, arch=f"vit_{known}", patch_size=16, registers=4, layer_scale=1e-5)
    if form.layer_scale and size in ("small", "base", "large", "giant2"):
        reg4 = "_reg4" if form.registers else ""
        base = replace(form, patch_size=14, image_size=518, registers=4 if form.registers else 0)
        return f"vit_{size.removesuffix('2')}_patch14{reg4}_dinov2", base
    known = size if size in ("tiny", "small", "base", "large", "huge", "giant") else "small"
    patch = 14 if known in ("huge", "giant") else 16
    base = replace(form, arch=f"vit_{known}", patch_size=patch, image_size=224, registers=0, layer_scale=0.0)
    return f"vit_{known}_patch{patch}_224", base


def _with_layer_scale(state: State, form: Form) -> State:
    """``state`` with factors of 1 where the network has none."""
    names = [f"blocks.{i}.ls{j}.gamma" for i in range(form.shape.depth) for j in (1, 2)]
    return {name: torch.ones(form.shape.width) for name in names} | state


# -------------------------------------------------------------------------------------------------- Hugging Face


def _export_hf(state: State, form: Form, path: Path, texts: dict[str, str]) -> str:
    config, width = hf_config(form), form.shape.width
    state = _with_layer_scale(state, form)
    state.setdefault("mask_token", torch.zeros(1, width))
    if form.image_size is None:
        state.setdefault("register_tokens", torch.zeros(1, 0, width))
        state["mask_token"] = state["mask_token"].unsqueeze(0)
    with whole_folder(path, {HF_WEIGHTS, HF_CONFIG}) as partial:
        _save(
            partial / HF_WEIGHTS, to_published(state, "HF DINOv3ViT" if form.image_size is None else "HF Dinov2"), texts
        )
        (partial / HF_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return f"transformers.AutoModel.from_pretrained({str(path)!r})"


def hf_config(form: Form) -> dict[str, Any]:
    """config.json of Hugging Face for ``form``. Raises ConfigError when it has no such network."""
    shape, rotary = form.shape, form.image_size is None
    config = {
        "num_hidden_layers": shape.depth, "hidden_size": shape.width, "num_attention_heads": shape.num_heads,
        "patch_size": form.patch_size, "image_size": form.image_size or 224, "num_channels": form.channels,
        "layer_norm_eps": ROPE_NORM_EPS if rotary else NORM_EPS, "layerscale_value": form.layer_scale or 1.0,
        "torch_dtype": "float32",
    }  # fmt: skip
    if rotary:
        return config | {
            "model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], "intermediate_size": shape.hidden,
            "hidden_act": "silu" if shape.swiglu else "gelu", "use_gated_mlp": shape.swiglu, "rope_theta": ROPE_BASE,
            "query_bias": True, "key_bias": False, "value_bias": True, "num_register_tokens": form.registers,
        }  # fmt: skip
    ratios = [ratio for ratio in range(1, 17) if _dinov2_hidden(ratio * shape.width, shape.swiglu) == shape.hidden]
    if not ratios:
        raise ConfigError(
            f"{form.arch} has an MLP of width {shape.hidden}, and Hugging Face's Dinov2 has widths that are a whole "
            f"multiple of {shape.width}: use --format timm or repository"
        )
    config |= {"hidden_act": "gelu", "mlp_ratio": ratios[0], "use_swiglu_ffn": shape.swiglu, "qkv_bias": True}
    if form.registers:
        registers = {"architectures": ["Dinov2WithRegistersModel"], "num_register_tokens": form.registers}
        return config | {"model_type": "dinov2_with_registers", **registers}
    return config | {"model_type": "dinov2", "architectures": ["Dinov2Model"]}


def _dinov2_hidden(width: int, swiglu: bool) -> int:
    """Of the MLP that DINOv2 makes of a ratio: two thirds of it with a gate, rounded up to a multiple of 8."""
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


# ---------------------------------------------------------------------------------------------- the repositories


def _export_repository(state: State, form: Form, path: Path, texts: dict[str, str]) -> str:
    rotary, shape = form.image_size is None, form.shape
    if rotary or form.registers or form.layer_scale or shape.swiglu:  # newer than v1
        state.setdefault("mask_token", torch.zeros(1, shape.width))
    theirs = to_published(state, "DINOv3" if rotary else "DINO")
    if rotary:
        theirs["rope_embed.periods"] = rope_periods(shape.width // shape.num_heads)
        mask = torch.cat([torch.full((shape.width,), x) for x in (1.0, 0.0, 1.0)])
        theirs |= {f"blocks.{i}.attn.qkv.bias_mask": mask.clone() for i in range(shape.depth)}
    _write(path, theirs, texts)
    reads = "torch.load({!r}, weights_only=True)" if path.suffix == ".pth" else "safetensors.torch.load_file({!r})"
    return f"model.load_state_dict({reads.format(str(path))})"


# -------------------------------------------------------------------------------------------------------- files


def _write(path: Path, state: State, texts: dict[str, str]) -> None:
    with whole_file(path) as partial:
        _save(partial, state, texts, as_pickle=path.suffix == ".pth")


def _save(path: Path, state: State, texts: dict[str, str], as_pickle: bool = False) -> None:
    try:
        if as_pickle:
            torch.save({name: _alone(tensor) for name, tensor in state.items()}, path)
        else:
            path.touch()
            mode = path.stat().st_mode
            save_file(state, path, metadata=texts)
            path.chmod(mode)  # safetensors makes a file that its owner alone may read
    except (SafetensorError, RuntimeError) as error:  # their words for what the disk refused
        raise OSError(str(error)) from error


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Without what it may be a part of, which a pickle would hold whole."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
