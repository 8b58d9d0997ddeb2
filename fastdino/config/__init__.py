"""Every setting of fastdino, with its unit, its default and the reason for its bounds.

The defaults are those of DINO v1's training command. Each group checks itself when it is made; :class:`Config` checks
what concerns two groups. A wrong value raises :class:`ConfigError`, whose message says what, where and what to do.
"""

from fastdino.config.config import Config, group_kinds
from fastdino.config.data import MAX_VIEWS, DataConfig, ViewsConfig
from fastdino.config.errors import ConfigError, UserError
from fastdino.config.method import LossConfig
from fastdino.config.model import VIT_SIZES, HeadConfig, ModelConfig, PatchHeadConfig
from fastdino.config.optim import EngineConfig, OptimConfig
from fastdino.config.run import RunConfig

__all__ = [
    "MAX_VIEWS",
    "VIT_SIZES",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "HeadConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PatchHeadConfig",
    "RunConfig",
    "UserError",
    "ViewsConfig",
    "group_kinds",
]
