"""Which ViT a set of weights is of, told by the names and shapes of its tensors."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastdino.config import ModelConfig, UserError
from fastdino.model.block import Shape
from fastdino.model.vit import SIZES
from fastdino.model.weights.dialects import Published, State


class WeightsError(UserError, ValueError):
    """A file of weights that cannot be read or does not fit."""


@dataclass(frozen=True)
class Form:
    """What weights decide of the network that they fit; each name is that of a setting of the model, or of data."""

    arch: str
    patch_size: int
    image_size: int | None
    """Side in pixels of the images whose patches have a position embedding each; None with rotary positions."""
    registers: int
    layer_scale: float
    pos_embed: Literal["learned", "rope"]
    interpolation: Literal["offset", "antialias"]
    channels: int = 3
    """Of the images: data.channels."""

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the model by name."""
        return {name: value for name, value in vars(self).items() if name != "channels"}

    @property
    def shape(self) -> Shape:
        return SIZES[self.arch.removeprefix("vit_")]

    def of(self, model: ModelConfig) -> ModelConfig:
        """``model`` in this form."""
        return replace(model, **self.settings)


def recognise(published: Published) -> Form:
    """The form of a backbone.

    Position embeddings are interpolated as their family does it: those of DINOv2 with registers to the new size with
    antialiasing, others by DINO v1's factor. Raises WeightsError, saying what was found, for none of our ViTs.
    """
    state = published.state
    width, patch = _size(state, "cls_token", 2, 3), _size(state, "patch_embed.proj.weight", 3, 4)
    hidden, gated = _size(state, "blocks.0.mlp.fc1.weight", 0, 2), _size(state, "blocks.0.mlp.w3.weight", 1, 2)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    found = Shape(width, depth, 0, hidden or gated, swiglu=not hidden)
    arch = next((name for name, shape in SIZES.items() if shape._replace(num_heads=0) == found), None)
    if arch is None or not patch:
        sizes = {"cls_token": width, "patch_embed.proj.weight": patch, "blocks.0.mlp": hidden or gated}
        lacking = [name for name, size in sizes.items() if not size]
        mlp = f"{'an MLP' if hidden else 'a SwiGLU'} of {hidden or gated}"
        reason = (
            f"looked for {' and '.join(lacking)}, found {some(sorted(state))}" if lacking else
            f"{depth} blocks of width {width} with {mlp}"
        )  # fmt: skip
        raise WeightsError(
            f"names and shapes are those of none of our ViTs ({reason}): name it if it is one of timm's, as in "
            "--arch timm:resnet50"
        )
    patches, registers = _size(state, "pos_embed", 1, 3) - 1, _size(state, "register_tokens", 1, 3)
    side = math.isqrt(max(patches, 0))
    if not published.rotary and (side < 1 or side**2 != patches):
        wrong = (
            f"{patches + 1} position embeddings, not those of a square of patches" if patches > 0 else "no pos_embed"
        )
        raise WeightsError(f"it holds a vit_{arch} with {wrong}")
    return Form(
        arch=f"vit_{arch}",
        patch_size=patch,
        image_size=None if published.rotary else patch * side,
        registers=registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,  # where training starts it
        pos_embed="rope" if published.rotary else "learned",
        interpolation="antialias" if registers and not published.rotary else "offset",
        channels=_size(state, "patch_embed.proj.weight", 1, 4),
    )


def _size(state: State, name: str, axis: int, ndim: int) -> int:
    """Of a tensor along an axis; 0 when there is no such tensor."""
    tensor = state.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim == ndim else 0


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
