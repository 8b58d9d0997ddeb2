"""The names under which backbones are published, beside ours: one table, read in both directions.

Ours are those of DINO v1 and DINOv2. A dialect says where its names differ: a tensor of ours is one of theirs, or
several of theirs one below the other (queries, keys and values; the two halves of a gated MLP).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Table = Mapping[str, tuple[str, ...]]  # our name, a block's number as *: their names, one below the other

OURS = (
    "cls_token register_tokens mask_token pos_embed patch_embed.proj.+ norm.+ blocks.*.norm1.+ blocks.*.attn.qkv.+ "
    "blocks.*.attn.proj.+ blocks.*.ls1.gamma blocks.*.norm2.+ blocks.*.mlp.fc1.+ blocks.*.mlp.fc2.+ "
    "blocks.*.mlp.w12.+ blocks.*.mlp.w3.+ blocks.*.ls2.gamma"
)
"""Every name of ours; + stands for weight and bias."""
MLP, GATED = "blocks.*.mlp.fc", "blocks.*.mlp.w"  # how the names of the one and of the other begin
NONE = "0"  # a part that they lack: zeros here
IGNORED = re.compile(r"(attn\.qkv\.bias_mask|rope_embed\.periods|local_cls_norm\.\w+)$")
AVERAGED = ("teacher", "ema", "momentum")  # what the prefix of averaged weights has in it


def _table(theirs: dict[str, str]) -> Table:
    """A dialect from the names in which it differs from ours."""
    table = {}
    for path in OURS.split():
        for kind in ("weight", "bias") if path.endswith("+") else ("",):
            name = path.replace("+", kind)
            found = theirs.get(name, theirs.get(path, path))
            table[name] = tuple(found.replace("+", kind).split())
    return table


_HF_BLOCK = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "blocks.*.norm1.+": "layer.*.norm1.+",
    "blocks.*.attn.qkv.+": "layer.*.attention.q_proj.+ layer.*.attention.k_proj.+ layer.*.attention.v_proj.+",
    "blocks.*.attn.proj.+": "layer.*.attention.o_proj.+",
    "blocks.*.ls1.gamma": "layer.*.layer_scale1.lambda1",
    "blocks.*.norm2.+": "layer.*.norm2.+",
    "blocks.*.mlp.w12.+": "layer.*.mlp.gate_proj.+ layer.*.mlp.up_proj.+",
    "blocks.*.mlp.w3.+": "layer.*.mlp.down_proj.+",
    "blocks.*.ls2.gamma": "layer.*.layer_scale2.lambda1",
}
_HF_DINOV3 = {
    **_HF_BLOCK,
    "patch_embed.proj.+": "embeddings.patch_embeddings.+",
    "blocks.*.attn.qkv.bias": f"layer.*.attention.q_proj.bias {NONE} layer.*.attention.v_proj.bias",
    "blocks.*.mlp.fc1.+": "layer.*.mlp.up_proj.+",
    "blocks.*.mlp.fc2.+": "layer.*.mlp.down_proj.+",
}
_HF_DINOV2_IN_MEMORY = {
    **{ours: theirs.replace("layer.", "encoder.layer.") for ours, theirs in _HF_BLOCK.items()},
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.+": "embeddings.patch_embeddings.projection.+",
    "blocks.*.mlp.fc1.+": "encoder.layer.*.mlp.fc1.+",
    "blocks.*.mlp.fc2.+": "encoder.layer.*.mlp.fc2.+",
    "norm.+": "layernorm.+",
}
_HF_DINOV2 = {
    **_HF_DINOV2_IN_MEMORY,
    "blocks.*.attn.qkv.+": " ".join(f"encoder.layer.*.attention.attention.{x}.+" for x in ("query", "key", "value")),
    "blocks.*.attn.proj.+": "encoder.layer.*.attention.output.dense.+",
    "blocks.*.mlp.w12.+": "encoder.layer.*.mlp.weights_in.+",
    "blocks.*.mlp.w3.+": "encoder.layer.*.mlp.weights_out.+",
}
DIALECTS: dict[str, Table] = {
    "timm": _table(  # VisionTransformer
        {
            "register_tokens": "reg_token",
            "blocks.*.mlp.w12.+": "blocks.*.mlp.fc1.+",
            "blocks.*.mlp.w3.+": "blocks.*.mlp.fc2.+",
        }
    ),
    "timm Eva": _table(
        {
            "register_tokens": "reg_token",
            "blocks.*.attn.qkv.bias": f"blocks.*.attn.q_bias {NONE} blocks.*.attn.v_bias",
            "blocks.*.ls1.gamma": "blocks.*.gamma_1",
            "blocks.*.mlp.w12.+": "blocks.*.mlp.fc1_g.+ blocks.*.mlp.fc1_x.+",
            "blocks.*.mlp.w3.+": "blocks.*.mlp.fc2.+",
            "blocks.*.ls2.gamma": "blocks.*.gamma_2",
        }
    ),
    "DINO": _table({}),  # v1 and v2
    "DINOv3": _table(
        {"register_tokens": "storage_tokens", "blocks.*.mlp.w12.+": "blocks.*.mlp.w1.+ blocks.*.mlp.w2.+"}
    ),
    "HF Dinov2": _table(_HF_DINOV2),
    "HF Dinov2 in memory": _table(_HF_DINOV2_IN_MEMORY),
    "HF DINOv3ViT": _table(_HF_DINOV3),
    "HF DINOv3ViT in memory": _table({k: x.replace("layer.*", "model.layer.*") for k, x in _HF_DINOV3.items()}),
}
"""Of dialects that fit a file equally well the first is taken; they say the same of it."""
ROTARY = ("timm Eva", "DINOv3", "HF DINOv3ViT", "HF DINOv3ViT in memory")  # dialects of networks with rotary positions


class Rows(list[Tensor]):
    """Tensors of two or more dimensions, one below the other, in the place of the one that they would be."""

    @property
    def ndim(self) -> int:
        return self[0].ndim

    @property
    def shape(self) -> torch.Size:
        return torch.Size([sum(len(x) for x in self), *self[0].shape[1:]])


class Published(NamedTuple):
    """What a file holds of a backbone."""

    state: State
    """Under our names; what no rule of the dialect knows keeps its own."""
    dialect: str
    rotary: bool
    """It has rotary positions, no position embeddings."""
    ignored: State
    """Under their names, what our ViT has no place for."""


def from_published(state: State, whole: bool = True) -> Published:
    """The backbone in ``state`` under our names, whatever its dialect and prefix; other tensors are left out.

    Without ``whole`` nothing large is copied: what is one tensor of ours and several of theirs is :class:`Rows`.

    Of several networks that a training checkpoint holds the averaged one is taken. What a dialect leaves out is made
    good: zeros for the position of CLS, which timm adds to the token, and for biases of queries, keys and values.
    """
    state = {re.sub(r"(^|\.)blocks\.\d+\.(?=\d+\.)", r"\1blocks.", name): x for name, x in state.items()}
    prefixes = {dialect: best_prefix(state, _names(table)) for dialect, table in DIALECTS.items()}
    dialect = max(prefixes, key=lambda dialect: prefixes[dialect][1])
    found = {name: x for name, x in below(state, prefixes[dialect][0]).items() if x.numel()}  # 0 registers are none
    ignored = {name: x for name, x in found.items() if IGNORED.search(name)}
    ours = _renamed({name: x for name, x in found.items() if name not in ignored}, DIALECTS[dialect], whole)
    ours = _with_zeros(ours)
    keys = [x.tensor_split(3)[1] for name, x in ours.items() if name.endswith("attn.qkv.bias") and x.ndim]
    rotary = "pos_embed" not in ours and (dialect in ROTARY or not any(x.any() for x in keys))
    if rotary:  # DINOv3's own files have a bias of keys, and beside it a mask that says that it is none
        ours = without_key_biases(ours)
    return Published(ours, dialect, rotary, ignored)


def to_published(state: State, dialect: str) -> State:
    """``state``, under our names, under those of ``dialect``. Biases that it lacks, which are zeros, are left out."""
    theirs: State = {}
    for name, tensor in state.items():
        pattern, number = _pattern(name)
        names = DIALECTS[dialect][pattern]
        for part, rows in zip(names, tensor.chunk(len(names)), strict=True):
            if part != NONE:
                theirs[part.replace("*", number)] = rows.contiguous()
    return theirs


def without_key_biases(state: State) -> State:
    """``state``, under our names, with zeros for the biases of keys: a softmax cancels them, a rotation does not."""
    state = {**state}
    for name, bias in state.items():
        if name.endswith("attn.qkv.bias") and bias.ndim:
            queries, keys, values = bias.tensor_split(3)
            state[name] = torch.cat([queries, torch.zeros_like(keys), values])
    return state


def best_prefix(state: Iterable[str], known: Iterable[str]) -> tuple[str, int]:
    """The prefix under which most of the names ``known``, with blocks' numbers as *, are found; and how many are.

    Of several with as many, that of averaged weights comes first and a student's last, then the shortest.
    """
    found: Counter[str] = Counter()
    known = {_pattern(name)[0] for name in known}
    for name in state:
        words = name.split(".")
        found.update(".".join([*words[:i], ""]) for i in range(len(words)) if _pattern(".".join(words[i:]))[0] in known)

    def order(prefix: str) -> tuple[int, bool, bool, int, str]:
        words = {*re.split(r"[._]", prefix)}
        return -found[prefix], words.isdisjoint(AVERAGED), "student" in words, len(prefix), prefix

    prefix = min(found, key=order, default="")
    return prefix, found[prefix]


def below(state: State, prefix: str) -> State:
    """The tensors under ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _pattern(name: str) -> tuple[str, str]:
    """A name with the number of its block as *, and the number."""
    found = re.match(r"((?:\w+\.)*?(?:blocks|layer)\.)(\d+)(\..*)", name)
    return (f"{found[1]}*{found[3]}", found[2]) if found else (name, "")


