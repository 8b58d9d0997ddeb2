"""Parameter groups: which parameters share weight decay and freezing; and each one's learning rate."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastdino.config import OptimConfig


@dataclass(frozen=True)
class Group:
    """Trainable parameters that share weight decay and freezing, by name."""

    name: str
    regularized: bool  # gets weight decay, and under LARS the trust ratio
    last_layer: bool
    params: dict[str, nn.Parameter]

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(p.numel() for p in self.params.values())


def parameter_groups(network: nn.Module) -> list[Group]:
    """The trainable parameters of ``network`` in groups: decay, no_decay, last_layer; empty ones left out.

    Biases and 1-D parameters take no weight decay, everything else does, tokens and position embeddings included. The
    prototypes (names with ``last_layer``) are apart so that they can be frozen. Source: DINO v1's get_params_groups.
    """
    groups: dict[str, Group] = {}
    for name, param in network.named_parameters():
        if param.requires_grad:
            regularized = not (name.endswith(".bias") or param.ndim == 1)
            last_layer = "last_layer" in name
            key = ("last_layer_" if last_layer else "") + ("decay" if regularized else "no_decay")
            groups.setdefault(key, Group(key, regularized, last_layer, {})).params[name] = param
    return [groups[key] for key in ("decay", "no_decay", "last_layer_decay", "last_layer_no_decay") if key in groups]


def lr_scales(names: Iterable[str], optim: OptimConfig) -> dict[str, float]:
    """What multiplies the learning rate of each parameter: 1 for all, or by its depth in our ViT.

    ``layer_decay ** (depth + 1 - layer)``. Layer 0 holds the tokens, the positions and the patch embedding, the last of
    which is multiplied by ``patch_embed_lr`` besides; block i is layer i + 1; the final norm and the heads have 1.
    Source: DINOv2's param_groups; Clark et al. 2020, layer-wise decay.
    """
    names = list(names)
    blocks = {name: int(match[1]) for name in names if (match := re.match(r"backbone\.blocks\.(\d+)\.", name))}
    depth = 1 + max(blocks.values(), default=-1)
    scales = dict.fromkeys(names, 1.0)
    for name in names:
        if name.startswith("backbone.") and not name.startswith("backbone.norm."):
            scales[name] = optim.layer_decay ** (depth - blocks.get(name, -1))
        if name.startswith("backbone.patch_embed."):
            scales[name] *= optim.patch_embed_lr
    return scales
