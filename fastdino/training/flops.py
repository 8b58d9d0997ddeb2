"""How well a step uses its device: its FLOPs by definition, the device's rate, and the share of the two, MFU."""

import itertools
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdino.config import Config, HeadConfig
from fastdino.data.masks import num_hidden
from fastdino.data.views import groups
from fastdino.distributed import Ranks
from fastdino.model.network import build_backbone
from fastdino.model.vit import SIZES

# FLOP/s of dense bf16 matrix products with fp32 sums, by the name that CUDA gives the device. From NVIDIA's data sheets
# of A100, H100, H200, L4, L40S, A10 and HGX B200 (half of what they give for sparse matrices, where they give those)
# and its white paper on Ada, appendix A. A slice of a GPU (MIG) or a mobile one has another name, and is not listed.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def step_flops(config: Config) -> float:
    """FLOPs of the matrix products and convolutions of one rank's step, by the definition of the step.

    A backward pass takes twice its forward, but for the pixels, which need no gradient; the teacher has none. Where
    drop path leaves views out of a branch (drop_path_rule=uniform), they do not count. What an implementation avoids
    or repeats counts once: the last block is that of all tokens, and what checkpointing recomputes is nothing. Nor is
    what a step does once for all images, such as resampling positions.
    """
    views, batch = config.views, config.run.local_batch
    heads: list[tuple[float, float, HeadConfig]] = [(views.num_views, 2, config.head)]
    if config.loss.patch_weight:
        side = views.global_size // config.model.patch_size
        hidden = num_hidden(batch, views, (side, side)) / batch
        heads.append((hidden, hidden, config.patch_head or config.head))
    student, teacher, width = (_vit_flops if config.model.is_vit else _timm_flops)(config)
    for student_rows, teacher_rows, head in heads:
        row = _head_flops(width, head)
        student += 3 * batch * student_rows * row
        teacher += batch * teacher_rows * row
    return config.engine.accumulate * (student + teacher)


def _head_flops(width: int, head: HeadConfig) -> float:
    """Forward FLOPs of one row: the MLP and the products with the prototypes."""
    widths = [width, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim, head.num_prototypes]
    return 2.0 * sum(a * b for a, b in itertools.pairwise(widths))


def _vit_flops(config: Config) -> tuple[float, float, int]:
    """Of a micro batch: the student's, forward and backward, the teacher's; and the width of the features."""
    model, batch = config.model, config.run.local_batch
    size = SIZES[model.arch.removeprefix("vit_")]
    width, student, teacher = size.width, 0.0, 0.0
    for name, (count, pixels) in groups(config.views).items():
        sequences, patches = count * batch, (pixels // model.patch_size) ** 2
        tokens = patches + 1 + (model.registers or 0)
        embedding = 2.0 * sequences * patches * config.data.channels * model.patch_size**2 * width
        linear = 2 * tokens * (4 * width**2 + (3 if size.swiglu else 2) * width * size.hidden)
        block = linear + 4 * tokens**2 * width  # of one sequence: and its attention's two products
        kept = sequences
        if model.drop_path_rule == "uniform" and model.drop_path:
            kept = max(1, int(sequences * (1 - model.drop_path)))
        student += 2 * embedding + 3 * block * (kept * (size.depth - 1) + sequences)
        if name == "global":
            teacher += embedding + block * size.depth * sequences
    return student, teacher, width


def _timm_flops(config: Config) -> tuple[float, float, int]:
    """The same of a backbone of timm, by torch's counter, from shapes alone."""
    views, channels, batch = config.views, config.data.channels, config.run.local_batch
    backbone = build_backbone(config.model, views.global_size, channels=channels).to("meta")
    student, teacher = 0.0, 0.0
    for name, (count, side) in groups(views).items():
        pair = torch.empty(2, channels, side, side, device="meta")  # two, as batch normalisation needs
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            features = backbone(pair)
        with FlopCounterMode(display=False) as backward:
            features.sum().backward()
        of_view, again = forward.get_total_flops() / 2, backward.get_total_flops() / 2
        student += count * batch * (of_view + again)
        if name == "global":
            teacher += count * batch * of_view
    return student, teacher, backbone.num_features


def published_peak(config: Config, device: torch.device) -> float | None:
    """FLOP/s that the device's maker promises for matrix products in the step's precision, bf16 under engine.fp8 too.

    None where it is not known: on a CPU, on a GPU that is not in PEAKS, and in fp32, which has other units.
    """
    if device.type != "cuda" or not config.engine.uses_bf16(device.type):
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


def matmul_flops(device: torch.device, dtype: torch.dtype, clock: Callable[[Callable[[], object]], float]) -> float:
    """Best FLOP/s of ten square matrix products on this device, in this process; ``clock`` gives a call's seconds."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = [clock(lambda: torch.mm(a, b, out=out)) for _ in range(12)]
    return 2 * n**3 / min(seconds[2:])


def peak_memory(device: torch.device) -> int:
    """Most bytes of tensors on a GPU so far; without one, most memory that the process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if high := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
        return int(high[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # where Linux did not, it counts the parent's too


def memory(device: torch.device) -> dict[str, float]:
    """Figures by name, in GB of 1e9 bytes; none of them waits for the device.

    ``memory_gb`` and ``peak_memory_gb``, now and at most, of a GPU's tensors, without one of the process. Of a GPU also
    ``reserved_memory_gb``, which tensors and the allocator's free blocks take, and ``alloc_retries``, how often memory
    was short and free blocks were given back: each waits for the device.
    """
    found = {"peak_memory_gb": peak_memory(device) / 1e9}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        for name, key in (("memory_gb", "allocated_bytes"), ("reserved_memory_gb", "reserved_bytes")):
            found[name] = stats.get(f"{key}.all.current", 0) / 1e9
        return found | {"alloc_retries": stats.get("num_alloc_retries", 0)}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return found | {"memory_gb": pages * resource.getpagesize() / 1e9}


def reset_peak_memory(device: torch.device) -> None:
    """Lets :func:`peak_memory` begin anew; on a CPU where the system is Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")


@dataclass(frozen=True)
class Meter:
    """What a pace of training means for one rank's device."""

    device: torch.device
    world_size: int
    flops: float
    """Of one image."""
    peak: float | None
    """FLOP/s of which MFU is the share; None: there is no MFU."""

    @classmethod
    def of(cls, config: Config, ranks: Ranks) -> Self:
        """By the published peak; where there is none nothing is counted."""
        peak = published_peak(config, ranks.device)
        images = config.run.local_batch * config.engine.accumulate
        return cls(ranks.device, ranks.world_size, step_flops(config) / images if peak else 0.0, peak)

    def __call__(self, images_per_second: float) -> dict[str, float]:
        """Figures by name: ``images_per_second_per_device``, those of :func:`memory` and, if known, ``mfu``."""
        each = images_per_second / self.world_size
        found = {"images_per_second_per_device": each, **memory(self.device)}
        return found | ({"mfu": each * self.flops / self.peak} if self.peak else {})
