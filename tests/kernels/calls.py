"""One call of every operator, forward and backward: for the tests of operators, and for compute-sanitizer.

``python -m tests.kernels.calls`` calls each at ragged sizes of several blocks, in fp32 and bf16. On a GPU:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1    # torch's cache would hide accesses out of bounds
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.kernels.calls

and with ``--tool racecheck`` for races in shared memory, which the interpreter cannot see.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

from fastdino_kernels import (
    AdamWHyper,
    adamw_ema_,
    dino_loss,
    ema_update_,
    fp8_linear,
    gather_layer_norm,
    ibot_loss,
    koleo_loss,
    linear_ibot_loss,
    make_segments,
    multi_crop,
    packed_attention,
    packed_self_attention,
    prototype_weight,
    scatter_add_scaled,
    segment_squares,
    sinkhorn,
)

SIZES = (9001, 37), (1024, 8)  # prototypes and rows: ragged, and whole blocks
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STUDENT_TEMP, TEMP = 0.1, 0.04
HYPER = 1e-3, 0.04, 0.9  # learning rate, weight decay, momentum
ON_DEVICE = ", numbers on the device"
Number = float | Tensor
Lengths = tuple[tuple[int, int], ...]
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def captured(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of :func:`run`, and the results that its replays write."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(function, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        return graph, run(function, args)


def run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """The results, and the gradients for the arguments that take one."""
    results = function(*args)
    results = [results] if isinstance(results, Tensor) else list(results)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return results
    return [results[0].detach().clone(), *torch.autograd.grad(results[0].sin().sum(), leaves)]


def dino(student: Tensor, *rest: Any, inplace_grad: bool = False) -> Tensor:
    *tensors, temp = rest
    temps = {"student_temp": STUDENT_TEMP, "teacher_temp": temp}
    return dino_loss(student * 2, *tensors, **temps, inplace_grad=inplace_grad)


def ibot(student: Tensor, *rest: Any, inplace_grad: bool = False) -> Tensor:
    *tensors, temp = rest
    temps = {"student_temp": STUDENT_TEMP, "teacher_temp": temp}
    return ibot_loss(student * 2, *tensors, **temps, inplace_grad=inplace_grad)


def linear_ibot(*args: Any) -> Tensor:
    *tensors, temp = args
    return linear_ibot_loss(*tensors, student_temp=STUDENT_TEMP, teacher_temp=temp)


def balanced(logits: Tensor, temp: Number) -> tuple[Tensor, Tensor]:
    return sinkhorn(logits, temp=temp)


def gathered(x: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor, lengths: Lengths) -> Tensor:
    return gather_layer_norm(x, lengths, rows, weight, bias)


def attended(q: Tensor, k: Tensor, v: Tensor, *, lengths: Lengths) -> Tensor:
    return packed_attention(q, k, v, queries=lengths, keys=lengths)


def scattered(x: Tensor, branch: Tensor, layer_scale: Tensor, *rows: Tensor, lengths: Lengths) -> Tensor:
    return scatter_add_scaled(x, lengths, rows, branch, layer_scale)


def ema(teacher: Tensor, student: Tensor, momentum: Number) -> list[Tensor]:
    teacher, teacher_lp = teacher.clone(), torch.empty_like(teacher, dtype=torch.bfloat16)
    ema_update_(teacher, student, momentum, teacher_lp)
    return [teacher, teacher_lp]


def ema_of_lists(teacher: Tensor, student: Tensor) -> list[Tensor]:
    teachers = [teacher.clone(), teacher[:7] + 1]
    ema_update_(teachers, [student, student[:7]], 0.9)
    return teachers


def adamw(param: Tensor, grad: Tensor, *numbers: Number) -> list[Tensor]:
    state = [param.clone(), param * 0.1, param * param, param + 1]
    param_lp = torch.empty_like(param, dtype=torch.bfloat16)
    step = torch.ones((), device=param.device)
    adamw_ema_(state[0], grad, *state[1:], step, AdamWHyper(*numbers), param_lp=param_lp)
    return [*state, param_lp]


def clipped(param: Tensor, grad: Tensor, *numbers: Number, rates: bool = False) -> list[Tensor]:
    segments = make_segments((3000, 0, len(param) - 3000), param.device)
    state = [param.clone(), param * 0.1, param * param, param + 1]
    scale = 1 / (1 + segment_squares(grad, segments))
    flag, step = torch.zeros((), device=param.device), torch.ones((), device=param.device)
    options: dict[str, Any] = {"grad_scale": scale, "segments": segments, "found_inf": flag}
    options["lr_scale"] = scale if rates else None
    adamw_ema_(state[0], grad, *state[1:], step, AdamWHyper(*numbers), **options)
    return state


def crops(pixels: Tensor, starts: Tensor, widths: Tensor, boxes: Tensor, params: Tensor, turns: Tensor) -> list[Tensor]:
    normal = torch.ones(2, 3, device=pixels.device)
    return [
        multi_crop(pixels, starts, widths, boxes, params, turns, 17),
        multi_crop(pixels, starts, widths, boxes, params, None, 20, patch=4, normal=normal),
    ]


def crops_of_two_images(device: str) -> tuple[Tensor, ...]:
    """Of 24 x 20 and 9 x 30 pixels; one view of each is rotated, both change in contrast, one is blurred."""
    pixels = torch.arange(24 * 20 * 3 + 9 * 30 * 3, device=device).mul(37).remainder(251).to(torch.uint8)
    starts, widths = torch.tensor([0, 24 * 20 * 3], device=device), torch.tensor([20, 30], device=device).int()
    boxes = torch.tensor([[[0, 0, 20, 24], [3, 4, 9, 19]], [[0, 0, 30, 9], [21, 0, 9, 9]]], device=device).int()
    view = torch.tensor([0, 0, 0, 0, 1, 0, 7, 1.2, 0.8, 1.3, 0.1, 0, 0, 1])
    params = view.expand(2, 2, 14).clone()
    params[0, 0, 5], params[1, 1, 12] = 30, 1.5
    turns = torch.tensor([0.8660254, 0.5], device=device).expand(2, 2, 2)
    return pixels, starts, widths, boxes, params.to(device), turns


def make_calls(
    device: str = DEVICE,
    dtype: torch.dtype = torch.float32,
    K: int = 100,
    rows: int = 5,
    numbers_dtype: torch.dtype = torch.float64,
) -> dict[str, Call]:
    """By name a function and its arguments: logits and features of ``dtype``, K prototypes, ``rows`` patches.

    Each that takes numbers of a schedule is there twice, with floats and with tensors of ``numbers_dtype``.
    """

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(device).manual_seed(sum(shape))
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    def leaf(*shape: int) -> Tensor:
        return random(*shape, dtype=dtype).requires_grad_()

    n, width, tokens = 5000, 8 * rows + 8, rows + 2
    logits = leaf(4, 3, K), random(2, 3, K, dtype=dtype), random(K)
    one_view = leaf(3, 2, K), random(1, 2, K, dtype=dtype), random(K)
    patches = leaf(rows, K), random(rows, K, dtype=dtype), random(K), random(rows).exp()
    teacher = random(rows, width, dtype=dtype), random(K, width, dtype=dtype)
    lengths = ((4, tokens), (3, 3))
    rows_kept = torch.tensor([2, 0], device=device), torch.tensor([1], device=device)  # of either group
    packed, branch = leaf(4 * tokens + 9, width), leaf(2 * tokens + 3, width)
    long = ((2, min(K, 150)), (3, 3))
    half = torch.float16 if dtype == torch.float32 else dtype  # which its kernels take on a GPU
    qkv = random(sum(n * each for n, each in long), 3, 2, 16, dtype=half)
    heads = tuple(x.clone().requires_grad_() for x in qkv.unbind(1))
    linear = leaf(rows, width), leaf(K, width), *teacher, random(K), random(rows).exp()
    shard = random(n), random(n, dtype=dtype)
    scheduled: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[float, ...]]] = {
        "dino_loss": (dino, logits, (TEMP,)),
        "dino_loss in place": (partial(dino, inplace_grad=True), logits, (TEMP,)),
        "dino_loss in place, one teacher view": (partial(dino, inplace_grad=True), one_view, (TEMP,)),
        "ibot_loss": (ibot, patches, (TEMP,)),
        "ibot_loss in place": (partial(ibot, inplace_grad=True), patches, (TEMP,)),
        "sinkhorn": (balanced, (random(rows, K, dtype=dtype),), (0.1,)),
        "linear_ibot_loss": (linear_ibot, linear, (TEMP,)),
        "ema_update_": (ema, (random(n), random(n, dtype=torch.bfloat16)), (0.9,)),
        "adamw_ema_": (adamw, shard, HYPER),
        "adamw_ema_ with segments": (clipped, shard, HYPER),
        "adamw_ema_ with rates": (partial(clipped, rates=True), shard, HYPER),
    }
    found: dict[str, Call] = {}
    for name, (call, tensors, numbers) in scheduled.items():
        found[name] = call, (*tensors, *numbers)
        on_device = [torch.tensor(number, dtype=numbers_dtype, device=device) for number in numbers]
        found[name + ON_DEVICE] = call, (*tensors, *on_device)
    return found | {
        "prototype_weight": (prototype_weight, (leaf(K, width), random(K, 1))),
        "koleo_loss": (koleo_loss, (leaf(2, rows, width),)),
        "multi_crop": (crops, crops_of_two_images(device)),
        "fp8_linear": (fp8_linear, (leaf(2, rows, 48), leaf(32, 48), leaf(32))),
        "packed_attention": (partial(attended, lengths=long), heads),
        "packed_self_attention": (partial(packed_self_attention, lengths=long), (qkv.requires_grad_(),)),
        "gather_layer_norm": (partial(gathered, lengths=lengths), (packed, leaf(width), leaf(width), *rows_kept)),
        "scatter_add_scaled": (partial(scattered, lengths=lengths), (packed, branch, leaf(width), *rows_kept)),
        "ema_update_ of lists": (ema_of_lists, (random(n), random(n, dtype=torch.bfloat16))),
    }


def main() -> int:
    """Calls each; a sanitizer says what it saw."""
    for dtype in (torch.float32, torch.bfloat16):
        for K, rows in SIZES:
            for name, call in make_calls(dtype=dtype, K=K, rows=rows).items():
                run(*call)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                print(f"{name}, {dtype}, {K} prototypes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
