"""What bench.step compares: our engines and the public peer, with the same weights, judged by their first losses."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.counters import KeptBytes, OpCounts, launches, peak_bytes
from bench.kernels.case import OURS
from bench.peers.trainer import Peer
from bench.timing import Work
from bench.workload import build_trainer, flatten_positions
from fastdino.config import Config
from fastdino.data import Batch
from fastdino.distributed import Ranks
from fastdino.model import build_network
from fastdino.model.packing import is_packed
from fastdino.training.trainer import Trainer

PACKED, PER_SIZE = "fastdino, packed", "fastdino, a pass per size"
WAYS: dict[str, dict[str, dict[str, Any]]] = {  # settings of ours by group
    OURS: {},
    "fastdino, ZeRO 1": {"engine": {"zero_stage": 1}},
    "fastdino, ZeRO 2": {"engine": {"zero_stage": 2}},
    "fastdino, torch engine": {"engine": {"name": "torch"}},
    "fastdino, eager": {"engine": {"compile": "off"}},
    "fastdino, compiled": {"engine": {"compile": "on"}},
    "fastdino, kernel by kernel": {"engine": {"cuda_graphs": "off"}},
    "fastdino, attention by varlen": {"model": {"attention": "varlen"}},
    "fastdino, attention by SDPA": {"model": {"attention": "sdpa"}},
    PACKED: {"model": {"packed": "on"}},
    PER_SIZE: {"model": {"packed": "off"}},
}
# What engine.compile=auto comes to; what does not run; what is for many GPUs, where each contender is compiled twice.
NOT_USUAL = {
    "cuda": {"fastdino, compiled", "fastdino, ZeRO 1", "fastdino, ZeRO 2", "fastdino, torch engine"},
    "cpu": {
        "fastdino, eager",
        "fastdino, kernel by kernel",
        "fastdino, attention by varlen",
        "fastdino, attention by SDPA",
    },
}
PEERS = {"lightly + timm": False, "lightly + timm, torch.compile": True}  # compiled or not
CONTENDERS = [*WAYS, *PEERS][1:]
CHECKED_STEPS = 3
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # of the loss, relative


@dataclass
class Contender:
    """Something that trains: ``step`` is one update on a batch."""

    step: Callable[[Batch], Tensor]
    kept: KeptBytes
    """What stays allocated between steps: weights, moments, buffers; it is active until :func:`check` has trained a
    few, since the peers' moments and some of our buffers are made in the first one."""
    captured: bool = False
    """Its steps are replayed, whose memory no allocator sees."""
    fallback: str = ""
    """Why it runs eagerly though it should be compiled, once :func:`check` has seen that."""

    def work(self, batches: Sequence[Batch]) -> Work:
        """A step in each round, on the batches by turns."""
        return Work(lambda index: self.step(batches[index % len(batches)]))


def usual(device: torch.device) -> list[str]:
    """Those beside ours that run on the device, without a second one of the same settings."""
    without = NOT_USUAL[device.type] | {PACKED if is_packed("auto", device) else PER_SIZE}
    return [name for name in CONTENDERS if name not in without]


def build(config: Config, ranks: Ranks, folder: Path, names: Sequence[str]) -> dict[str, Contender]:
    """These contenders, all with the same weights. Raises OutOfMemoryError where they do not fit together.

    None has drop path: each would draw other drops, and what is compiled for a comparison of losses would not be what
    is timed.
    """
    config = replace(config, model=replace(config.model, drop_path=0.0))
    _warm_up(ranks.device)
    weights = _start(config)
    return {name: _contender(name, config, ranks, folder / name, weights) for name in names}


def _contender(name: str, config: Config, ranks: Ranks, folder: Path, weights: dict[str, Tensor]) -> Contender:
    if name in PEERS:
        with (kept := KeptBytes(ranks.device, watch=seen(name, ranks.device))):
            peer = Peer(config, weights, ranks.device, PEERS[name])
        return Contender(peer.train_step, kept)
    groups: dict[str, Any] = {group: replace(getattr(config, group), **of) for group, of in WAYS[name].items()}
    settings = replace(config, **groups)
    with (kept := KeptBytes(ranks.device, watch=seen(name, ranks.device))):
        trainer = build_trainer(settings, ranks, folder)
        _load(trainer, weights)
    return Contender(partial(_train_step, trainer), kept, trainer.captures)


def seen(name: str, device: torch.device) -> bool:
    """Whether it can be counted: on a CPU the counters are modes, under which torch.compile does not work."""
    return device.type == "cuda" or "compile" not in name


def _train_step(trainer: Trainer, batch: Batch) -> Tensor:
    return trainer.train_step([batch])["loss"]


def _warm_up(device: torch.device) -> None:
    """Makes what torch allocates once for all, such as cuBLAS's workspaces: the first contender would have it alone."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    nn.functional.linear(x, x, x[0]).sum().backward()


def _start(config: Config) -> dict[str, Tensor]:
    """Weights that all contenders start from, with one position embedding for all patches."""
    weights = {name: p.detach() for name, p in build_network(config).named_parameters()}
    flatten_positions(weights)
    return weights


def _load(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    for fragment in trainer.engine.fragments():
        for key in ("param", "ema"):
            fragment.tensors[key].copy_(weights[fragment.name].view(-1)[fragment.start : fragment.stop])
    trainer.engine.after_load()


Losses = dict[str, list[float]]


def check(contenders: dict[str, Contender], batches: list[Batch], precision: str, ours: Losses | None = None) -> Losses:
    """Losses of the first steps, of ``contenders`` and before them those in ``ours``.

    Raises AssertionError when a contender's are not ours, OutOfMemoryError when a step does not fit.
    """
    losses = dict(ours or {})
    for name, contender in contenders.items():
        started = time.monotonic()
        losses[name] = _first_losses(contender, batches)
        print(f"{name}: {CHECKED_STEPS} steps in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        for step, (got, want) in enumerate(zip(losses[name], losses[OURS], strict=True)):
            assert abs(got - want) <= TOLERANCE[precision] * abs(want), (
                f"no figure: step {step} of {name} has loss {got}, ours {want}"
            )
    return losses


def _first_losses(contender: Contender, batches: list[Batch]) -> list[float]:
    with contender.kept, _fallbacks() as said:
        losses = [float(contender.step(batches[step % len(batches)])) for step in range(CHECKED_STEPS)]
    contender.fallback = "; ".join(said)
    return losses


@contextmanager
def _fallbacks() -> Iterator[list[str]]:
    """What the engine warns of while active: code that it cannot compile, a graph that it cannot capture."""
    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    heard, logger = Heard(logging.WARNING), logging.getLogger("fastdino.engine")
    logger.addHandler(heard)
    try:
        yield said
    finally:
        logger.removeHandler(heard)


NOT_COUNTED = dict.fromkeys(("state_bytes", "peak_bytes", "host_syncs", "launches"))


def counted(contender: Contender, name: str, batch: Batch) -> dict[str, int | None]:
    """Memory between steps and at most, host syncs and launches of a step; None for what cannot be counted here."""
    device = batch.views["global"].device
    if not seen(name, device):
        return dict(NOT_COUNTED)

    def step() -> Tensor:
        return contender.step(batch)

    with OpCounts() as counts:
        step()
    return {
        "state_bytes": contender.kept.bytes,
        "peak_bytes": None if contender.captured else contender.kept.bytes + peak_bytes(step, device),
        "host_syncs": counts.syncs.total(), "launches": launches(step, device),
    }  # fmt: skip
