"""fastdino: a trainer for DINO, self-distillation with no labels."""

import importlib
from typing import TYPE_CHECKING, Any

from fastdino import host
from fastdino.config import Config, ConfigError, UserError

if TYPE_CHECKING:
    from fastdino.training.trainer import train

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "UserError", "__version__", "train"]


host.settle()


def __getattr__(name: str) -> Any:
    """:func:`train` on first use, so that importing the package needs neither torch nor DeepSpeed."""
    if name == "train":
        return importlib.import_module("fastdino.training.trainer").train
    raise AttributeError(f"module 'fastdino' has no attribute {name!r}")
