"""Attention within each of many short sequences: the views of a batch, packed one after another."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import INTERPRETED, compute_dtype, operator, use_triton
from fastdino_kernels.layers._attention_kernels import (
    _attention_gradient_kernel,
    _attention_gradient_keys_kernel,
    _attention_gradient_queries_kernel,
    _attention_kernel,
)
from fastdino_kernels.layers._sample_drop import Lengths, num_tokens

Tensors = tuple[Tensor, ...]

WIDTHS = (16, 32, 64, 128)  # of a head, that the kernels take
# Triton's interpreter knows no bf16 product, so that there fp32 stands for all dtypes.
DTYPES = (torch.bfloat16, torch.float16, *([torch.float32] if INTERPRETED else []))
_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def packed_attention(q: Tensor, k: Tensor, v: Tensor, *, queries: Lengths, keys: Lengths) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence of a packed batch; no sequence sees another.

    Args:
        q: (M, H, d) queries of H heads, group after group of equally long sequences; the kernels take bf16 and fp16 and
            d of 16, 32, 64 and 128. All else is computed by plain torch.
        k, v: (N, H, d) keys and values, packed in the same order, of q's dtype.
        queries: (sequences, queries of each) per group.
        keys: (sequences, keys of each) per group, with as many sequences; neither number is 0.

    Returns (M, H, d) in q's dtype, with gradients for q, k and v. Factors are of q's dtype, all else is fp32; sums are
    taken in a fixed order. Saves the inputs, the output, and the logarithm of each query's sum.
    Raises ValueError when shapes, dtypes or devices do not fit.
    Source: Dao et al. 2022 (FlashAttention), algorithm 1; Dao 2023 (FlashAttention-2), algorithm 2.
    """
    _check(q, k, v, queries, keys)
    if takes_kernel(q):
        return _PackedAttention.apply(q, k, v, queries, keys)
    return packed_attention_reference(q, k, v, queries=queries, keys=keys)


