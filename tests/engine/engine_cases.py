"""What test_engine.py compares: runs every case at this world size and writes the results to a file."""

import dataclasses
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.tables.parity import SMALL, whole
from fastdino import distributed
from fastdino.config import Config, EngineConfig, HeadConfig, ModelConfig, OptimConfig, RunConfig, ViewsConfig
from fastdino.engine import build_engine
from fastdino.engine.engine import Engine
from fastdino.engine.schedules import Now
from fastdino.model import Network, Outputs, build_network
from fastdino.model.vit import SIZES

GLOBAL_BATCH, STEPS = 8, 5
ENGINES = {"torch": ("torch", 1), **{f"zero{stage}": ("deepspeed", stage) for stage in range(4)}}
AUTO = {"auto": ("deepspeed", "auto")}
SOURCES = {  # whose state each goes on from
    "torch": "zero3", "zero0": "zero2", "zero1": "zero3", "zero2": "torch", "zero3": "zero1",
}  # fmt: skip
BASE = Config(
    model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0),
    head=HeadConfig(num_prototypes=61, num_layers=2, hidden_dim=19, bottleneck_dim=11),  # odd, so that slices straddle
    views=ViewsConfig(global_size=16, local_size=8, num_local=2),
    optim=OptimConfig(clip=0.3),  # low enough to clip some tensors and not others
    run=RunConfig(local_batch=GLOBAL_BATCH),
)
V2 = OptimConfig(
    clip=0.3, clip_mode="module", layer_decay=0.7, patch_embed_lr=0.2, beta2=0.95, freeze_how="lr"
)  # fmt: skip
SYNCS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2"}


class SyncCount(TorchDispatchMode):
    """Names what makes this thread wait for the device, while it is entered; that of a checkpoint may."""

    def __enter__(self) -> "SyncCount":
        self.found: list[str] = []
        self.thread = threading.get_ident()
        self.patches = [
            mock.patch.object(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))
            for name in ("tolist", "numpy", "cpu")  # these do not pass the dispatcher
        ]
        if "deepspeed" in sys.modules:
            accelerator = sys.modules["deepspeed.accelerator"].get_accelerator()
            waits = self.noting("synchronize", accelerator.synchronize)
            self.patches.append(mock.patch.object(accelerator, "synchronize", waits))
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            cpu_only = sys._getframe(1).f_globals["__name__"].startswith("fastdino_kernels.")  # references
            if threading.get_ident() == self.thread and not cpu_only:
                self.found.append(name)
            return function(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[-1] in SYNCS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def now(step: int) -> Now:
    """Everything changes every step; the last layer is frozen in the first two."""
    return Now(lr=1e-3 * (step + 1), weight_decay=0.1 + 0.05 * step, momentum=0.9 + 0.01 * step, teacher_temp=0.07,
               freeze_last_layer=step < 2)  # fmt: skip


def logits(made: Outputs) -> Tensor:
    return F.linear(made.cls_points, made.prototypes).float()


def seeded(config: Config, seed: int, teacher: bool = False) -> Network:
    return build_network(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed)), teacher)


