"""The whole training step beside a careful public peer, in the same run: same weights, views, precision.

Correct first: before anything is timed, ours and the peers' losses over three steps must agree. A contender that does
not fit into the device's memory beside the others is left out by name.
``python -m bench.step`` writes bench/results/step-DEVICE.json.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.counters import KeptBytes, OpCounts, launches, peak_bytes
from bench.peers.trainer import Peer
from bench.record import add, may_add, provenance, result_path, write
from bench.timing import Clock, Work, interleave, paired_ratio
from bench.workload import build_trainer, flatten_positions, random_batch, step_config
from fastdino import distributed
from fastdino.config import Config
from fastdino.data import Batch
from fastdino.distributed import Ranks
from fastdino.model import build_network
from fastdino.training.flops import matmul_flops, step_flops
from fastdino.training.trainer import Trainer

OURS = "fastdino"
ENGINES: dict[str, tuple[str, int | str]] = {
    OURS: ("deepspeed", "auto"),
    "fastdino, ZeRO 1": ("deepspeed", 1),
    "fastdino, ZeRO 2": ("deepspeed", 2),
    "fastdino, torch engine": ("torch", "auto"),
}
PEERS = {"lightly + timm": False, "lightly + timm, torch.compile": True}  # compiled or not
CONTENDERS = [*ENGINES, *PEERS][1:]
ARCHS = {"cuda": ["vit_small", "vit_base"], "cpu": ["vit_tiny"]}
ROUNDS = {"cuda": 60, "cpu": 15}
NUM_BATCHES = 4
CHECKED_STEPS = 3
Made = TypeVar("Made")
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # of the loss, relative


@dataclass
class Contender:
    """Something that trains: ``step`` is one update on a batch, ``networks`` what eval() and train() switch."""

    step: Callable[[Batch], Tensor]
    networks: list[nn.Module]
    kept: KeptBytes
    """What stays allocated between steps: weights, moments, buffers; it is active until :func:`check` has trained a
    few, since the peers' moments and some of our buffers are made in the first one."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arch", nargs="+", help="default: ViT-S and -B on a GPU; is added to a file of the same code")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, help="beside fastdino; default: all of them")
    parser.add_argument("--batch", type=int, help="images of a step")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, help="default: bench/results/step-DEVICE.json, if nothing is changed")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    path, where = result_path("step", device), provenance(device, "bench.step")
    changed = options.rounds or options.contender is not None or options.batch or options.out
    part = bool(options.arch) and not changed and may_add(path, where)
    with distributed.init("cuda" if device.type == "cuda" else "cpu") as ranks:
        rounds = options.rounds or ROUNDS[device.type]
        archs = options.arch or ARCHS[device.type]
        others = CONTENDERS if options.contender is None else options.contender
        cases = [measure(arch, ranks, rounds, others, options.batch) for arch in archs]
    document = {"provenance": where, "cases": cases}
    if part:
        add(path, document, lambda case: case["arch"])
    elif options.out or not (options.arch or changed):
        write(options.out or path, document)
    for case in cases:
        print(table(case))
    return 0


