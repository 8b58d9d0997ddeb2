"""What test_zero3.py compares: steps of ZeRO 3 at this world size beside those of other engines."""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.tables.parity import CPU, SMALL, STAGES, V1, V2, losses, matrix, run, trainer
from bench.workload import random_batch
from fastdino import distributed
from fastdino.config import Config, ModelConfig
from fastdino.distributed import Ranks
from fastdino.engine import graphs
from fastdino.engine.zero3 import PartitionedEngine
from fastdino.model.vit import SIZES
from fastdino_kernels import ema_update_
from tests.engine.engine_cases import STEPS, Case, now, resume, train

# Stages 0 to 2 do not know of checkpointing: what they do without it, engine_cases.py has.
MATRIX = [*(("full", stage) for stage in STAGES), ("none", "zero3")]
KINDS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
TIMM = dataclasses.replace(V1, model=ModelConfig(arch="timm:test_vit", drop_path=0.0))
APART = dataclasses.replace(V1, model=dataclasses.replace(V1.model, packed="off"))


class Quiet(Case):
    """In steps 2 and 3 the loss reads the backbone alone, so that no parameter of the head gets a gradient."""

    def loss(self, step: int, micro: int) -> Tensor:
        if step not in (2, 3):
            return super().loss(step, micro)
        return 10 * self.engine.student(self.batch(step, micro)).cls.float().square().mean(dim=(0, 1))[:5].sum()


def quiet(ranks: Ranks, engine: str) -> dict[str, Any]:
    case = Quiet(ranks, engine)
    for step in range(STEPS):
        case.step(step)
    return case.result()


def average(ranks: Ranks, precision: str) -> dict[str, bool]:
    """Whether the teacher in the shard is the average of the masters of all steps, and its parts the rounded one."""
    case = Case(ranks, "zero3", precision=precision)
    shards = [group["shard"] for group in case.engine.optimizer.param_groups]
    wanted = [shard.param.detach().clone() for shard in shards]
    found = {"starts at the student": all(torch.equal(s.ema, e) for s, e in zip(shards, wanted, strict=True))}
    for step in range(STEPS):
        case.step(step)
        for shard, ema in zip(shards, wanted, strict=True):
            ema_update_(ema, shard.param.detach(), now(step).momentum)
    found["fp32"] = all(torch.equal(s.ema, e) for s, e in zip(shards, wanted, strict=True))
    copies = [(s.ema, e.to(case.engine.dtype)) for s, e in zip(shards, wanted, strict=True)]
    if precision == "bf16":
        copies = [(s.ema_lp, e.bfloat16()) for s, e in zip(shards, wanted, strict=True)]
    found["low precision"] = all(torch.equal(a, b) for a, b in copies)
    storages = {ema.untyped_storage().data_ptr() for ema, _ in copies}
    trained = [p for n, p in case.engine.teacher.named_parameters() if n not in case.engine._untrained]
    found["parts are views"] = {p.ds_tensor.untyped_storage().data_ptr() for p in trained} == storages
    return found


class Collectives(TorchDispatchMode):
    """Calls, elements and bytes by kind while it is entered."""

    def __enter__(self) -> "Collectives":
        self.found: dict[str, list[int]] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d":
            whole = max((x for x in tree_leaves(args[:2]) if isinstance(x, Tensor)), key=Tensor.numel)
            total = self.found.setdefault(KINDS[name], [0, 0, 0])
            for i, more in enumerate((1, whole.numel(), whole.numel() * whole.element_size())):
                total[i] += more
        return func(*args, **(kwargs or {}))


