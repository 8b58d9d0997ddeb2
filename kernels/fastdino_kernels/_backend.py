"""Which implementation runs: the Triton kernel or the plain-torch reference."""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Triton reads the variable when a kernel is decorated, so it must be set before this package is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2_E = math.log2(math.e)  # a GPU has 2^x, not e^x: kernels take logits times it

LAUNCHERS: dict[str, Callable[..., Any]] = {}  # what is behind each operator


def use_triton(x: Tensor) -> bool:
    """True on a GPU, and on the CPU under Triton's interpreter (tests only)."""
    return x.is_cuda or INTERPRETED


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a reference's arithmetic: at least fp32; fp64 stays fp64, so a reference is the tests' truth."""
    return torch.promote_types(x.dtype, torch.float32)


def operator(*mutated: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher as ``torch.ops.fastdino.NAME``, which writes into the arguments ``mutated`` alone.

    torch.compile takes it whole, knows what it writes, and asks its ``register_fake`` for the shapes of its results.
    All else (most checks, the choice of the reference, autograd) is plain Python, which is traced.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        LAUNCHERS[launcher.__name__] = launcher
        return torch.library.custom_op(f"fastdino::{launcher.__name__}", launcher, mutates_args=mutated)

    return register
