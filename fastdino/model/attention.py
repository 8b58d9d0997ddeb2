"""Attention over packed sequences: every view of every size in one row of tokens. The only home of xformers."""

import functools
import importlib
import itertools
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import ConfigError

Lengths = tuple[tuple[int, int], ...]  # (sequences, tokens of each) per group; a group is the views of one size


def attention(q: Tensor, k: Tensor, v: Tensor, *, queries: Lengths, keys: Lengths, choice: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence of a packed batch; no sequence sees another.

    Args:
        q: (1, M, H, d); the sequences of the first group, one after the other, then those of the next.
        k, v: (1, N, H, d), packed in the same order.
        queries: the lengths in q; M = sum of sequences * tokens.
        keys: the lengths in k and v, with as many sequences per group as ``queries``.
        choice: "auto" | "xformers" | "sdpa", see :func:`implementation`.

    Returns (1, M, H, d) in q's dtype. Raises ConfigError when xformers is asked for and cannot run.
    """
    if implementation(choice, q.device, q.dtype, q.shape[-1]) == "xformers":
        mask = _block_diagonal(queries, keys, q.device)
        return _xformers().memory_efficient_attention(q, k, v, attn_bias=mask)
    return _sdpa(q, k, v, queries, keys)


def implementation(choice: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The implementation, "xformers" or "sdpa", that ``choice`` means for heads of ``width``, by dtype and device.

    auto is xformers where it runs, and torch's SDPA elsewhere (on a GPU one warning says why). Raises ConfigError when
    xformers is asked for and cannot run.
    """
    if choice == "sdpa" or (choice == "auto" and device.type != "cuda"):
        return "sdpa"
    if (refusal := _refusal(device, dtype, width)) is None:
        return "xformers"
    if choice == "xformers":
        raise ConfigError(f"{refusal}: use model.attention=auto or sdpa there")
    _warn_once(f"attention runs on torch's SDPA, because {refusal}")
    return "sdpa"


def check_choice(choice: str) -> None:
    """Raises ConfigError when ``choice`` asks for xformers on a machine that cannot run it."""
    if choice != "xformers":
        return
    if not torch.cuda.is_available():
        raise ConfigError("model.attention='xformers' needs a GPU and torch sees none: use model.attention=auto")
    if isinstance(error := _import_xformers(), ImportError):
        raise ConfigError(
            f"model.attention='xformers' but xformers cannot be imported ({error}): "
            "pip install 'xformers>=0.0.34,<0.0.36', or use model.attention=auto"
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths) -> Tensor:
    """One torch SDPA call per group; the sequences of a group are equally long, so nothing is padded."""
    outputs = []
    parts = zip(_groups(q, queries), _groups(k, keys), _groups(v, keys), strict=True)
    for q_group, k_group, v_group in parts:  # (sequences, H, tokens, d)
        output = F.scaled_dot_product_attention(q_group, k_group, v_group)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def _groups(x: Tensor, lengths: Lengths) -> list[Tensor]:
    """(1, tokens, H, d) -> a (sequences, H, tokens, d) view per group."""
    parts = x[0].split([sequences * tokens for sequences, tokens in lengths])
    return [
        part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, lengths, strict=True)
    ]  # split, not slices: its backward is one concatenation


@functools.lru_cache(maxsize=64)
def _block_diagonal(queries: Lengths, keys: Lengths, device: torch.device) -> Any:
    """xformers' mask for packed sequences. Kept, because building it copies from the host to the device."""
    with torch.inference_mode(False):  # a mask that an evaluation built first must serve training too
        return _xformers().fmha.BlockDiagonalMask.from_seqlens(_flat(queries), _flat(keys), device=device)


def _flat(lengths: Lengths) -> list[int]:
    """Tokens of each sequence, one entry per sequence."""
    return list(itertools.chain.from_iterable([tokens] * sequences for sequences, tokens in lengths))


@functools.cache
def _refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why xformers cannot run, or None. Tried, because it depends on its build, torch's build and the GPU's age."""
    if device.type != "cuda":
        return f"xformers has no attention for {device.type}"
    if isinstance(error := _import_xformers(), ImportError):
        return f"xformers cannot be imported ({error})"
    lengths = ((2, 8),)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(1, 16, 1, width, device=device, dtype=dtype, requires_grad=True)
            _xformers().memory_efficient_attention(x, x, x, attn_bias=_block_diagonal(lengths, lengths, device))
    except NotImplementedError as reasons:
        return f"xformers cannot run on {device} ({reasons})"
    return None


@functools.cache
def _import_xformers() -> ModuleType | ImportError:
    """xformers.ops, or why it cannot be imported: it refuses a torch whose private kernels it does not know."""
    try:
        common = importlib.import_module("xformers.ops.fmha.common")
        # Where its own library does not load (its wheel's is for CUDA 12) xformers refuses every operator on a GPU,
        # even what calls torch's kernels. One that is really missing is refused all the same.
        common._built_with_cuda = True  # type: ignore[attr-defined]
        return importlib.import_module("xformers.ops")
    except ImportError as error:
        return error


def _xformers() -> ModuleType:
    module = _import_xformers()
    assert not isinstance(module, ImportError), module
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
