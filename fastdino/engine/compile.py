"""torch.compile of a network's regions, with eager execution as the way out."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastdino.config import Config

log = logging.getLogger(__name__)

GRAPHS = 64  # of one region's code: every mixture of shapes, gradient and reading is one, and a process may train again


def compiles(config: Config, device: torch.device) -> bool:
    """What ``engine.compile`` comes to on a device. What auto cannot compile is left alone; on is tried."""
    match config.engine.compile:
        case "auto":
            return device.type == "cuda" and config.model.attention != "xformers"
        case choice:
            return choice == "on"


def compile_regions(regions: Iterable[tuple[nn.Module, str]]) -> None:
    """Has torch compile methods of modules at their first calls, each shape of their input on its own.

    Regions of equal code and shapes share one graph, so that a ViT costs one block's time. When one cannot be compiled
    they all run eagerly from there on, and one warning says why.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    compiler = _Compiler()
    for module, method in regions:
        setattr(module, method, compiler.region(getattr(module, method)))


class _Compiler:
    """Regions that are compiled together or not at all."""

    def __init__(self) -> None:
        self.failed = False

    def region(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)

        def call(*args: Any) -> Any:
            if self.failed:
                return eager(*args)
            try:
                return compiled(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of dynamo, inductor, Triton, a C++ compiler: they have no type in common
                result = eager(*args)  # raises once more what is not the compiler's fault
                self.failed = True
                log.warning(
                    "engine.compile: %s cannot be compiled, so every step runs eagerly: slower, and with more memory "
                    "for activations. engine.compile=off says nothing. %s: %s",
                    eager.__qualname__, type(error).__name__, str(error).strip().splitlines()[0],
                )  # fmt: skip
                return result

        return call
