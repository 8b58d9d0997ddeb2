"""What test_footprint.py compares: bytes that engines keep, and collectives of their steps, at this world size."""

import dataclasses
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.workload import random_batch
from fastdino import distributed
from fastdino.config import Config
from fastdino.distributed import Ranks
from tests.engine.zero3_cases import CPU, V1, V2, Collectives, trainer

ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
ALONE = ("zero0", "zero1", "zero2")  # which one process lets send, too
# Large beside what a step keeps of its own; parameters of odd sizes, and trained norms.
LARGE = dataclasses.replace(V1, head=dataclasses.replace(V1.head, num_prototypes=4097))
ODD = dataclasses.replace(V2, head=dataclasses.replace(V2.head, num_prototypes=4099, freeze_prototype_norm=False))
KEPT = {"v1 fp32": LARGE, "v1 bf16": LARGE, "v2 bf16": ODD}
BUCKET = 100_000  # elements, of the cases with engine.deepspeed


def tensor_bytes() -> int:
    """Of everything that is alive."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, nn.Parameter) and x.device == CPU:
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def resident(ranks: Ranks, config: Config, engine: str, precision: str) -> dict[str, int]:
    """Bytes that stay after a step: all, and those of masters and moments."""
    before = tensor_bytes()
    made = trainer(ranks, config, engine, precision=precision)
    made.train_step([random_batch(config, CPU, 0)])
    made.engine.wait_teacher()
    total, optimizer = tensor_bytes() - before, made.engine.optimizer
    shards = [group["shard"].param for group in optimizer.param_groups]
    moments = [optimizer.state[shard][name] for shard in shards for name in optimizer.moments]
    masters = sum(map(_size, shards)) + sum(map(_size, made.engine._untrained.values()))
    return {"total": total, "masters": masters, "moments": sum(map(_size, moments))}


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def sent(ranks: Ranks, config: Config, engine: str, **settings: Any) -> dict[str, list[int]]:
    """Of a later step; at stage 3 of the fourth, by which DeepSpeed knows what comes next."""
    made = trainer(ranks, config, engine, **settings)
    micro = range(settings.get("accumulate", config.engine.accumulate))
    for step in range(3 if engine == "zero3" else 1):
        made.train_step([random_batch(config, CPU, 10 * step + i) for i in micro])
    with Collectives() as count:
        made.train_step([random_batch(config, CPU, 30 + i) for i in micro])
        made.engine.wait_teacher()
    return count.found


def run_cases(ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
        for engine in ENGINES:
            for name, config in KEPT.items():
                found[f"kept {name}/{engine}"] = resident(ranks, config, engine, name.split()[1])
            if ranks.world_size > 1 or engine in ALONE:
                found[f"sent v1/{engine}"] = sent(ranks, V1, engine, precision="bf16")
            if ranks.world_size > 1:
                found[f"sent v2/{engine}"] = sent(ranks, V2, engine, precision="bf16")
                found[f"sent twice/{engine}"] = sent(ranks, V2, engine, precision="bf16", accumulate=2)
            if ranks.world_size > 1 and engine != "torch":
                found[f"sent small/{engine}"] = sent(ranks, V1, engine, precision="bf16", deepspeed=path)
    return found


def main(out: Path) -> None:
    with distributed.init("cpu") as ranks:
        results = run_cases(ranks)
        if ranks.is_main:
            torch.save(results, out)
