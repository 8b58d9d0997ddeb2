"""``fastdino plan``: whether a training fits before it is started, at which ZeRO stage, and how much it sends."""

import dataclasses
import json as json_
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdino.config import Config, ConfigError
from fastdino.config.errors import require
from fastdino.planning.footprint import GB, Layout, peak, states, traffic
from fastdino.training.flops import step_flops

STAGES: tuple[int, ...] = (0, 1, 2, 3)
CHECKPOINTING: tuple[str, ...] = ("none", "selective", "full")
USABLE = 0.9  # of a GPU's memory: blocks of the allocator do not fit together, and steps differ
MFU = 0.4
FABRICS = {"within a host, 350 GB/s": 350e9, "between hosts, 40 GB/s": 40e9}  # of each GPU
MOST_GPUS = 2**16
WHAT = {
    "masters": "fp32 weights", "moments": "the optimizer's", "teacher": "its average and its weights",
    "weights": "the student's copy for forward and backward", "gradients": "sums, and those on their way",
    "buffers": "DeepSpeed's, for gradients", "gathered": "whole weights of some blocks, at stage 3",
    "activations": "what the student keeps for its backward pass", "logits": "heads, prototypes and losses",
    "allocator": "its waste, and CUDA's own",
}  # fmt: skip


class Way(NamedTuple):
    """A ZeRO stage with a checkpointing, and the memory of a rank under both."""

    stage: int
    checkpointing: str
    parts: dict[str, int]
    """Bytes at the peak of a step."""

    @property
    def bytes(self) -> int:
        """At the peak."""
        return sum(self.parts.values())

    @property
    def flags(self) -> str:
        """For ``fastdino train``."""
        return f"--engine.zero-stage {self.stage} --engine.checkpointing {self.checkpointing}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of each GPU by ZeRO stage, bytes on the wire, and the stage and checkpointing to take. Needs no GPU.

    Takes the recipe's settings as train does: fastdino plan dinov2_vit_giant_14 --gpus 64 --gpu-memory 80
    --run.local-batch 16. A stage or checkpointing that is set (--engine.zero-stage 3) is the only one that is tried.

    ZeRO cuts over the GPUs: 0 nothing, 1 masters, moments and the teacher's average, 2 gradients too, 3 weights too.
    Checkpointing keeps fewer activations and computes them again. Of all that fits into 0.9 of the memory the cheapest
    is taken: least computed again at stages 0 to 2, which send as much as each other, the lowest of these; then stage
    3, whose gathers a forward pass waits for. Masters to gradients that stay are exact; the rest is estimated.
    """

    gpus: int = 8
    """W, processes with a GPU each, over all hosts."""
    gpu_memory: float = 80.0
    """Of each GPU, in GB of 1e9 bytes."""
    global_batch: int = 0
    """Images of a step over all GPUs; sets run.local_batch. 0: run.local_batch * gpus * engine.accumulate."""
    tflops: float = 989.4
    """Of a GPU, dense in bf16; an H100 or H200's by default."""
    json: bool = False
    """Print all figures as JSON, in bytes and seconds."""

    def __post_init__(self) -> None:
        require(1 <= self.gpus <= MOST_GPUS, "--gpus", self.gpus, f"1 to {MOST_GPUS}")
        for name in ("gpu_memory", "tflops"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            require(0 < value < math.inf, flag, value, "a positive number")
        require(self.global_batch >= 0, "--global-batch", self.global_batch, "a positive number of images")

    def __call__(self, config: Config) -> "Planned":
        """Raises ConfigError for a global batch that does not divide, and where nothing fits."""
        config = self._shared(config)
        layout = Layout.of(config)
        tried = ways(config, layout, self.gpus)
        fitting = [way for way in tried if way.bytes <= self.usable]
        if not fitting:
            raise ConfigError(self._refusal(config, layout, tried))
        return Planned(self, config, layout, tried, fitting[0])

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a plan may take."""
        return USABLE * self.gpu_memory * GB

    def _shared(self, config: Config) -> Config:
        """``config`` with the local batch that the global one comes to."""
        if not self.global_batch:
            return config
        unit = self.gpus * config.engine.accumulate
        batch, rest = divmod(self.global_batch, unit)
        if rest or not batch:
            near = " or ".join(str(unit * n) for n in (batch, batch + 1) if n)
            raise ConfigError(
                f"--global-batch {self.global_batch} is no multiple of {self.gpus} GPUs times engine.accumulate="
                f"{config.engine.accumulate}: use {near}"
            )
        return dataclasses.replace(config, run=dataclasses.replace(config.run, local_batch=batch))

    def _refusal(self, config: Config, layout: Layout, tried: list[Way]) -> str:
        """What is least, what makes it large, and how many GPUs would do, or what else to change."""
        least = min(tried, key=lambda way: way.bytes)
        said = (
            f"{config.model.arch} with run.local_batch={config.run.local_batch} does not fit into {self.gpus} GPUs of "
            f"{self.gpu_memory:g} GB: at least {_gb(least.bytes)} each (ZeRO {least.stage}, checkpointing "
            f"{least.checkpointing}), and {_gb(self.usable)} can be used"
        )
        enough = smallest(config, layout, self.usable, self.gpus)
        batch = least.parts["activations"] + least.parts["logits"]
        less = f"lower run.local_batch ({_gb(batch)} are its activations and logits)"
        if enough is None:
            return f"{said}. More GPUs do not help: {less}, or take GPUs with more memory"
        gpus, way = enough
        flags = f"ZeRO {way.stage}, checkpointing {way.checkpointing}"
        return f"{said}. Take {gpus} of them ({flags}), or {less}"


def ways(config: Config, layout: Layout, ranks: int) -> list[Way]:
    """What can be tried, cheapest first, of what the config leaves open."""
    engine, stages, kinds = config.engine, list(STAGES), list(CHECKPOINTING)
    if engine.name == "torch" or (ranks == 1 and engine.zero_stage == "auto"):
        stages = [0]  # nobody to share with
    elif engine.zero_stage != "auto":
        stages = [engine.zero_stage]
    if engine.checkpointing != "none":
        kinds = [engine.checkpointing]
    elif not config.model.is_vit:
        kinds = ["none"]  # what a backbone of timm makes again is not known
    order = [(stage, how) for how in kinds for stage in stages if stage < 3]
    order += [(stage, how) for how in kinds for stage in stages if stage == 3]
    return [Way(stage, how, peak(checkpointed(config, how), layout, stage, ranks)) for stage, how in order]


def smallest(config: Config, layout: Layout, usable: float, more_than: int) -> tuple[int, Way] | None:
    """The least number of GPUs that the config fits on, and how; None where there is none."""

    def fit(ranks: int) -> Way | None:
        return next((way for way in ways(config, layout, ranks) if way.bytes <= usable), None)

    low, high = more_than, more_than + 1
    while not fit(high):
        if high >= MOST_GPUS:
            return None
        low, high = high, min(2 * high, MOST_GPUS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(middle) else (middle, high)
    found = fit(high)
    assert found is not None
    return high, found


def checkpointed(config: Config, how: str) -> Config:
    """``config`` with that checkpointing."""
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, checkpointing=how))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Planned:
    """A plan that fits."""

    plan: Plan
    config: Config
    layout: Layout
    ways: list[Way]
    chosen: Way

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        return self.config.run.local_batch * self.plan.gpus * self.config.engine.accumulate

    @property
    def compute_seconds(self) -> float:
        """Of a step at an MFU of 40 %, without what is computed again."""
        return step_flops(self.config) / (MFU * self.plan.tflops * 1e12)

    def wire_bytes(self, stage: int) -> float:
        """That a GPU sends in a step."""
        return sum(sent.per_gpu(self.plan.gpus) for sent in traffic(self.config, self.layout, stage, self.plan.gpus))

    def why(self) -> str:
        """The reason of the choice, in words."""
        chosen, index = self.chosen, self.ways.index(self.chosen)
        if len(self.ways) == 1:
            return "the settings leave no other"
        if index == 0:
            return "the first that is tried fits: the lowest stage that the settings leave, with nothing computed again"
        before = min(self.ways[:index], key=lambda way: way.bytes)
        return (
            f"what is cheaper takes {_gb(before.bytes)} or more; this takes {_gb(chosen.bytes)} of the "
            f"{_gb(self.plan.usable)} that can be used"
        )

    def table(self) -> str:
        """For a terminal."""
        plan, config, chosen = self.plan, self.config, self.chosen
        kinds = dict.fromkeys(way.checkpointing for way in self.ways)
        lines = [
            f"{config.model.arch}, {self.layout.params / 1e6:,.0f} M parameters with heads, on {plan.gpus} GPUs of "
            f"{plan.gpu_memory:g} GB; {config.run.local_batch} images each, {self.global_batch} a step",
            "",
            "GB of a GPU at the peak of a step (estimated)",
            f"  {'checkpointing':16}" + "".join(f"{f'ZeRO {stage}':>10}" for stage in self._stages),
        ]
        for how in kinds:
            found = {way.stage: way.bytes for way in self.ways if way.checkpointing == how}
            lines.append(f"  {how:16}" + "".join(f"{found[stage] / GB:10.1f}" for stage in self._stages))
        lines.append(f"  {'stays, exact':16}" + "".join(f"{self._stays(stage) / GB:10.1f}" for stage in self._stages))
        lines.append(f"  {'sent in a step':16}" + "".join(f"{self.wire_bytes(s) / GB:10.1f}" for s in self._stages))
        lines += ["", f"take {chosen.flags}", f"  {self.why()}", "", f"of its {_gb(chosen.bytes)}"]
        lines += [f"  {part:12}{size / GB:8.2f} GB  {WHAT[part]}" for part, size in chosen.parts.items() if size]
        return "\n".join([*lines, "", *self._sent()])

    @property
    def _stages(self) -> list[int]:
        return sorted({way.stage for way in self.ways})

    def _stays(self, stage: int) -> int:
        return sum(states(self.config, self.layout, stage, self.plan.gpus).values())

    def _sent(self) -> list[str]:
        sent = traffic(self.config, self.layout, self.chosen.stage, self.plan.gpus)
        if not sent:
            return [f"nothing is sent; a step computes for {self.compute_seconds:.3f} s at {MFU:.0%} MFU (estimated)"]
        exact = "of student and teacher estimated" if self.chosen.stage == 3 else "exact"
        lines = [f"sent by a GPU in a step ({exact})"]
        for part in sent:
            size = part.per_gpu(self.plan.gpus)
            lines.append(f"  {part.what:12}{size / GB:8.2f} GB  {part.calls} x {part.kind}")
        lines.append(f"  a step computes for {self.compute_seconds:.3f} s at {MFU:.0%} MFU (estimated)")
        for fabric, seconds in self.fabric_seconds().items():
            limit = ": more than it computes, so the network is the limit" * (seconds > self.compute_seconds)
            lines.append(f"  and sends for {seconds:.3f} s {fabric}{limit}")
        return lines

    def fabric_seconds(self) -> dict[str, float]:
        """Of sending, if nothing else is in its way."""
        return {fabric: self.wire_bytes(self.chosen.stage) / speed for fabric, speed in FABRICS.items()}

    def document(self) -> dict[str, Any]:
        """All figures, for a file."""
        gpus, chosen = self.plan.gpus, self.chosen
        return {
            "arch": self.config.model.arch,
            "parameters": self.layout.params,
            "gpus": gpus,
            "gpu_memory": round(self.plan.gpu_memory * GB),
            "local_batch": self.config.run.local_batch,
            "global_batch": self.global_batch,
            "ways": [
                {"zero_stage": w.stage, "checkpointing": w.checkpointing, "bytes": w.bytes, "parts": w.parts,
                 "fits": w.bytes <= self.plan.usable}
                for w in self.ways
            ],
            "stays": {str(stage): states(self.config, self.layout, stage, gpus) for stage in self._stages},
            "sent": {
                str(stage): [
                    {**dataclasses.asdict(sent), "bytes_per_gpu": sent.per_gpu(gpus)}
                    for sent in traffic(self.config, self.layout, stage, gpus)
                ]
                for stage in self._stages
            },
            "take": {"zero_stage": chosen.stage, "checkpointing": chosen.checkpointing, "why": self.why()},
            "seconds": {"compute": self.compute_seconds, **self.fabric_seconds()},
        }  # fmt: skip

    def text(self) -> str:
        """As --json asks for it."""
        return json_.dumps(self.document(), indent=1) if self.plan.json else self.table()


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"
