"""The headline call of every kernel: what the compile gate compiles."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdino_kernels.layers.gather_layer_norm import gather_layer_norm
from fastdino_kernels.layers.packed_attention import packed_self_attention
from fastdino_kernels.layers.prototype_weight import prototype_weight
from fastdino_kernels.layers.scatter_add_scaled import scatter_add_scaled
from fastdino_kernels.losses.dino_loss import dino_loss
from fastdino_kernels.losses.dino_loss import launch_config as dino_loss_config
from fastdino_kernels.losses.ibot_loss import ibot_loss, ibot_loss_rows_
from fastdino_kernels.losses.koleo_loss import koleo_loss
from fastdino_kernels.losses.koleo_loss import launch_config as koleo_loss_config
from fastdino_kernels.losses.linear_ibot_loss import chunk_rows
from fastdino_kernels.losses.sinkhorn import sinkhorn
from fastdino_kernels.optim.adamw_ema import AdamWHyper, adamw_ema_
from fastdino_kernels.optim.ema_update import ema_update_
from fastdino_kernels.optim.segment_squares import BLOCK, Segments, make_segments, segment_squares
from fastdino_kernels.views.multi_crop import launch_config as multi_crop_config
from fastdino_kernels.views.multi_crop import multi_crop

# DINO v1's headline: 10 student and 2 teacher views of 64 images, 65536 prototypes of 256, ViT-B/16 with its head.
S, T, B, K, D = 10, 2, 64, 65536, 256
MASKED = 3736  # M, masked patches of 64 images at DINOv2's default rate, at 14 x 14 patches
VIEWS, WIDTH = 2, 768  # global views, and ViT-B's features
# ViT-L's branch at a drop rate of 0.3: 2 global and 8 local views of 64 images, of which these sequences are kept.
LENGTHS, KEPT, WIDTH_L = ((2 * B, 197), (8 * B, 37)), (89, 358), 1024
TOKENS = sum(sequences * tokens for sequences, tokens in LENGTHS)
KEPT_TOKENS = sum(kept * tokens for kept, (_, tokens) in zip(KEPT, LENGTHS, strict=True))
PARAMETERS = 85_798_656 + K * D + 5_770_496  # backbone, prototypes, the head's MLP
IMAGES, IMAGE_WIDTH, IMAGE_HEIGHT = 256, 500, 375  # decoded
PARAMETERS_LARGE = 303_301_632 + K * D + 6_820_096  # of ViT-L/16

# Kernels that load or store no more than a few numbers per row or column there: no 128-bit access to expect.
NARROW = {
    "_slice_kernel": frozenset({"store"}),
    "_merge_kernel": frozenset({"load", "store"}),
    "_row_kernel": frozenset({"store"}),
    "_koleo_product_kernel": frozenset({"store"}),
    "_koleo_distance_kernel": frozenset({"store"}),
    "_partial_squares_kernel": frozenset({"store"}),
    "_segment_squares_kernel": frozenset({"load", "store"}),
    # AMD's products leave rows of four numbers in a thread.
    **dict.fromkeys(
        (
            "_attention_kernel",
            "_attention_gradient_kernel",
            "_attention_gradient_queries_kernel",
            "_attention_gradient_keys_kernel",
        ),
        frozenset({"store"}),
    ),
    # Bytes of three channels, which begin anywhere.
    **dict.fromkeys(("_crop_kernel", "_rotate_kernel", "_colour_kernel", "_blur_kernel"), frozenset({"load", "store"})),
}


class Case(NamedTuple):
    """One call at its real shapes, on uninitialised CPU tensors: for compiling, where no kernel runs."""

    call: Callable[[], object]
    elements: int  # of the tensor that gives the case its size
    bytes: dict[str, int]  # by kernel: what it must read and write at least
    cached: Mapping[str, int] = MappingProxyType({})  # by kernel: what its loop reads besides, from the cache
    narrow: frozenset[str] = frozenset()  # accesses that no kernel makes 128 bits wide in this call, beside NARROW

    def narrow_accesses(self, kernel: str) -> frozenset[str]:
        """Of "load" and "store" those of which no 128-bit one is due."""
        return self.narrow | NARROW.get(kernel, frozenset())


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


ON_DEVICE = ", numbers on the device"  # cases in which kernels read a schedule's numbers there, as in a captured step
TEMP = torch.tensor(0.04)
HYPER = AdamWHyper(lr=1e-3, weight_decay=0.04, momentum=0.996)
HYPER_ON_DEVICE = AdamWHyper(*(torch.tensor(number, dtype=torch.float64) for number in (1e-3, 0.04, 0.996)))

_SECOND_READING = {"_ibot_loss_kernel": 2 * MASKED * K * 2 + 2 * MASKED * K * 4}  # and the center for both


def _dino_loss(temp: float | Tensor) -> Case:
    def call() -> None:
        student, teacher = (_empty(views, B, K, dtype=torch.bfloat16) for views in (S, T))
        dino_loss(student.requires_grad_(), teacher, _empty(K), student_temp=0.1, teacher_temp=temp).backward()

    return Case(
        call,
        S * B * K,
        {
            "_slice_kernel": (S + T) * B * K * 2,
            "_merge_kernel": 4 * B * (K // dino_loss_config(K)["slice"]["BLOCK_K"]) * (S * (2 + T) + 2 * T),
            "_gradient_kernel": (2 * S + T) * B * K * 2,
        },
    )


def _ibot_loss(temp: float | Tensor) -> Case:
    """With the gradient in place."""

    def call() -> None:
        student, teacher = (_empty(MASKED, K, dtype=torch.bfloat16) for _ in range(2))
        rows, rest = student.requires_grad_().view_as(student), (teacher, _empty(K), _empty(MASKED))
        ibot_loss(rows, *rest, student_temp=0.1, teacher_temp=temp, inplace_grad=True).backward()

    return Case(
        call,
        MASKED * K,
        {"_ibot_loss_kernel": 3 * MASKED * K * 2, "_scale_kernel": 2 * MASKED * K * 2},
        cached=_SECOND_READING,
    )


def _ibot_loss_rows(num_grads: int) -> None:
    """One launch alone: the loss, and of ``num_grads`` 1 its gradient apart from the logits."""
    student, teacher, *grad = (_empty(MASKED, K, dtype=torch.bfloat16) for _ in range(2 + num_grads))
    ibot_loss_rows_(grad[0] if grad else None, student, teacher, _empty(K), _empty(MASKED), 0.1, 0.04, None)


def _linear_ibot_loss(num_rows: int, num_prototypes: int) -> Case:
    """The launch of one of its chunks, the gradient in place of the logits; the products are no kernels of ours."""
    rows = chunk_rows(num_rows)
    logits = rows * num_prototypes

    def call() -> None:
        student, teacher = (_empty(rows, num_prototypes, dtype=torch.bfloat16) for _ in range(2))
        ibot_loss_rows_(student, None, teacher, _empty(num_prototypes), _empty(rows), 0.1, 0.04, None)

    return Case(
        call,
        logits,
        {"_ibot_loss_kernel": 3 * logits * 2},
        cached={"_ibot_loss_kernel": 2 * logits * 2 + 2 * logits * 4},  # the second reading, and the center for both
    )


def _sinkhorn(temp: float | Tensor) -> Case:
    return Case(
        lambda: sinkhorn(_empty(MASKED, K, dtype=torch.bfloat16), temp=temp, iterations=2),
        MASKED * K,
        {"_column_kernel": MASKED * K * 2, "_row_kernel": MASKED * K * 2},
        cached={"_row_kernel": MASKED // 4 * K * 4},  # the column scaling, once for four rows
    )


def _prototype_weight() -> None:
    weight = prototype_weight(_empty(K, D).requires_grad_(), _empty(K, 1), torch.bfloat16)
    weight.backward(_empty(K, D, dtype=torch.bfloat16))


def _koleo_loss(num_rows: int) -> Case:
    """The product reads all rows once per block of rows, on either side; a pair's gradient reads both, for both."""
    features = VIEWS * num_rows * WIDTH
    num_blocks = num_rows // int(koleo_loss_config(num_rows, WIDTH)["product"]["BLOCK"])
    return Case(
        lambda: koleo_loss(_empty(VIEWS, num_rows, WIDTH, dtype=torch.bfloat16).requires_grad_()).backward(),
        features,
        {
            "_koleo_product_kernel": features * 2,
            "_koleo_distance_kernel": 2 * features * 2,
            "_koleo_gradient_kernel": 4 * features * 2,
        },
        cached={"_koleo_product_kernel": (2 * num_blocks - 1) * features * 2},
    )


