"""Named runs. A recipe is a function that returns a Config; its docstring states command, cost and expected score.

A recipe without a published score says so. Scores are ImageNet-1k top-1 with frozen features of the teacher.
"""

import difflib
import inspect
from collections.abc import Callable

from fastdino.config import Config, ConfigError
from fastdino.recipes.convnets import resnet50
from fastdino.recipes.demo import demo
from fastdino.recipes.dino import vit_base_16, vit_large_16, vit_small_8, vit_small_16, vit_small_16_300
from fastdino.recipes.dinov2 import dinov2_vit_base_16, dinov2_vit_giant_14, dinov2_vit_large_16, dinov2_vit_small_16
from fastdino.recipes.small import small

RECIPES: dict[str, Callable[..., Config]] = {
    recipe.__name__: recipe
    for recipe in (
        vit_small_16, vit_small_16_300, vit_small_8, vit_base_16, vit_large_16, resnet50,
        dinov2_vit_small_16, dinov2_vit_base_16, dinov2_vit_large_16, dinov2_vit_giant_14, small, demo,
    )
}  # fmt: skip


def get(name: str, global_size: int | None = None) -> Config:
    """The recipe of that name. Raises ConfigError, with the nearest name, for one that does not exist.

    Args:
        global_size: side of a global view in pixels, for a recipe whose other sizes follow it; others leave it aside.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
        raise ConfigError(f"no recipe {name!r}: {hint}")
    recipe = RECIPES[name]
    follows = global_size is not None and "global_size" in inspect.signature(recipe).parameters
    return recipe(global_size) if follows else recipe()