def packed_self_attention(qkv: Tensor, lengths: Lengths) -> Tensor:
    """:func:`packed_attention` of (N, 3, H, d) queries, keys and values, whose gradient is one tensor, too."""
    q, k, v = qkv.unbind(1)
    _check(q, k, v, lengths, lengths)
    if takes_kernel(qkv):
        return _PackedSelfAttention.apply(qkv, lengths)
    return packed_attention_reference(q, k, v, queries=lengths, keys=lengths)


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, queries: Lengths, keys: Lengths) -> Tensor:
    """:func:`packed_attention` in plain torch: the definition that the kernels are tested against."""
    outputs = []
    for group in _groups(queries, keys):
        of_queries, of_keys = group.tokens
        of_q, of_k, of_v = (
            x.unflatten(0, (group.sequences, -1)).transpose(1, 2).to(compute_dtype(x))
            for x in (q[of_queries], k[of_keys], v[of_keys])
        )
        weights = (of_q @ of_k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        outputs.append((weights @ of_v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(q.dtype)


def takes_kernel(q: Tensor) -> bool:
    """Whether the kernels can do it."""
    return use_triton(q) and q.dtype in DTYPES and q.shape[-1] in WIDTHS


class _Group(NamedTuple):
    """Equally long sequences, and where their tokens lie."""

    sequences: int
    queries: int  # of each
    keys: int
    tokens: tuple[slice, slice]  # of all queries and all keys


def _groups(queries: Lengths, keys: Lengths) -> Iterator[_Group]:
    first_query = first_key = 0
    for (sequences, asking), (_, tokens) in zip(queries, keys, strict=True):
        last_query, last_key = first_query + sequences * asking, first_key + sequences * tokens
        yield _Group(sequences, asking, tokens, (slice(first_query, last_query), slice(first_key, last_key)))
        first_query, first_key = last_query, last_key


def _check(q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths) -> None:
    sequences, same = ([n for n, _ in lengths] for lengths in (queries, keys))
    if sequences != same or not sequences or min(min(pair) for pair in (*queries, *keys)) < 1:
        raise ValueError(
            f"expected (sequences, tokens of each) of one or more groups, the same sequences for queries and keys and "
            f"no zero; got queries {tuple(queries)}, keys {tuple(keys)}"
        )
    num_queries, num_keys = num_tokens(queries), num_tokens(keys)
    if q.dim() != 3 or len(q) != num_queries or k.shape != (num_keys, *q.shape[1:]) or v.shape != k.shape:
        raise ValueError(
            f"expected q ({num_queries}, H, d), k and v ({num_keys}, H, d); "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"expected q, k and v of one floating dtype on one device; "
            f"got {', '.join(f'{x.dtype} on {x.device}' for x in (q, k, v))}"
        )


class _PackedAttention(torch.autograd.Function):
    """Saves inputs and output, and of each query a number from which its weights are taken again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths) -> Tensor:
        q, k, v = (_dense_heads(x) for x in (q, k, v))
        ctx.lengths = _numbers(queries, keys)
        out, log_sums = packed_attention_forward(q, k, v, *ctx.lengths)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = packed_attention_gradient(_dense_heads(grad), *ctx.saved_tensors, *ctx.lengths, False)
        return *grads, None, None


class _PackedSelfAttention(torch.autograd.Function):
    """The same of one tensor, whose gradient the kernels write whole: three would be stacked."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, lengths: Lengths) -> Tensor:
        qkv = _dense_heads(qkv)
        ctx.lengths = _numbers(lengths, lengths)
        out, log_sums = packed_attention_forward(*qkv.unbind(1), *ctx.lengths)
        ctx.save_for_backward(qkv, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *saved = ctx.saved_tensors
        tensors = _dense_heads(grad), *qkv.unbind(1), *saved
        (grad_qkv,) = packed_attention_gradient(*tensors, *ctx.lengths, True)
        return grad_qkv, None


def _dense_heads(x: Tensor) -> Tensor:
    """``x`` itself when the numbers of a head are contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _numbers(queries: Lengths, keys: Lengths) -> tuple[list[int], list[int], list[int]]:
    """Sequences, queries and keys of each group, as an operator takes them."""
    return [n for n, _ in queries], [tokens for _, tokens in queries], [tokens for _, tokens in keys]


def launch_config(queries: int, keys: int) -> dict[str, dict[str, int]]:
    """Tiles of a group's sequences, warps and stages, by kernel. Where a tile holds a sequence, "whole" has all of its
    gradients, else "queries" and "keys" have them.

    64 rows are a warp group's. In longer sequences they meet 32 at a time, which leaves room for more programs and
    wastes less at a sequence's end.
    """
    q, k = (min(64, max(16, triton.next_power_of_2(tokens))) for tokens in (queries, keys))
    if max(queries, keys) <= 64:
        whole = {"BLOCK_Q": q, "BLOCK_K": k, "num_warps": 4}
        return {"forward": whole | {"num_stages": 2}, "whole": whole}
    over_keys = {"BLOCK_Q": q, "BLOCK_K": min(32, k), "num_warps": 4, "num_stages": 3}
    over_queries = over_keys | {"BLOCK_Q": min(32, q), "BLOCK_K": k}
    return {"forward": over_keys, "queries": over_keys, "keys": over_queries}


@operator()
def packed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequence[int], queries: Sequence[int], keys: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The output (M, H, d), and (H, M) the logarithms to base 2 of the sums of each query's exponentials."""
    out, log_sums = q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)
    with torch.cuda.device_of(q):
        for group in _groups(_pairs(sequences, queries), _pairs(sequences, keys)):
            config, (of_q, of_k) = launch_config(group.queries, group.keys)["forward"], group.tokens
            tensors = out[of_q], q[of_q], k[of_k], v[of_k]
            tiles = triton.cdiv(group.queries, config["BLOCK_Q"])
            _launch(_attention_kernel, group, tiles, tensors, (log_sums[:, of_q],), config)
    return out, log_sums


@packed_attention_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)


@operator()
def packed_attention_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    sequences: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    together: bool,
) -> list[Tensor]:
    """The gradients for q, k and v, given that for the output; ``together``: one tensor (N, 3, H, d)."""
    grads, dots = _gradients(q, k, together), torch.empty_like(log_sums)  # <grad, out> of each query
    grad_q, grad_k, grad_v = grads[0].unbind(1) if together else grads
    with torch.cuda.device_of(q):
        for group in _groups(_pairs(sequences, queries), _pairs(sequences, keys)):
            config, (of_q, of_k) = launch_config(group.queries, group.keys), group.tokens
            to_q, to_k = (grad_q[of_q],), (grad_k[of_k], grad_v[of_k])
            read, of_out = (q[of_q], k[of_k], v[of_k], grad[of_q]), (out[of_q],)
            rows = log_sums[:, of_q], dots[:, of_q]
            if "whole" in config:
                _launch(_attention_gradient_kernel, group, 1, to_q + to_k + read + of_out, rows[:1], config["whole"])
            else:
                tiles = triton.cdiv(group.queries, config["queries"]["BLOCK_Q"])
                _launch(_attention_gradient_queries_kernel, group, tiles, to_q + read + of_out, rows, config["queries"])
                tiles = triton.cdiv(group.keys, config["keys"]["BLOCK_K"])
                _launch(_attention_gradient_keys_kernel, group, tiles, to_k + read, rows, config["keys"])
    return grads


@packed_attention_gradient.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> list[Tensor]:
    return _gradients(q, k, together=rest[-1])


def _gradients(q: Tensor, k: Tensor, together: bool) -> list[Tensor]:
    """Memory for those of q, k and v."""
    if together:
        return [q.new_empty(len(q), 3, *q.shape[1:])]
    return [q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)]


def _pairs(sequences: Sequence[int], tokens: Sequence[int]) -> Lengths:
    return list(zip(sequences, tokens, strict=True))


def _launch(kernel: Any, group: _Group, tiles: int, tensors: Tensors, rows: Tensors, config: dict[str, int]) -> None:
    """So many programs for each head of each sequence; ``tensors`` are (tokens, H, d), ``rows`` (H, queries)."""
    (_, H, D), dtype = tensors[0].shape, tl.float32 if INTERPRETED else _TRITON[tensors[0].dtype]
    numbers = rows[0].stride(0), H, group.queries, group.keys
    strides = [(x.stride(0), x.stride(1)) for x in tensors]
    kernel[(group.sequences * H * tiles,)](*tensors, *rows, *numbers, *strides, D=D, DTYPE=dtype, **config)