def _kept_rows() -> list[Tensor]:
    return [_empty(kept, dtype=torch.int64) for kept in KEPT]


def _gather_layer_norm() -> None:
    x, weight, bias = _empty(TOKENS, WIDTH_L, dtype=torch.bfloat16), _empty(WIDTH_L), _empty(WIDTH_L)
    leaves = weight.requires_grad_(), bias.requires_grad_()
    y = gather_layer_norm(x.requires_grad_(), LENGTHS, _kept_rows(), *leaves)
    y.backward(torch.empty_like(y))


def _packed_attention(group: tuple[int, int]) -> Case:
    """Of ViT-L's heads. A loop over a sequence reads it once for each tile of 64."""
    heads, row = WIDTH_L // 64, group[0] * group[1] * WIDTH_L * 2
    tiles = triton.cdiv(group[1], 64)

    def call() -> None:
        qkv = _empty(group[0] * group[1], 3, heads, 64, dtype=torch.bfloat16).requires_grad_()
        out = packed_self_attention(qkv, (group,))
        out.backward(torch.empty_like(out))

    bytes = {"_attention_kernel": 4 * row}
    if tiles == 1:
        return Case(call, row // 2, bytes | {"_attention_gradient_kernel": 8 * row})
    bytes |= {"_attention_gradient_queries_kernel": 6 * row, "_attention_gradient_keys_kernel": 6 * row}
    return Case(call, row // 2, bytes, cached=dict.fromkeys(bytes, 2 * (tiles - 1) * row))


def _scatter_add_scaled() -> None:
    x, branch = (_empty(tokens, WIDTH_L, dtype=torch.bfloat16).requires_grad_() for tokens in (TOKENS, KEPT_TOKENS))
    out = scatter_add_scaled(x, LENGTHS, _kept_rows(), branch, _empty(WIDTH_L).requires_grad_())
    out.backward(torch.empty_like(out))


def _ema_list() -> None:
    """As many tensors as ViT-B with its head has, cut equally."""
    count = 160
    teacher, student = (
        [_empty(PARAMETERS // count, dtype=dtype) for _ in range(count)] for dtype in (torch.float32, torch.bfloat16)
    )
    ema_update_(teacher, student, 0.996)


def _adamw_ema(size: int, segments: Segments | None = None, rates: bool = False, hyper: AdamWHyper = HYPER) -> None:
    """Clipped, guarded, and with the rounded teacher that the next step computes with; by ``rates`` of each segment."""
    param, grad, exp_avg, exp_avg_sq, ema = (_empty(size) for _ in range(5))
    scale = _empty() if segments is None else _empty(len(segments.lengths))
    adamw_ema_(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        ema,
        _empty(),
        hyper,
        grad_scale=scale,
        lr_scale=scale.clone() if rates else None,
        segments=segments,
        found_inf=torch.zeros(()),  # whatever else an uninitialised flag holds, the kernel would return at once
        ema_lp=_empty(size, dtype=torch.bfloat16),
    )


def _segments(size: int = PARAMETERS, pairs: int = 79) -> Segments:
    """As many as a ViT with its head has tensors, by default ViT-B; one in two is a bias."""
    lengths = [n for _ in range(pairs) for n in (size // pairs - WIDTH, WIDTH)]
    return make_segments([*lengths, size - sum(lengths)], "cpu")


def _multi_crop(views: int, size: int, area: float, blurred: float, rotates: bool = False) -> Case:
    """Views of 256 images, with DINO v1's draws: ``area`` is the mean share of the image that a view shows, ``blurred``
    that of the views that are blurred; four in five are jittered. The pixels of an image are read once, from memory."""
    source, made = 3 * IMAGES * IMAGE_WIDTH * IMAGE_HEIGHT, 3 * IMAGES * views * size**2
    config = multi_crop_config(size)

    def call() -> None:
        tables = _empty(IMAGES, views, 4, dtype=torch.int32), _empty(IMAGES, views, 14)
        starts, widths = _empty(IMAGES, dtype=torch.int64), _empty(IMAGES, dtype=torch.int32)
        turns = _empty(IMAGES, views, 2) if rotates else None
        multi_crop(_empty(source, dtype=torch.uint8), starts, widths, *tables, turns, size)

    def chunked(view_pixels: int, chunk: int) -> int:
        """Pixels of a box that so many view pixels in a row are made of, in whole chunks."""
        scale = (area * IMAGE_WIDTH * IMAGE_HEIGHT) ** 0.5 / size
        return triton.cdiv(round((view_pixels + 4) * scale), chunk) * chunk

    def programs(config: dict[str, int], across: str) -> int:
        return triton.cdiv(size, config["ROWS"]) * triton.cdiv(size, config[across]) * IMAGES * views

    crop, blur = config["crop"], config["blur"]
    loaded = 3 * chunked(crop["ROWS"], crop["CHUNK_ROWS"]) * chunked(crop["COLUMNS"], crop["CHUNK_COLUMNS"])
    moved = 3 * blur["BLOCK_ROWS"] * (blur["BLOCK_COLUMNS"] + blur["COLUMNS"])
    bytes = {
        "_crop_kernel": source + made,
        "_colour_kernel": round(0.8 * 2 * made),
        "_blur_kernel": round(2 * blurred * made),
    }
    return Case(
        call,
        made,
        bytes | ({"_rotate_kernel": 2 * made} if rotates else {}),
        cached={  # the loops' accesses beyond those
            "_crop_kernel": programs(crop, "COLUMNS") * loaded - source - made,
            "_blur_kernel": round(blurred * programs(blur, "COLUMNS") * moved) - bytes["_blur_kernel"],
        },
    )


CASES = {
    "dino_loss": _dino_loss(0.04),
    "dino_loss" + ON_DEVICE: _dino_loss(TEMP),
    "ibot_loss": _ibot_loss(0.04),
    "ibot_loss" + ON_DEVICE: _ibot_loss(TEMP),
    "ibot_loss, gradient apart": Case(
        lambda: _ibot_loss_rows(1), MASKED * K, {"_ibot_loss_kernel": 3 * MASKED * K * 2}, cached=_SECOND_READING
    ),
    "ibot_loss, no gradient": Case(
        lambda: _ibot_loss_rows(0),
        MASKED * K,
        {"_ibot_loss_kernel": 2 * MASKED * K * 2},
        cached={"_ibot_loss_kernel": MASKED * K * 4},  # the center
        narrow=frozenset({"store"}),
    ),
    "linear_ibot_loss": _linear_ibot_loss(MASKED, K),
    "linear_ibot_loss of 131072": _linear_ibot_loss(4888, 131072),  # DINOv2's ViT-g: 16 x 16 patches
    "sinkhorn": _sinkhorn(0.04),
    "sinkhorn" + ON_DEVICE: _sinkhorn(TEMP),
    "prototype_weight": Case(
        _prototype_weight,
        K * D,
        {"_weight_kernel": K * D * (4 + 2) + K * 4, "_gradient_weight_kernel": K * D * (4 + 2 + 4) + K * 4},
    ),
    "koleo_loss": _koleo_loss(B),
    "koleo_loss of 1024": _koleo_loss(1024),
    "gather_layer_norm": Case(
        _gather_layer_norm,
        TOKENS * WIDTH_L,
        {
            "_gather_layer_norm_kernel": 2 * KEPT_TOKENS * WIDTH_L * 2,
            "_gradient_gather_kernel": (2 * KEPT_TOKENS + TOKENS) * WIDTH_L * 2,
        },
    ),
    "packed_attention, 201 tokens": _packed_attention((2 * B, 201)),
    "packed_attention, 37 tokens": _packed_attention((8 * B, 37)),
    "scatter_add_scaled": Case(
        _scatter_add_scaled,
        TOKENS * WIDTH_L,
        {
            "_scatter_add_kernel": (2 * TOKENS + KEPT_TOKENS) * WIDTH_L * 2,
            "_gradient_scatter_kernel": 3 * KEPT_TOKENS * WIDTH_L * 2,
        },
    ),
    "multi_crop to 224": _multi_crop(2, 224, area=0.7, blurred=0.55),
    "multi_crop to 96": _multi_crop(8, 96, area=0.225, blurred=0.5),
    "multi_crop to 224, rotated": _multi_crop(2, 224, area=0.7, blurred=0.55, rotates=True),
    "ema_update_ flat": Case(
        lambda: ema_update_(
            _empty(PARAMETERS), _empty(PARAMETERS), torch.tensor(0.996), _empty(PARAMETERS, dtype=torch.bfloat16)
        ),
        PARAMETERS,
        {"_ema_kernel": PARAMETERS * (4 + 4 + 4 + 2)},
    ),
    "ema_update_ list": Case(_ema_list, PARAMETERS, {"_ema_list_kernel": PARAMETERS * (4 + 2 + 4)}),
    "adamw_ema_": Case(lambda: _adamw_ema(PARAMETERS), PARAMETERS, {"_adamw_ema_kernel": PARAMETERS * (9 * 4 + 2)}),
    "adamw_ema_ with segments": Case(
        lambda: _adamw_ema(PARAMETERS, _segments()), PARAMETERS, {"_adamw_ema_kernel": PARAMETERS * (9 * 4 + 2)}
    ),
    "adamw_ema_ with lr_scale": Case(
        lambda: _adamw_ema(PARAMETERS_LARGE, _segments(PARAMETERS_LARGE, 151), rates=True),
        PARAMETERS_LARGE,
        {"_adamw_ema_kernel": PARAMETERS_LARGE * (9 * 4 + 2)},
    ),
    "adamw_ema_ with lr_scale" + ON_DEVICE: Case(
        lambda: _adamw_ema(PARAMETERS_LARGE, _segments(PARAMETERS_LARGE, 151), rates=True, hyper=HYPER_ON_DEVICE),
        PARAMETERS_LARGE,
        {"_adamw_ema_kernel": PARAMETERS_LARGE * (9 * 4 + 2)},
    ),
    "segment_squares": Case(
        lambda: segment_squares(_empty(PARAMETERS), _segments()),
        PARAMETERS,
        {"_partial_squares_kernel": PARAMETERS * 4, "_segment_squares_kernel": PARAMETERS // BLOCK * 4},
    ),
}
