"""Attention over packed sequences: every view of every size in one row of tokens. The only home of xformers."""

import functools
import importlib
import itertools
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fastdino.config import ConfigError
from fastdino_kernels import packed_attention, packed_self_attention
from fastdino_kernels.layers.packed_attention import WIDTHS

T = TypeVar("T")
Lengths = tuple[tuple[int, int], ...]  # (sequences, tokens of each) per group; a group is the views of one size


FASTEST: dict[str, str] = {
    "NVIDIA H200": "triton",
}
"""What auto takes on a GPU, by a part of its name: the fastest in bench/results/attention-*.json, as bench.report
writes it. On a GPU for which :func:`measured` finds nothing it takes what launches least."""


LONGEST = 1024
"""Tokens of a sequence up to which auto takes packed_attention: at 1,374 SDPA is faster on an H200."""


def attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    queries: Lengths,
    keys: Lengths,
    starts: tuple[Tensor, Tensor] | None = None,
    choice: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence of a packed batch; no sequence sees another.

    Args:
        qkv: (1, N, 3, H, d), whose gradient is one tensor, or three: q (1, M, H, d), the sequences of the first group,
            one after the other, then those of the next; k and v (1, N, H, d), packed in the same order.
        queries: the lengths in q; M = sum of sequences * tokens.
        keys: the lengths in k and v, with as many sequences per group as ``queries``.
        starts: :func:`starts_of` both, where they are at hand.
        choice: "auto" | "triton" | "varlen" | "xformers" | "sdpa", see :func:`implementation`.

    Returns (1, M, H, d) in q's dtype. Raises ConfigError when what is asked for cannot run.
    """
    some = qkv if isinstance(qkv, Tensor) else qkv[0]
    way = implementation(choice, some.device, some.dtype, some.shape[-1], torch.compiler.is_compiling())
    if choice == "auto" and way == "triton" and max([tokens for _, tokens in keys]) > LONGEST:
        way = "sdpa"
    if way == "triton" and isinstance(qkv, Tensor):
        return packed_self_attention(qkv.squeeze(0), queries).unsqueeze(0)
    q, k, v = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
    match way:
        case "triton":
            heads = (x.squeeze(0) for x in (q, k, v))
            return packed_attention(*heads, queries=queries, keys=keys).unsqueeze(0)
        case "varlen":
            starts = starts or (starts_of(queries, q.device), starts_of(keys, q.device))
            longest = [max([tokens for _, tokens in lengths]) for lengths in (queries, keys)]
            attended = varlen_attn(q.squeeze(0), k.squeeze(0), v.squeeze(0), *starts, *longest)
            return cast(Tensor, attended).unsqueeze(0)
        case "xformers":
            mask = _block_diagonal(queries, keys, q.device)
            return _xformers().memory_efficient_attention(q, k, v, attn_bias=mask)
        case _:
            return _sdpa(q, k, v, queries, keys)


@torch.compiler.assume_constant_result
def implementation(choice: str, device: torch.device, dtype: torch.dtype, width: int, compiling: bool = False) -> str:
    """The implementation, "triton", "varlen", "xformers" or "sdpa", that ``choice`` means for heads of ``width``.

    Args:
        choice: auto is FASTEST's where it runs, else the first of varlen (torch's own kernels for packed sequences),
            xformers and SDPA (one call for each size of view) that runs; triton is our kernels, for short sequences. On
            a CPU SDPA is all there is.
        device, dtype: of what is attended to.
        compiling: inside torch.compile, which xformers' Python cannot enter: auto leaves it out.

    Raises ConfigError when what is asked for cannot run.
    """
    if choice == "sdpa" or (choice == "auto" and device.type != "cuda"):
        return "sdpa"
    if choice != "auto":
        if (refusal := _refusal(choice, device, dtype, width)) is not None:
            raise ConfigError(f"{refusal}: use model.attention=auto or sdpa there")
        return choice
    fastest = measured(FASTEST, device)
    ways = [way for way in (fastest, "varlen", "xformers") if way and (way != "xformers" or not compiling)]
    refusals = []
    for way in ways:
        if way == "sdpa" or (refusal := _refusal(way, device, dtype, width)) is None:
            return way
        refusals.append(refusal)
    _warn_once(f"attention runs on torch's SDPA, because {'; '.join(refusals)}")
    return "sdpa"


def measured(table: Mapping[str, T], device: torch.device) -> T | None:
    """What a table by parts of a GPU's name has for this GPU; None where there is nothing.

    One that is not there takes an H200's where it has its processors: an H100 differs by its memory.
    """
    name = torch.cuda.get_device_name(device)
    for gpu, found in table.items():
        if gpu in name:
            return found
    hopper = "NVIDIA" in name and torch.cuda.get_device_capability(device) == (9, 0)
    return table.get("NVIDIA H200") if hopper else None


def check_choice(choice: str) -> None:
    """Raises ConfigError when ``choice`` asks for what this machine cannot run."""
    if choice not in ("auto", "sdpa") and not torch.cuda.is_available():
        raise ConfigError(f"model.attention='{choice}' needs a GPU and torch sees none: use model.attention=auto")
    if choice == "xformers" and isinstance(error := _import_xformers(), ImportError):
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
    parts = x.squeeze(0).split([sequences * tokens for sequences, tokens in lengths])
    return [
        part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, lengths, strict=True)
    ]  # split, not slices: its backward is one concatenation


@functools.lru_cache(maxsize=64)
def _block_diagonal(queries: Lengths, keys: Lengths, device: torch.device) -> Any:
    """xformers' mask for packed sequences. Kept, because building it copies from the host to the device."""
    with torch.inference_mode(False):  # a mask that an evaluation built first must serve training too
        return _xformers().fmha.BlockDiagonalMask.from_seqlens(_flat(queries), _flat(keys), device=device)


@functools.lru_cache(maxsize=64)
def starts_of(lengths: Lengths, device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each sequence begins, and the number of tokens. Kept, as a copy to the device."""
    with torch.inference_mode(False):
        return torch.tensor([0, *itertools.accumulate(_flat(lengths))], dtype=torch.int32, device=device)


def _flat(lengths: Lengths) -> list[int]:
    """Tokens of each sequence, one entry per sequence."""
    return list(itertools.chain.from_iterable([tokens] * sequences for sequences, tokens in lengths))


@functools.cache
def _refusal(choice: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why triton, varlen or xformers cannot run, or None. Tried, because it depends on builds and on the GPU's age."""
    if device.type != "cuda":
        return f"{choice} has no attention for {device.type}"
    if choice == "xformers" and isinstance(error := _import_xformers(), ImportError):
        return f"xformers cannot be imported ({error})"
    half = dtype in (torch.bfloat16, torch.float16)
    if choice == "triton":
        widths = ", ".join(map(str, WIDTHS))
        known = half and width in WIDTHS
        return None if known else f"triton takes bf16 and fp16 in heads of {widths}, not {dtype} in heads of {width}"
    if choice == "varlen" and (not half or width % 8 or width > 256):
        return f"varlen takes bf16 and fp16 in heads of up to 256 in steps of 8, not {dtype} in heads of {width}"
    lengths = ((2, 8),)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(1, 16, 1, width, device=device, dtype=dtype, requires_grad=True)
            if choice == "varlen":
                starts = starts_of(lengths, device)
                varlen_attn(x[0], x[0], x[0], starts, starts, 8, 8)
            else:
                _xformers().memory_efficient_attention(x, x, x, attn_bias=_block_diagonal(lengths, lengths, device))
    except (NotImplementedError, RuntimeError) as reasons:
        return f"{choice} cannot run on {device} ({reasons})"
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
