"""The KoLeo regulariser: every feature is pushed away from its nearest neighbour, so that features spread evenly."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastdino_kernels._backend import compute_dtype, dense_rows, operator, use_triton

MAX_WIDTH = 4096  # a row must fit in the registers of one program; wider ones go to plain torch


def koleo_loss(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """-mean over i of log(|x_i - x_n(i)| + eps), x = features / max(|features|, eps), n(i) = argmax_j != i <x_i, x_j>.

    Args:
        features: (B, D), or (G, B, D) with neighbours within each of G groups only (as for the global views, one by
            one); fp32, fp16, bf16 or fp64, B >= 2. Of equally near rows the first is the neighbour.
        eps: > 0; in both places.

    Returns the fp32 (fp64 for fp64 features) scalar mean over all G * B rows. Its gradient treats n(i) as constant, and
    flows to x_i, to x_n(i) and through the normalisation; a pair at distance 0 has no direction, so it adds none.
    Raises ValueError when shape, dtype or eps does not fit, or B is 1: a single row has no neighbour.
    Source: Sablayrolles et al. 2019, section 3.1; eps and the normalisation as in DINOv2 (Oquab et al. 2024), which
    sums over the global views (G times this mean). DINOv2 also adds eps to each component of the difference: lost in
    fp32 rounding, except between equal rows, whose gradient it makes about 1 / eps in an arbitrary direction.
    """
    if features.dim() not in (2, 3) or not features.numel() or not features.is_floating_point():
        raise ValueError(
            f"expected floating-point features (B, D) or (G, B, D); got {tuple(features.shape)} {features.dtype}"
        )
    if features.shape[-2] == 1:
        raise ValueError(f"a single row has no neighbour: koleo_loss needs B >= 2; got {tuple(features.shape)}")
    if not eps > 0:
        raise ValueError(f"expected eps > 0, which keeps the loss of equal rows finite; got {eps}")
    if not use_triton(features) or features.dtype == torch.float64 or features.shape[-1] > MAX_WIDTH:
        return koleo_loss_reference(features, eps=eps)
    return _KoLeo.apply(features if features.dim() == 3 else features[None], eps)


def koleo_loss_reference(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """:func:`koleo_loss` in plain torch: the definition that the kernel is tested against, and the CPU path."""
    with torch.autocast(features.device.type, enabled=False):  # in bf16 the product would pick wrong neighbours
        x = F.normalize(features.to(compute_dtype(features)), dim=-1, eps=eps)
        similarity = (x @ x.mT).detach()
        itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        neighbour = similarity.masked_fill(itself, float("-inf")).argmax(-1, keepdim=True)
        distance = torch.linalg.vector_norm(x - x.take_along_dim(neighbour, -2), dim=-1)
        return -torch.log(distance + eps).mean()


class _KoLeo(torch.autograd.Function):
    """Saves the features and, for each row, its neighbour, its norm and how hard the two repel each other."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, eps: float) -> Tensor:
        features = dense_rows(features)
        loss, *saved = koleo_forward(features, eps)
        ctx.save_for_backward(features, *saved)
        ctx.eps = eps
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        return koleo_gradient(grad_loss, *ctx.saved_tensors, ctx.eps), None


