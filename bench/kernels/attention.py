"""Attention over packed views, forward and backward: ours in the middle of everything that torch and xformers offer.

Correct first: every way is judged against float64, then timed in turns. ``python -m bench.kernels.attention`` writes
bench/results/attention-DEVICE.json. On a CPU a small form, SDPA alone.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant
from bench.kernels.measure import ROUNDS, measure
from bench.record import device_here, positive, provenance, result_path, write
from bench.timing import Clock
from fastdino.model.attention import Lengths, attention
from fastdino.training.flops import matmul_flops

HEADS, HEAD_DIM = 6, 64  # ViT-S
# Sequences x tokens of each, of 64 images: 2 global views of 196 patches, CLS, 4 registers; 8 local ones of 36 and CLS.
# DINOv2's patches of 14 pixels; and 16 images of 518 pixels of such.
SHAPES = {
    "cuda": ["128x201+512x37", "128x201", "512x37", "128x261+512x54", "16x1374"],
    "cpu": ["2x37+8x10"],
}
BACKENDS = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION", "SDPA efficient": "EFFICIENT_ATTENTION"}
CHOICES = {f"fastdino, {choice}": choice for choice in ("triton", "varlen", "xformers", "sdpa")}  # of model.attention
# Products of a (tokens, tokens) with a (tokens, d) matrix: 2 forward, 5 backward.
PRODUCTS = 7

Attend = Callable[[Tensor], Tensor]
"""q, k, v in one (1, M, 3, H, d), packed, to the output (1, M, H, d), packed too."""


class Inputs(NamedTuple):
    qkv: Tensor  # (1, M, 3, H, d), a leaf, as the layer below gives them
    grad: Tensor  # (1, M, H, d) that comes back


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.attention", description=__doc__)
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", help="instead of the usual ones, such as 128x201+512x37")
    parser.add_argument("--rounds", type=positive)
    parser.add_argument("--out", type=Path, help="default: bench/results/attention-DEVICE.json, if no shape is given")
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    rounds = options.rounds or ROUNDS[device.type]
    try:
        cases = [make_case(device, shape) for shape in options.shape or SHAPES[device.type]]
    except ValueError:
        parser.error(f"--shape {' '.join(options.shape)}: such as {SHAPES[device.type][0]}, sequences x tokens of each")
    found = [figures(case, device, rounds) for case in cases]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    document = {
        "provenance": provenance(device, "bench.kernels.attention"),
        "matmul_flops_per_s": matmul_flops(device, dtype, Clock(device)),
        "cases": found,
    }
    if options.out or not options.shape:
        write(options.out or result_path("attention", device), document)
    for case in found:
        print(case["shape"])
        for name, f in case["variants"].items():
            print(f"  {name:24} {f['milliseconds']:9.3f} ms {1e-12 * f['flops_per_s']:8.2f} TFLOP/s"
                  f"  x {f['times_ours']['median']:.3f}")  # fmt: skip
    return 0


def figures(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Of every way to compute ``case``; raises AssertionError, and times nothing, when a result is wrong."""
    flops = sum(sequences * PRODUCTS * 2 * tokens**2 * HEADS * HEAD_DIM for sequences, tokens in lengths(case.shape))
    measured = measure(case, device, rounds)
    for name, f in measured.figures.items():
        f["flops_per_s"] = flops / statistics.median(measured.seconds[name])
    return {"shape": case.shape, "flops": flops, "variants": measured.figures}


def lengths(shape: str) -> Lengths:
    """``128x201+512x37`` -> ((128, 201), (512, 37))."""
    groups = (group.split("x") for group in shape.split("+"))
    return tuple((int(sequences), int(tokens)) for sequences, tokens in groups)


def make_case(device: torch.device, shape: str) -> Case:
    """bf16 on a GPU, fp32 on a CPU."""
    groups = lengths(shape)
    total = sum(sequences * tokens for sequences, tokens in groups)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make(seed: int) -> Inputs:
        random = []
        for i, rest in enumerate([(3,), ()]):
            generator = torch.Generator(device).manual_seed(2 * seed + i)
            random.append(torch.randn(1, total, *rest, HEADS, HEAD_DIM, generator=generator, device=device))
        return Inputs(random[0].to(dtype).requires_grad_(), random[1].to(dtype))

    ways = {OURS: _ours(groups, "auto"), PLAIN: _per_group(groups, formula), **_alternatives(groups, device)}
    variants = {name: Variant(_bind(attend)) for name, attend in ways.items()}

    def exact(inputs: Inputs) -> list[Tensor]:
        return _bind(_per_group(groups, formula))(
            Inputs(inputs.qkv.detach().double().requires_grad_(), inputs.grad.double())
        )()

    # q, k, v and the output's gradient are read, the output and the gradients of q, k, v are written.
    return Case("attention", shape, make, exact, variants, 8 * total * HEADS * HEAD_DIM * dtype.itemsize)


def _alternatives(groups: Lengths, device: torch.device) -> dict[str, Attend]:
    ways: dict[str, Attend] = {"SDPA": _per_group(groups, F.scaled_dot_product_attention)}
    if device.type != "cuda":
        return ways
    for name, backend in BACKENDS.items():
        ways[name] = _per_group(groups, _on(getattr(SDPBackend, backend)))
    return ways | {name: _ours(groups, choice) for name, choice in CHOICES.items()}


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v for (sequences, H, tokens, d), with the softmax in at least fp32."""
    scores = q @ k.transpose(-2, -1) / HEAD_DIM**0.5
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def _ours(groups: Lengths, choice: str) -> Attend:
    return lambda qkv: attention(qkv, queries=groups, keys=groups, choice=choice)


def _per_group(groups: Lengths, dense: Attend) -> Attend:
    """One call of ``dense`` for each size of view, whose sequences are equally long."""

    def attend(packed: Tensor) -> Tensor:
        outputs = []
        parts = zip(*(x.split([n * tokens for n, tokens in groups]) for x in packed[0].unbind(1)), strict=True)
        for group, qkv in zip(groups, parts, strict=True):
            output = dense(*(x.unflatten(0, group).transpose(1, 2) for x in qkv))
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0)

    return attend


def _on(backend: SDPBackend) -> Attend:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return dense


def _bind(attend: Attend) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        def call() -> list[Tensor]:
            output = attend(inputs.qkv)
            (grad,) = torch.autograd.grad(output, inputs.qkv, inputs.grad)
            return [output.detach(), grad]

        return call

    return bind


if __name__ == "__main__":
    sys.exit(main())