def collectives(ranks: Ranks, config: Config) -> dict[str, Any]:
    """Of the fourth step, by which DeepSpeed knows what comes next."""
    made = trainer(ranks, config, "zero3", precision="bf16", checkpointing="full")
    padded = {n: -(-torch.Size(s).numel() // ranks.world_size) * ranks.world_size for n, s in made.shapes.items()}
    trained = sum(padded[name] for group in made.engine.groups for name in group.params)
    for step in range(3):
        made.train_step([random_batch(config, CPU, step)])
    with Collectives() as count:
        made.train_step([random_batch(config, CPU, 3)])
    return {**count.found, "all": sum(padded.values()), "trained": trained}


OTHERWISE = {
    "communication_data_type": "fp32",
    "zero_optimization": {
        "overlap_comm": False, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 10**9,
    },
}  # fmt: skip


def by_json(ranks: Ranks, engine: str, precision: str) -> dict[str, Any]:
    """With a user's DeepSpeed settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(OTHERWISE))
        return run(ranks, V1, engine, checkpointing="full", precision=precision, deepspeed=path)


def compiled(ranks: Ranks) -> list[Tensor]:
    """Losses of eager steps and of compiled ones."""
    found = []
    for compiles in (False, True):
        made = trainer(ranks, V2, "zero3")
        if compiles:
            regions = [*made.engine.student_network.regions(), *made.engine.teacher.regions()]
            kept = made.engine.compilable(regions)
            assert len(kept) == 6, "each block of both networks"
            graphs.compile_regions(kept, "aot_eager")
        found.append(losses(ranks, made))
    return found


def twice(ranks: Ranks) -> str:
    """What is said when a unit runs again before the backward pass."""
    case = Case(ranks, "zero3")
    views = case.batch(0, 0)
    case.engine.student(views)
    try:
        case.engine.student(views)
    except AssertionError as error:
        return str(error)
    return ""


def units(ranks: Ranks) -> dict[str, int]:
    found = {}
    for name, config in {"packed": V1, "apart": APART, "timm": TIMM}.items():
        engine = trainer(ranks, config, "zero3").engine
        assert isinstance(engine, PartitionedEngine)
        for parts in (engine._zero.parameter_offload, engine._teacher_parts):
            assert parts._DeepSpeedZeRoOffload__allgather_stream is None, "the name by which a GPU's stream is known"
            assert parts.persistent_parameters == []
        found[name] = len(engine._units)
    return found


def run_cases(ranks: Ranks, others: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def case(name: str, work: Callable[..., Any], *args: Any, **settings: Any) -> None:
        found[name] = work(ranks, *args, **settings)

    case("matrix", matrix, MATRIX)
    case("v1/torch", run, V1, "torch")
    case("v2/torch", run, V2, "torch")
    case("v2 selective/zero3", run, V2, "zero3", checkpointing="selective")
    for engine in ("torch", "zero3"):
        case(f"v2 accumulate/{engine}", run, V2, engine, accumulate=2)
        case(f"apart/{engine}", run, APART, engine)
        case(f"timm/{engine}", run, TIMM, engine)
    for stage in range(4):
        case(f"json bf16/zero{stage}", by_json, f"zero{stage}", "bf16")
    case("json/zero3", by_json, "zero3", "fp32")
    case("collectives", collectives, V1)
    with mock.patch.dict(SIZES, nano=SMALL):
        for engine in ("torch", "zero3"):
            case(f"quiet/{engine}", quiet, engine)
        for precision in ("fp32", "bf16"):
            case(f"average {precision}", average, precision)
            case(f"five {precision}", train, "zero3", midway=True, precision=precision)
            case(f"resume {precision}", resume, "zero3", found[f"five {precision}"]["three"], precision=precision)
            if others is not None:
                case(f"reshard {precision}", resume, "zero3", others[f"five {precision}"]["three"], precision=precision)
        if ranks.world_size > 1:
            case("compiled", compiled)
        case("units", units)
        case("twice", twice)
    return found


def main(out: Path, others: Path | None) -> None:
    """Writes the results to ``out``; ``others`` are those of another world size, to go on from."""
    before = os.environ.get("LOCAL_RANK")
    with distributed.init("cpu") as ranks:
        Case(ranks, "zero3").step(0)
        ranks.release()
        found = run_cases(ranks, torch.load(others) if others else None)
        if ranks.is_main:
            torch.save(found, out)
    assert os.environ.get("LOCAL_RANK") == before
    assert sys.modules["deepspeed"].runtime.zero.parameter_offload.FWD_MODULE_STACK == [], "no network is kept"
