"""What the kernels are meant to reach, each as a figure of a result file of bench.kernels; bench.report shows both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.kernels.case import OURS

Cases = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""Figures by variant, by operation and shape."""
HEADLINE, PATCHES = "10,2,64,65536,bf16", "3764,65536,bf16"


@dataclass(frozen=True)
class Target:
    """``read`` raises KeyError where the file lacks a case or variant."""

    device: str  # "cuda", on an H200, or "cpu"
    text: str
    read: Callable[[Cases], float]
    bound: float
    at_most: bool = False
    unit: str = "x"

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def read(document: dict[str, Any]) -> Cases:
    """The figures of a result file of bench.kernels."""
    cases: Cases = {}
    for entry in document["benchmarks"]:
        if info := entry["extra_info"]:
            cases.setdefault((info["operation"], info["shape"]), {})[info["variant"]] = info
    return cases


def _share(operation: str, shape: str) -> Callable[[Cases], float]:
    return lambda cases: 100 * cases[operation, shape][OURS]["copy_fraction"]


def _times(operation: str, shape: str, *variants: str) -> Callable[[Cases], float]:
    """How many times as long the fastest of ``variants`` takes."""
    return lambda cases: min(cases[operation, shape][variant]["times_ours"]["median"] for variant in variants)


def _memory(operation: str, shape: str, variant: str) -> Callable[[Cases], float]:
    """How many times as many bytes ``variant`` needs beyond its inputs."""
    return lambda cases: cases[operation, shape][variant]["peak_bytes"] / cases[operation, shape][OURS]["peak_bytes"]


def _sum(figure: str, shape: str, *calls: tuple[str, str]) -> Callable[[Cases], float]:
    """``figure`` of several operations' variants together."""
    return lambda cases: sum(cases[operation, shape][variant][figure] for operation, variant in calls)


def _patches(figure: str, *variants: str) -> Callable[[Cases], float]:
    """Sinkhorn and iBOT's loss by ``variants`` of each, over ours."""
    operations = ("sinkhorn", "ibot_loss")
    theirs = _sum(figure, PATCHES, *zip(operations, variants, strict=True))
    ours = _sum(figure, PATCHES, *((operation, OURS) for operation in operations))
    return lambda cases: theirs(cases) / ours(cases)


_BOTH = (("sinkhorn", OURS), ("ibot_loss", OURS))
_FOREACH = "torch AdamW(fused) and _foreach_lerp_"
_CPU_LOSSES = [("dino_loss", "10,2,8,4096"), ("ibot_loss", "64,4096"), ("ibot_loss", "512,16384")]

TARGETS = [
    Target("cuda", "`dino_loss`, 2 + 8 views: share of copy bandwidth", _share("dino_loss", HEADLINE), 80, unit="%"),
    Target("cuda", "its torch.compile takes", _times("dino_loss", HEADLINE, "formula, torch.compile"), 5),
    Target("cuda", "its best eager alternative takes", _times("dino_loss", HEADLINE, "formula", "lightly"), 14),
    Target(
        "cuda", "its memory beyond the inputs", lambda cases: 1e-6 * cases["dino_loss", HEADLINE][OURS]["peak_bytes"],
        20, at_most=True, unit="MB",
    ),
    Target(
        "cuda", "`sinkhorn` and `ibot_loss`, 3764 patches", _sum("milliseconds", PATCHES, *_BOTH), 1.3, at_most=True,
        unit="ms",
    ),
    Target(
        "cuda", "their torch.compile takes", _patches("milliseconds", "torch.compile", "formula, torch.compile"), 3
    ),
    Target("cuda", "their eager form takes", _patches("milliseconds", "lightly", "lightly"), 10),
    Target("cuda", "it needs, in memory", _patches("peak_bytes", "lightly", "lightly"), 5),
    Target("cuda", "`ema_update_`, 304 M: share of copy", _share("ema_update_", "1,304000000"), 90, unit="%"),
    Target("cuda", "with a bf16 student", _share("ema_update_", "1,304000000,bf16"), 90, unit="%"),
    Target("cuda", "`adamw_ema_`, 304 M: torch's takes", _times("adamw_ema_", "294,304000000", _FOREACH), 1.4),
    Target("cuda", "`prototype_weight`: eager takes", _times("prototype_weight", "65536,256,bf16", "formula"), 2),
]  # fmt: skip
for _operation, _shape in _CPU_LOSSES:
    for _dtype in ("", ",bf16"):
        _name = f"`{_operation}` {_shape}{_dtype}: the published formula"
        TARGETS += [
            Target("cpu", f"{_name} takes", _times(_operation, _shape + _dtype, "formula"), 1),
            Target("cpu", f"{_name} needs, in memory", _memory(_operation, _shape + _dtype, "formula"), 2),
        ]
