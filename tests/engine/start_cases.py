"""What test_start.py compares: networks that every engine makes from names and shapes, and the memory of a large one.

``starts`` alone runs in the test's own process, too.
"""

import ctypes
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from fastdino import distributed
from fastdino.config import Config, EngineConfig, HeadConfig, ModelConfig, RunConfig, ViewsConfig
from fastdino.distributed import Ranks
from fastdino.engine import build_engine
from fastdino.engine.engine import Engine
from fastdino.model import build_network, outline, start_of, vit
from tests.engine.engine_cases import ENGINES, whole
from tests.engine.zero3_cases import V2

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = vit.Shape(1024, 10, 16, 4096)  # as wide as ViT-L


def build(ranks: Ranks, config: Config, engine: str, precision: str, values: bool = True) -> Engine:
    name, stage = ENGINES[engine]
    settings = EngineConfig(name=name, zero_stage=stage, device="cpu", precision=precision)
    config = dataclasses.replace(config, engine=settings)
    student, teacher = outline(config), outline(config, teacher=True)
    return build_engine(config, student, teacher, ranks, start_of(config, student) if values else None)


def starts(ranks: Ranks, precisions: tuple[str, ...] = ("fp32", "bf16")) -> dict[str, bool]:
    """Whether masters, their average and the weights of both networks are the values of the whole network, to the bit.

    Those do not depend on the ranks, so that one process and two start equal.
    """
    config = dataclasses.replace(V2, run=dataclasses.replace(V2.run, seed=5))
    want = dict(build_network(config).named_parameters())
    found = {}
    for engine in ENGINES:
        for precision in precisions:
            made = build(ranks, config, engine, precision)
            same = [
                torch.equal(tensor, want[f.name].detach().flatten()[f.start : f.stop])
                for f in made.fragments()
                for kind, tensor in f.tensors.items()
                if kind in ("param", "ema")
            ]
            for network in (made.student_network, made.teacher):
                weights = whole(network)
                assert weights.keys() == want.keys()
                same += [torch.equal(weight, want[name].to(made.dtype)) for name, weight in weights.items()]
            found[f"{engine} {precision}"] = all(same)
    return found


def nothing(ranks: Ranks) -> dict[str, bool]:
    """Whether without values, as when a run is resumed, there are none until they are loaded."""
    return {
        engine: all(
            f.tensors[kind].isnan().all() for f in build(ranks, V2, engine, "bf16", False).fragments()
            for kind in ("param", "ema")
        )
        for engine in ENGINES
    }  # fmt: skip


def memory(ranks: Ranks) -> dict[str, int]:
    """Bytes by which the most that this process ever had grows while an engine is made, and what of it stays."""
    vit.SIZES["base"] = LARGE
    config = Config(
        model=ModelConfig(arch="vit_base", drop_path=0.0),
        head=HeadConfig(num_prototypes=4096, hidden_dim=512),
        views=ViewsConfig(global_size=64, local_size=32),
        run=RunConfig(local_batch=1),
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    started = time.perf_counter()
    made = build(ranks, config, "zero3", "bf16")
    shapes = [p.ds_shape.numel() for p in made.student_network.parameters()]  # type: ignore[attr-defined]
    shards = [group["shard"] for group in made.optimizer.param_groups]
    held = [x for s in shards for x in (s.param, s.ema, s.param_lp, s.ema_lp, *made.optimizer.state[s.param].values())]
    held.append(made._zero.grad_partitions_flat_buffer)  # type: ignore[attr-defined]
    return {
        "peak": status("VmHWM") - before,
        "share": sum({x.data_ptr(): x.nbytes for x in held}.values()),
        "largest": 4 * max(shapes),
        "params": sum(shapes),
        "seconds": time.perf_counter() - started,
    }


def status(name: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def main(out: Path) -> None:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed is given back, and does not count as resident
    with distributed.init("cpu") as ranks:
        results: dict[str, Any] = {"starts": starts(ranks), "nothing": nothing(ranks), "memory": memory(ranks)}
        everyone = ranks.gather(results)
        if ranks.is_main:
            torch.save(everyone, out)
