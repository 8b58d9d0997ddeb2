"""Sinkhorn-Knopp: the teacher's probabilities with equal use of every prototype, as two scaling vectors."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import LOG2_E, compute_dtype, operator, use_triton
from fastdino_kernels._numbers import Number, check_temps, from_operator, load_log2_scale, log2_scale, to_operator


def sinkhorn(
    logits: Tensor, *, temp: Number, iterations: int = 3, all_reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Scalings (row, column) so that the rows of Q = exp(logits / temp + row[:, None] + column) sum to 1.

    Each iteration makes the sums of the columns equal, then those of the rows: column = -logsumexp(x + row) over all
    rows, row = -logsumexp(x + column), with x = logits / temp. Q never exists in memory, and no constant enters: the
    published divisions by the total, by K and by the number of rows cancel. A loss takes it as center = -temp * column.

    Args:
        logits: (R, K) of this rank's R samples, which may be 0, over K prototypes; fp32, fp16, bf16 or fp64.
        temp: the teacher's temperature, > 0: a float, or a 0-d fp32 or fp64 tensor on the logits' device, for whose
            value the host does not wait, and which it does not check.
        iterations: at least 1.
        all_reduce: given this rank's (K,) log-sum-exps of the columns (-inf with no rows), returns those over all
            ranks; called once per iteration. None for one rank.

    Returns fp32 (R,) and (K,) (fp64 for fp64 logits), without gradient.
    Raises ValueError when shape, dtype, temperature or number of iterations does not fit.
    Source: Cuturi 2013; as used by Caron et al. 2020 (SwAV) and DINOv2 (Oquab et al. 2024), exactly equal to both.
    """
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"expected floating-point logits (R, K); got {tuple(logits.shape)} {logits.dtype}")
    check_temps(logits.device, temp=temp)
    if iterations < 1:
        raise ValueError(f"expected iterations >= 1; got iterations={iterations}")
    logits = logits.detach()
    if not use_triton(logits) or logits.dtype == torch.float64 or not len(logits):
        return sinkhorn_reference(logits, temp=temp, iterations=iterations, all_reduce=all_reduce)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    row, temps = None, to_operator(temp)
    for _ in range(iterations):
        column_lse = sinkhorn_columns(logits, row, *temps)
        column = -(column_lse if all_reduce is None else all_reduce(column_lse)).contiguous()
        row = -sinkhorn_rows(logits, column, *temps)
    assert row is not None
    return row, column