def measure(arch: str, ranks: Ranks, rounds: int, others: Sequence[str], batch: int | None = None) -> dict[str, Any]:
    """All figures of one architecture. Raises AssertionError, and times nothing, when the losses disagree."""
    config = step_config(arch, ranks.device, batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        contenders = build(config, ranks, Path(folder), others)
        batches = [random_batch(config, ranks.device, seed) for seed in range(NUM_BATCHES)]
        losses = check(contenders, batches, config)
        works = {
            name: Work(lambda index, c=contender: c.step(batches[index % NUM_BATCHES]))  # type: ignore[misc]
            for name, contender in contenders.items()
        }
        clock = Clock(ranks.device)
        seconds, _ = interleave(works, rounds, clock, hide_launches=False)
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        peak_flops = matmul_flops(ranks.device, dtype, clock)
        figures = {}
        for name, contender in contenders.items():
            figures[name] = _figures(contender, name, config, seconds, batches[0], peak_flops)
    return {
        "arch": arch, "views": f"2 x {config.views.global_size} + {config.views.num_local} x {config.views.local_size}",
        "batch": config.run.local_batch, "prototypes": config.head.num_prototypes,
        "precision": config.engine.precision, "rounds": rounds, "step_flops": step_flops(config),
        "matmul_flops_per_s": peak_flops, "losses": losses, "contenders": figures,
    }  # fmt: skip


def _figures(
    contender: Contender, name: str, config: Config, seconds: dict[str, list[float]], batch: Batch, peak_flops: float
) -> dict[str, Any]:
    device = batch.views["global"].device
    median = statistics.median(seconds[name])
    with OpCounts() as counts:
        contender.step(batch)
    seen = device.type == "cuda" or "compile" not in name  # on a CPU the counters see aten calls, not compiled code
    return {
        "milliseconds": 1e3 * median,
        "images_per_second": config.run.local_batch / median,
        "times_ours": asdict(paired_ratio(seconds[name], seconds[OURS])),
        "mfu": step_flops(config) / median / peak_flops,
        "state_bytes": contender.kept.bytes if seen else None,
        "peak_bytes": contender.kept.bytes + peak_bytes(lambda: contender.step(batch), device) if seen else None,
        "host_syncs": counts.syncs.total() if seen else None,
        "launches": launches(lambda: contender.step(batch), device) if seen else None,
    }


def build(config: Config, ranks: Ranks, folder: Path, others: Sequence[str]) -> dict[str, Contender]:
    """Ours and those of ``others`` that fit, all with the same weights."""
    _warm_up(ranks.device)
    weights = _start(config)
    made = {
        name: _if_it_fits(name, lambda n=name: _contender(n, config, ranks, folder / n, weights))  # type: ignore[misc]
        for name in (OURS, *others)
    }
    return {name: contender for name, contender in made.items() if contender is not None}


def _if_it_fits(name: str, work: Callable[[], Made]) -> Made | None:
    """What ``work`` returns; None, with a line, where the device's memory is too small for a contender of ours."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        if name == OURS:
            raise
        why = str(error).splitlines()[0]
    if torch.cuda.is_available():  # here, because the error held the tensors
        torch.cuda.empty_cache()
    print(f"{name} is left out: {why}")
    return None


def _contender(name: str, config: Config, ranks: Ranks, folder: Path, weights: dict[str, Tensor]) -> Contender:
    if name in PEERS:
        compiled = PEERS[name]
        with (kept := KeptBytes(ranks.device, watch=ranks.device.type == "cuda" or not compiled)):
            peer = Peer(config, weights, ranks.device, compiled)
        return Contender(peer.train_step, [peer.student, peer.teacher], kept)
    engine, stage = ENGINES[name]
    settings = replace(config, engine=replace(config.engine, name=engine, zero_stage=stage))  # type: ignore[arg-type]
    with (kept := KeptBytes(ranks.device)):
        trainer = build_trainer(settings, ranks, folder)
        _load(trainer, weights)
    return Contender(partial(_train_step, trainer), [trainer.engine.student, trainer.engine.teacher], kept)


def _train_step(trainer: Trainer, batch: Batch) -> Tensor:
    return trainer.train_step([batch])["loss"]


def _warm_up(device: torch.device) -> None:
    """Makes what torch allocates once for all, such as cuBLAS's workspaces: the first contender would have it alone."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    nn.functional.linear(x, x, x[0]).sum().backward()


def _start(config: Config) -> dict[str, Tensor]:
    """Weights that all contenders start from, with one position embedding for all patches."""
    torch.manual_seed(config.run.seed)
    weights = {name: p.detach() for name, p in build_network(config).named_parameters()}
    flatten_positions(weights)
    return weights


def _load(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    for fragment in trainer.engine.fragments():
        for key in ("param", "ema"):
            fragment.tensors[key].copy_(weights[fragment.name].view(-1)[fragment.start : fragment.stop])
    trainer.engine.after_load()


def check(contenders: dict[str, Contender], batches: list[Batch], config: Config) -> dict[str, list[float]]:
    """Losses of the first steps without drop path; raises AssertionError when a peer's are not ours.

    A contender that does not fit leaves ``contenders``.
    """
    losses: dict[str, list[float]] = {}
    for name, contender in list(contenders.items()):
        found = _if_it_fits(name, partial(_first_losses, contender, batches))
        if found is None:
            del contenders[name]
            continue
        losses[name] = found
        for step, (got, want) in enumerate(zip(found, losses[OURS], strict=True)):
            assert abs(got - want) <= TOLERANCE[config.engine.precision] * abs(want), (
                f"no figure: step {step} of {name} has loss {got}, ours {want}"
            )
    return losses


def _first_losses(contender: Contender, batches: list[Batch]) -> list[float]:
    for network in contender.networks:
        network.eval()
    with contender.kept:
        losses = [float(contender.step(batches[step % NUM_BATCHES])) for step in range(CHECKED_STEPS)]
    for network in contender.networks:
        network.train()
    return losses


def table(case: dict[str, Any]) -> str:
    """The case in a few lines."""
    lines = [f"{case['arch']}, {case['views']} px, batch {case['batch']}, {case['precision']}"]
    for name, f in case["contenders"].items():
        ratio = f["times_ours"]
        peak = f"{f['peak_bytes'] / 1e6:8.1f} MB" if f["peak_bytes"] is not None else "          -"
        lines.append(
            f"  {name:30} {f['milliseconds']:9.2f} ms {f['images_per_second']:9.1f} images/s"
            f"  MFU {100 * f['mfu']:5.1f} %  {peak}  syncs {f['host_syncs']}  launches {f['launches']}"
            f"  x {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