def launch_config(num_rows: int, width: int) -> dict[str, dict[str, int | bool]]:
    """Blocks and warps of the product (tiles of BLOCK x BLOCK similarities) and of what one program does for a row, and
    how many rows it searches at a time for those that have it for neighbour.

    A product of few rows takes small tiles, so that there are enough programs. Outside tl.dot the compiler may not
    contract to fused multiply-adds: rounding the two sides of a difference apart would set equal rows 1e-8 apart.
    """
    block, block_d = 16 if num_rows <= 256 else 64, max(32, triton.next_power_of_2(width))
    exact: dict[str, int | bool] = {"enable_fp_fusion": False}
    tile = {"BLOCK": block, "BLOCK_D": min(block_d, 128 if block == 16 else 64), "num_warps": 4 if block == 16 else 8}
    return {
        "product": {**tile, **exact},
        "row": {"BLOCK_D": block_d, "num_warps": max(1, block_d // 512), **exact},
        "search": {"BLOCK_B": min(1024, triton.next_power_of_2(num_rows))},
    }


@operator()
def koleo_forward(features: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and each row's neighbour, norm, and 1 / (distance * (distance + eps)): (G, B) each."""
    G, B, D = features.shape
    config = launch_config(B, D)
    num_blocks = triton.cdiv(B, int(config["product"]["BLOCK"]))
    strides = features.stride()[:2]
    row_loss, norm, pull = (features.new_empty((G, B), dtype=torch.float32) for _ in range(3))
    best = features.new_empty((G, B, num_blocks), dtype=torch.float32)
    best_at, neighbour = (torch.empty_like(x, dtype=torch.int32) for x in (best, norm))
    saved, parts = (neighbour, norm, pull), (best, best_at)
    blocks = {"NUM_BLOCKS": num_blocks, "BLOCK_N": triton.next_power_of_2(num_blocks)}
    with torch.cuda.device_of(features):
        _koleo_product_kernel[(num_blocks, num_blocks, G)](*parts, features, B, strides, eps, D=D, **config["product"])
        _koleo_distance_kernel[(G * B,)](
            row_loss, *saved, features, *parts, B, strides, eps, 1 / (G * B), D=D, **blocks, **config["row"]
        )
    return row_loss.sum(), *saved


@koleo_forward.register_fake
def _(features: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = features.new_empty(features.shape[:2], dtype=torch.float32)
    loss = features.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(rows, dtype=torch.int32), torch.empty_like(rows), torch.empty_like(rows)


@operator()
def koleo_gradient(
    grad_loss: Tensor, features: Tensor, neighbour: Tensor, norm: Tensor, pull: Tensor, eps: float
) -> Tensor:
    """The gradient for the features, contiguous and in their dtype."""
    G, B, D = features.shape
    grad = torch.empty_like(features, memory_format=torch.contiguous_format)
    config = launch_config(B, D)
    blocks = {**config["search"], **config["row"]}
    tensors = (grad, grad_loss, features, neighbour, norm, pull)
    with torch.cuda.device_of(features):
        _koleo_gradient_kernel[(G * B,)](*tensors, B, features.stride()[:2], eps, 1 / (G * B), D=D, **blocks)
    return grad


@koleo_gradient.register_fake
def _(grad_loss: Tensor, features: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["B"])
def _koleo_product_kernel(
    best_ptr, best_at_ptr, x_ptr, B, strides, eps, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    # One program: a tile of the similarities <x_i, x_j> / |x_j| of one group; for each i its largest, and the first j
    # that has it. |x_i| would not change their order.
    group = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    x_ptr += group * strides[0]
    i_ptr = x_ptr + (i.to(tl.int64) * strides[1])[:, None] + d[None, :]
    j_ptr = x_ptr + (j.to(tl.int64) * strides[1])[:, None] + d[None, :]
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (start + d < D)[None, :]
        x_i = tl.load(i_ptr + start, mask=(i < B)[:, None] & inside, other=0.0).to(tl.float32)
        x_j = tl.load(j_ptr + start, mask=(j < B)[:, None] & inside, other=0.0).to(tl.float32)
        # In fp32: a product that rounds to TF32 is off by more than what separates the two nearest rows of many.
        product = tl.dot(x_i, tl.trans(x_j), product, input_precision="ieee")
        squares += tl.sum(x_j * x_j, 1)
    similarity = product / tl.maximum(tl.sqrt(squares), eps)[None, :]
    similarity = tl.where((i[:, None] != j[None, :]) & (j < B)[None, :], similarity, float("-inf"))
    best = tl.max(similarity, 1)
    best_at = tl.min(tl.where(similarity == best[:, None], j[None, :], B), 1)
    found = best > float("-inf")  # not where all is NaN: the row itself will do, as the loss is NaN with any
    offset = (group * B + i) * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + offset, tl.where(found, best, float("-inf")), mask=i < B)
    tl.store(best_at_ptr + offset, tl.where(found, best_at, i), mask=i < B)


@triton.jit
def _unit(x_ptr, norm, eps, d, D: tl.constexpr):
    # The row at x_ptr, normalised.
    return tl.div_rn(tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32), tl.maximum(norm, eps))


@triton.jit(do_not_specialize=["B"])
def _koleo_distance_kernel(
    row_loss_ptr,
    neighbour_ptr,
    norm_ptr,
    pull_ptr,
    x_ptr,
    best_ptr,
    best_at_ptr,
    B,
    strides,
    eps,
    scale,
    D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program: the nearest of one row's candidates, and the distance to it. From the difference, because
    # sqrt(2 - 2 * similarity) has no correct digit left where rows are close. By IEEE's root and quotient: those of a
    # GPU by default are off by a digit or two, which would be left of the difference.
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    best = tl.load(best_ptr + row * NUM_BLOCKS + n, mask=n < NUM_BLOCKS, other=float("-inf"))
    best_at = tl.load(best_at_ptr + row * NUM_BLOCKS + n, mask=n < NUM_BLOCKS, other=B)
    neighbour = tl.min(tl.where(best == tl.max(best, 0), best_at, B), 0)
    d = tl.arange(0, BLOCK_D)
    group_ptr = x_ptr + (row // B) * strides[0]
    x_i = tl.load(group_ptr + (row % B) * strides[1] + d, mask=d < D, other=0.0).to(tl.float32)
    x_j = tl.load(group_ptr + neighbour.to(tl.int64) * strides[1] + d, mask=d < D, other=0.0).to(tl.float32)
    norm_i, norm_j = tl.sqrt_rn(tl.sum(x_i * x_i, 0)), tl.sqrt_rn(tl.sum(x_j * x_j, 0))
    difference = tl.div_rn(x_i, tl.maximum(norm_i, eps)) - tl.div_rn(x_j, tl.maximum(norm_j, eps))
    distance = tl.sqrt(tl.sum(difference * difference, 0))
    tl.store(row_loss_ptr + row, -scale * tl.log(distance + eps))
    tl.store(neighbour_ptr + row, neighbour)
    tl.store(norm_ptr + row, norm_i)
    tl.store(pull_ptr + row, tl.where(distance == 0.0, 0.0, 1 / (distance * (distance + eps))))


@triton.jit(do_not_specialize=["B"])
def _koleo_gradient_kernel(
    grad_ptr,
    grad_loss_ptr,
    x_ptr,
    neighbour_ptr,
    norm_ptr,
    pull_ptr,
    B,
    strides,
    eps,
    scale,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # With u = x / |x|: a pair (i, n(i)) puts -pull_i * (u - the other's u) on either's u. One program: one row's pair,
    # then those of the rows that have it for neighbour, in their order; then through the normalisation.
    row = tl.program_id(0).to(tl.int64)
    group, j = row // B, (row % B).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    x_ptr += group * strides[0]
    neighbour_ptr += group * B
    norm_ptr += group * B
    pull_ptr += group * B
    norm = tl.load(norm_ptr + j)
    u = _unit(x_ptr + j.to(tl.int64) * strides[1], norm, eps, d, D)
    other = tl.load(neighbour_ptr + j)
    others_u = _unit(x_ptr + other.to(tl.int64) * strides[1], tl.load(norm_ptr + other), eps, d, D)
    grad = tl.load(pull_ptr + j) * (u - others_u)
    for start in range(0, B, BLOCK_B):
        i = start + tl.arange(0, BLOCK_B)
        candidate = tl.where(tl.load(neighbour_ptr + i, mask=i < B, other=-1) == j, i, B)
        other = tl.min(candidate, 0)
        while other < B:
            others_u = _unit(x_ptr + other.to(tl.int64) * strides[1], tl.load(norm_ptr + other), eps, d, D)
            grad += tl.load(pull_ptr + other) * (u - others_u)
            candidate = tl.where(candidate == other, B, candidate)
            other = tl.min(candidate, 0)
    grad -= tl.where(norm >= eps, tl.sum(grad * u, 0), 0.0) * u
    grad *= -scale * tl.load(grad_loss_ptr).to(tl.float32) / tl.maximum(norm, eps)
    tl.store(grad_ptr + row * D + d, grad.to(grad_ptr.dtype.element_ty), mask=d < D)
