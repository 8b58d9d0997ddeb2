"""Builds the engine that a config asks for; the only home of DeepSpeed."""

from torch import nn

from fastdino.config import Config
from fastdino.train.distributed import Ranks
from fastdino.train.torch_engine import Engine, Fragment

__all__ = ["Engine", "Fragment", "build_engine"]


def build_engine(config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks) -> Engine:
    """The engine of ``config.engine``. ``student`` and ``teacher`` are fp32 networks of equal parameter names; they are
    moved to the device, cast, and the teacher starts as a copy of rank 0's student, buffers included."""
    raise NotImplementedError