class Case:
    """An engine on the toy task, fed with this rank's share of the same global batches."""

    def __init__(self, ranks: distributed.Ranks, engine: str, **changes: Any) -> None:
        name, stage = (ENGINES | AUTO)[engine]
        self.accumulate = changes.pop("accumulate", 1)
        settings = EngineConfig(
            name=name, zero_stage=stage, device="cpu", precision=changes.pop("precision", "fp32"),
            accumulate=self.accumulate,
        )  # fmt: skip
        self.config = dataclasses.replace(BASE, engine=settings, **changes)
        self.ranks = ranks
        # The engine has to make all ranks, and both networks, start from rank 0's student.
        student, teacher = seeded(self.config, 2 + ranks.rank), seeded(self.config, 1, teacher=True)
        self.shapes = {name: p.shape for name, p in student.named_parameters()}
        self.engine: Engine = build_engine(self.config, student, teacher, ranks)
        self.losses: list[Tensor] = []

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """Global and local views of the images of one micro batch on this rank."""
        generator = torch.Generator().manual_seed(step)
        size = GLOBAL_BATCH // self.ranks.world_size // self.accumulate
        first = (self.ranks.rank * self.accumulate + micro) * size
        images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
        noise = torch.randn(2, GLOBAL_BATCH, 3, 16, 16, generator=generator)
        views = (images + 0.5 * noise)[:, first : first + size]
        return {"global": views, "local": views[..., 4:12, 4:12]}

    def loss(self, step: int, micro: int) -> Tensor:
        """DINO's loss with a center of zero, in plain torch."""
        views = self.batch(step, micro)
        with torch.no_grad():
            seen = self.engine.teacher({"global": views["global"]})
            targets = torch.softmax(logits(seen) / now(step).teacher_temp, dim=-1)
        log_q = F.log_softmax(logits(self.engine.student(views)) / 0.1, dim=-1)
        pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
        return -torch.stack([(targets[t] * log_q[s]).sum(-1).mean() for t, s in pairs]).mean()

    def step(self, step: int, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
        total = torch.zeros(())
        for micro in range(self.accumulate):
            loss = self.loss(step, micro)
            self.engine.backward(spoil(loss))
            total += loss.detach() / self.accumulate
        self.engine.step(now(step), total)
        mean = total.clone()
        self.ranks.mean_(mean)
        self.losses.append(mean)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors by kind and name, from the fragments that a checkpoint would hold; on every rank."""
        mine = []
        if self.engine.saves:
            for f in self.engine.fragments():
                assert not any(v.requires_grad for v in f.tensors.values())
                mine.append((f.name, f.start, f.stop, {k: v.numpy().copy() for k, v in f.tensors.items()}))
        everyone = self.gather(mine)
        whole: dict[str, dict[str, Tensor]] = {}
        seen = {name: torch.zeros(shape.numel(), dtype=torch.int) for name, shape in self.shapes.items()}
        for name, start, stop, tensors in (fragment for fragments in everyone for fragment in fragments):
            seen[name][start:stop] += 1
            for kind, values in tensors.items():
                assert values.dtype == np.float32
                assert values.shape == (stop - start,)
                full = whole.setdefault(kind, {}).setdefault(name, torch.zeros(self.shapes[name].numel()))
                full[start:stop] = torch.from_numpy(values)
        assert all((count == 1).all() for count in seen.values()), "fragments must cover every element once"
        return whole

    def load(self, state: dict[str, dict[str, Tensor]], counters: dict[str, Tensor]) -> None:
        for f in self.engine.fragments():
            for kind, view in f.tensors.items():
                view.copy_(state[kind][f.name][f.start : f.stop])
        for name, live in self.engine.counters().items():
            live.copy_(counters[name])
        self.engine.after_load()

    def networks(self) -> dict[str, dict[str, Tensor]]:
        """The weights that student and teacher compute with."""
        self.engine.wait_teacher()
        networks = {"student": self.engine.student_network, "teacher": self.engine.teacher}
        weights = {role: whole(network) for role, network in networks.items()}
        digests = [(role, n, zlib.crc32(w.float().numpy())) for role, ws in weights.items() for n, w in ws.items()]
        for other in self.gather(digests):
            assert other == digests, "ranks differ"
        return weights

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order. Arrays of numpy pickle faster than tensors."""
        everyone: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def counters(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.engine.counters().items()}

    def result(self) -> dict[str, Any]:
        return {
            "losses": torch.stack(self.losses) if self.losses else None,
            "grad_norm": self.engine.grad_norm.clone(),
            "counters": self.counters(),
            "state": self.state(),
            "networks": self.networks(),
        }


def train(ranks: distributed.Ranks, engine: str, midway: bool = False, **changes: Any) -> dict[str, Any]:
    """Five steps, with what made the host wait in the third, and ``midway`` the result of the first three."""
    case, found = Case(ranks, engine, **changes), dict[str, Any]()
    for step in range(STEPS):
        with SyncCount() if step == 2 else nullcontext() as count:
            case.step(step)
        if count is not None:
            found = {"syncs": count.found, **({"three": case.result()} if midway else {})}
    return case.result() | found


def skip(ranks: distributed.Ranks, engine: str, what: str) -> dict[str, Any]:
    """Good steps 0, 2 and 4; between, one that is spoilt on the last rank alone: its gradient, or only its flag."""
    case = Case(ranks, engine)
    spoilt_here = ranks.rank == ranks.world_size - 1
    for step in (0, 2):  # frozen and not
        case.step(step)
    before = (case.state(), case.networks(), case.counters())
    loss = case.loss(3, 0)
    case.engine.backward(loss * torch.nan if spoilt_here and what == "gradient" else loss)
    case.engine.step(now(3), torch.tensor(torch.nan if spoilt_here and what != "gradient" else 0.0))
    after = (case.state(), case.networks(), case.counters())
    case.step(4)
    return {"before": before, "after": after, **case.result()}


def resume(ranks: distributed.Ranks, engine: str, source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Steps 3 and 4 from the state and counters of another engine."""
    case = Case(ranks, engine, **changes)
    untrained = "head.last_layer.g"
    doubled = {kind: {**tensors} for kind, tensors in source["state"].items()}
    for kind in ("param", "ema"):
        doubled[kind][untrained] = 2 * doubled[kind][untrained]
    case.load(doubled, source["counters"])
    assert all((weights[untrained] == 2).all() for weights in case.networks().values())
    case.load(source["state"], source["counters"])
    loaded = case.networks()
    for step in range(3, STEPS):
        case.step(step)
    return {"loaded": loaded, **case.result()}


def main(out: Path, others: Path | None) -> None:
    """Writes the results to ``out``; ``others`` are those of a run with another world size, to go on from."""
    with mock.patch.dict(SIZES, nano=SMALL):
        with distributed.init("cpu") as ranks:
            Case(ranks, "zero3").step(0)
        with distributed.init("cpu") as ranks:  # a second run within one process
            results = run_cases(ranks, others)
            if ranks.is_main:
                torch.save(results, out)


def run_cases(ranks: distributed.Ranks, others: Path | None) -> dict[str, Any]:
    """Results of every case by its name."""
    results: dict[str, Any] = {"auto": type(Case(ranks, "auto").engine).__name__}
    trained_norm = {"head": dataclasses.replace(BASE.head, freeze_prototype_norm=False)}
    for engine in ENGINES:
        results[f"fp32/{engine}"] = train(ranks, engine, midway=True)
        results[f"accumulate/{engine}"] = train(ranks, engine, accumulate=2)
        results[f"bf16 accumulate/{engine}"] = train(ranks, engine, accumulate=2, precision="bf16")
        results[f"global/{engine}"] = train(ranks, engine, optim=OptimConfig(clip=0.3, clip_mode="global"))
        results[f"v2/{engine}"] = train(ranks, engine, optim=V2)
        results[f"lars/{engine}"] = train(ranks, engine, optim=OptimConfig(name="lars", clip=0.0), **trained_norm)
        results[f"sgd/{engine}"] = train(ranks, engine, optim=OptimConfig(name="sgd", lr=1.0), **trained_norm)
        results[f"skip gradient/{engine}"] = skip(ranks, engine, "gradient")
        results[f"skip flag/{engine}"] = skip(ranks, engine, "flag")
    for engine, source in SOURCES.items():
        results[f"resume/{engine}"] = resume(ranks, engine, results[f"fp32/{source}"]["three"])
        results[f"bf16 resume/{engine}"] = resume(ranks, engine, results[f"fp32/{source}"]["three"], precision="bf16")
        if others is not None:
            results[f"reshard/{engine}"] = resume(ranks, engine, torch.load(others)[f"fp32/{source}"]["three"])
    with SyncCount() as control:
        results["fp32/torch"]["losses"].sum().item()
    results["syncs control"] = control.found
    return results