def _names(table: Table) -> set[str]:
    return {name for names in table.values() for name in names} - {NONE}


def _renamed(state: State, table: Table, whole: bool) -> State:
    """``state``, under the names of ``table``, under ours; tensors that it does not know, or only in part, stay."""
    unused = MLP if _is_gated(state, table) else GATED
    places = {
        name: (ours, i)
        for ours, names in table.items()
        for i, name in enumerate(names)
        if name != NONE and not ours.startswith(unused)
    }
    parts: dict[tuple[str, str], dict[int, str]] = {}
    ours: State = {}
    for name, tensor in state.items():
        pattern, number = _pattern(name)
        if pattern in places:
            target, i = places[pattern]
            parts.setdefault((target, number), {})[i] = name
        else:
            ours[name] = tensor
    for (target, number), found in parts.items():
        names, there = table[target], [state[name] for name in found.values()]
        if len(there) == len(names) - names.count(NONE) and len({x.shape[1:] for x in there}) == 1:
            rows = [state[found[i]] if i in found else torch.zeros_like(there[0]) for i in range(len(names))]
            ours[target.replace("*", number)] = rows[0] if len(rows) == 1 else _joined(rows, whole)
        else:
            ours |= {name: state[name] for name in found.values()}
    return ours


def _joined(rows: list[Tensor], whole: bool) -> Any:
    return torch.cat(rows) if whole or rows[0].ndim < 2 else Rows(rows)


def _is_gated(state: State, table: Table) -> bool:
    """Whether the MLP's first layer is twice as wide as what its last one takes."""
    into, down = (
        [state.get(name.replace("*", "0")) for name in table[f"blocks.*.mlp.{layer}.weight"]] for layer in ("w12", "w3")
    )
    rows = [x.shape[0] for x in into if x is not None and x.ndim == 2]
    width = 0 if down[0] is None or down[0].ndim != 2 else down[0].shape[1]
    return len(rows) == len(into) and sum(rows) == 2 * width


def _with_zeros(state: State) -> State:
    """``state`` and what its dialect leaves out; see :func:`from_published`."""
    state = {**state}
    positions, mask = state.get("pos_embed"), state.get("mask_token")
    if positions is not None and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if mask is not None:
        state["mask_token"] = mask.reshape(1, -1)
    for name, weight in [*state.items()]:
        if name.endswith("attn.qkv.weight"):
            state.setdefault(name.replace("weight", "bias"), torch.zeros(weight.shape[0]))
    return state