def sinkhorn_reference(
    logits: Tensor, *, temp: Number, iterations: int = 3, all_reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`sinkhorn` in plain torch: the definition that the kernel is tested against, and what a CPU runs."""
    x = logits.to(compute_dtype(logits)) / temp
    row = x.new_zeros(len(x))
    for _ in range(iterations):
        column_lse = torch.logsumexp(x + row[:, None], dim=0)
        column = -(column_lse if all_reduce is None else all_reduce(column_lse))
        row = -torch.logsumexp(x + column, dim=1)
    return row, column


def launch_config(num_rows: int, num_prototypes: int) -> dict[str, dict[str, int]]:
    """Tiles of the two passes and what one program covers of a column and of a row; one warp needs no barrier.

    Columns are cut into at most 16 groups of rows, which is enough to fill a GPU from 4096 prototypes on.
    """
    row = max(16, triton.next_power_of_2(num_prototypes))
    return {
        "columns": {"ROWS": max(32, triton.cdiv(num_rows, 16)), "BLOCK_ROWS": 8, "BLOCK_K": min(row, 256)},
        "rows": {"COLUMNS": 8192, "BLOCK_ROWS": 4, "BLOCK_K": min(row, 256)},
    }


@operator()
def sinkhorn_columns(logits: Tensor, row: Tensor | None, temp: float | None, temp_on_device: Tensor | None) -> Tensor:
    """(K,) log-sum-exps over the rows of logits / temp + row[:, None]; no row is 0."""
    R, K = logits.shape
    config = launch_config(R, K)["columns"]
    num_groups = triton.cdiv(R, config["ROWS"])
    parts = torch.empty((num_groups, K), dtype=torch.float32, device=logits.device)
    row = None if row is None else row * LOG2_E
    grid = (triton.cdiv(K, config["BLOCK_K"]), num_groups)
    scale = log2_scale(from_operator(temp, temp_on_device))
    with torch.cuda.device_of(logits):
        _column_kernel[grid](parts, logits, row, R, logits.stride(0), scale, K=K, **config, num_warps=1)
    return torch.logsumexp(parts / LOG2_E, dim=0)


@sinkhorn_columns.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


@operator()
def sinkhorn_rows(logits: Tensor, column: Tensor, temp: float | None, temp_on_device: Tensor | None) -> Tensor:
    """(R,) log-sum-exps over the columns of logits / temp + column."""
    R, K = logits.shape
    config = launch_config(R, K)["rows"]
    num_slices = triton.cdiv(K, config["COLUMNS"])
    parts = torch.empty((R, num_slices), dtype=torch.float32, device=logits.device)
    column, grid = column * LOG2_E, (triton.cdiv(R, config["BLOCK_ROWS"]) * num_slices,)
    scale = log2_scale(from_operator(temp, temp_on_device))
    with torch.cuda.device_of(logits):
        _row_kernel[grid](parts, logits, column, R, logits.stride(0), scale, K=K, **config, num_warps=1)
    return torch.logsumexp(parts / LOG2_E, dim=1)


@sinkhorn_rows.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@triton.jit(do_not_specialize=["R"])
def _column_kernel(
    parts_ptr,
    logits_ptr,
    row_ptr,
    R,
    row_stride,
    scale,
    K: tl.constexpr,
    ROWS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # parts[g, k] = LSE over the g-th ROWS rows of logits[r, k] / temp + row[r], in units of log2 like row itself. One
    # program: BLOCK_K columns of one g, with a running maximum and sum of each column.
    group = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
    end = tl.minimum((group + 1) * ROWS, R)
    scale = load_log2_scale(scale)
    top = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(group * ROWS, end, BLOCK_ROWS, num_stages=3):
        r = start + tl.arange(0, BLOCK_ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        address = logits_ptr + r.to(tl.int64)[:, None] * row_stride + k[None, :]
        x = tl.load(address, mask=mask, other=float("-inf")).to(tl.float32) * scale
        if row_ptr is not None:
            x += tl.load(row_ptr + r, mask=r < end, other=0.0)[:, None]
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing but -inf so far: exp2(-inf - 0) is 0
        total *= tl.exp2(top - base)
        total += tl.sum(tl.exp2(x - base[None, :]), 0)
        top = new_top
    tl.store(parts_ptr + group.to(tl.int64) * K + k, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _row_kernel(
    parts_ptr,
    logits_ptr,
    column_ptr,
    R,
    row_stride,
    scale,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # parts[r, n] = LSE over the n-th COLUMNS columns of logits[r, k] / temp + column[k], in units of log2 like column
    # itself. One program: BLOCK_ROWS rows, which share the reading of column, and one n; with a running maximum of each
    # row, and a running sum in each lane.
    num_slices: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    n = tl.program_id(0) % num_slices
    rows = tl.program_id(0) // num_slices * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    logits_ptr += tl.minimum(rows, R - 1).to(tl.int64)[:, None] * row_stride  # rows past R repeat the last one
    scale = load_log2_scale(scale)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_K], tl.float32)
    for start in tl.range(n * COLUMNS, tl.minimum((n + 1) * COLUMNS, K), BLOCK_K, num_stages=3):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K if K % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
        x = tl.load(logits_ptr + k[None, :], mask=inside[None, :], other=float("-inf")).to(tl.float32) * scale
        x += tl.load(column_ptr + k, mask=inside, other=0.0)[None, :]
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base)[:, None] + tl.exp2(x - base[:, None])
        top = new_top
    tl.store(parts_ptr + rows * num_slices + n, top + tl.log2(tl.sum(total, 1)), mask=rows < R)
