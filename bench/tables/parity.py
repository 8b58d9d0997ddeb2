"""Steps of every ZeRO stage beside those of plain torch: the largest differences, by case.

``python -m bench.tables.parity`` records them in bench/results/parity.json, of one process and of two.
tests/engine/test_zero3.py holds most of the cases to their bounds.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.record import RESULTS, ROOT, provenance, write
from bench.workload import nano_config, nano_dinov2, random_batch
from fastdino import distributed
from fastdino.config import Config, OptimConfig
from fastdino.distributed import Ranks
from fastdino.model.vit import SIZES, Shape
from fastdino.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 5
# Drop path by chance, views of two sizes; rates at which five steps are felt.
V1 = dataclasses.replace(nano_config(), optim=OptimConfig(lr=0.03, warmup_epochs=0, clip=0.3, teacher_momentum=0.9))
V2 = nano_dinov2(V1, sinkhorn=True)  # subsets, masks, two heads, registers, LayerScale, rates by depth
# From a LayerScale of 1e-5 all images look alike, and KoLeo magnifies every rounding.
V2 = dataclasses.replace(V2, model=dataclasses.replace(V2.model, layer_scale=0.5))
METHODS, PRECISIONS, CHECKPOINTING = {"v1": V1, "v2": V2}, ("fp32", "bf16"), ("none", "full")
STAGES = ("zero0", "zero1", "zero2", "zero3")
CASES = tuple(itertools.product(CHECKPOINTING, STAGES))
SMALL = Shape(48, 3, 3, 96)  # the first, the last and another block


def trainer(ranks: Ranks, config: Config, engine: str, clip: float = 0.3, **settings: Any) -> Trainer:
    name, stage = ("torch", 0) if engine == "torch" else ("deepspeed", int(engine[-1]))
    changed = dataclasses.replace(config.engine, name=name, zero_stage=stage, **settings)
    optim = dataclasses.replace(config.optim, clip=clip)
    return Trainer(dataclasses.replace(config, engine=changed, optim=optim), ranks)


def losses(ranks: Ranks, made: Trainer) -> Tensor:
    """(STEPS,) means over all ranks."""
    found, accumulate = [], made.config.engine.accumulate
    for step in range(STEPS):
        seeds = [100 * step + accumulate * ranks.rank + i for i in range(accumulate)]
        loss = made.train_step([random_batch(made.config, CPU, seed) for seed in seeds])["loss"].clone()
        ranks.mean_(loss)
        found.append(loss)
    return torch.stack(found)


def whole(network: nn.Module) -> dict[str, Tensor]:
    """Its weights by name, gathered where the ranks hold parts."""
    params = dict(network.named_parameters())
    cut = any(hasattr(param, "ds_tensor") for param in params.values())
    gathered = import_module("deepspeed").zero.GatheredParameters if cut else nullcontext
    with gathered(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def run(ranks: Ranks, config: Config, engine: str, **settings: Any) -> dict[str, Any]:
    """Losses, norm of the last gradient, and the weights that student and teacher compute with in the end."""
    made = trainer(ranks, config, engine, **settings)
    found = losses(ranks, made)
    made.engine.wait_teacher()
    networks = {"student": made.engine.student_network, "teacher": made.engine.teacher}
    norm = made.engine.grad_norm.clone()
    return {"losses": found, "grad_norm": norm, **{role: whole(network) for role, network in networks.items()}}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest over all weights but the biases of attention's keys. A softmax does not feel those, so that their
    gradient is rounding and nothing else, which Adam makes as large as any other."""
    assert a.keys() == b.keys()
    parts = [(x.chunk(3)[::2], b[name].chunk(3)[::2]) if name.endswith("qkv.bias") else ([x], [b[name]])
             for name, x in a.items()]  # fmt: skip
    return max(float((x.float() - y.float()).abs().max()) for xs, ys in parts for x, y in zip(xs, ys, strict=True))


def differences(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Of two runs; that of the norm is relative."""
    return {
        "loss": float((got["losses"] - want["losses"]).abs().max()),
        "grad_norm": float((got["grad_norm"] / want["grad_norm"] - 1).abs()),
        "student": difference(got["student"], want["student"]),
        "teacher": difference(got["teacher"], want["teacher"]),
    }


def matrix(ranks: Ranks, cases: Sequence[tuple[str, str]] = CASES) -> dict[str, dict[str, float]]:
    """Differences by "METHOD PRECISION CHECKPOINTING STAGE", from one run that keeps all activations: in fp32 plain
    torch's, in bf16 that of ZeRO 1, both without clipping. "METHOD PRECISION" is how far student and teacher of that
    run came apart."""
    found = {}
    with mock.patch.dict(SIZES, nano=SMALL):
        for (name, config), precision in itertools.product(METHODS.items(), PRECISIONS):
            # Norms are sums over other fragments at each stage, which bf16 feels.
            first, how = ("torch", {}) if precision == "fp32" else ("zero1", {"clip": 0.0})
            want = run(ranks, config, first, precision=precision, **how)
            found[f"{name} {precision}"] = {"moved": difference(want["student"], want["teacher"])}
            for kept, stage in cases:
                got = run(ranks, config, stage, precision=precision, checkpointing=kept, **how)
                found[f"{name} {precision} {kept} {stage}"] = differences(got, want)
                ranks.release()
    return found


def main() -> None:
    if len(sys.argv) > 1:
        with distributed.init("cpu") as ranks:
            found = matrix(ranks)
            if ranks.is_main:
                write(Path(sys.argv[1]), found)
        return
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            out = Path(folder) / f"{size}.json"
            subprocess.run([sys.executable, *launcher, "-m", "bench.tables.parity", str(out)], check=True, cwd=ROOT)
            cases[f"{size} processes" if size > 1 else "1 process"] = json.loads(out.read_text())
    write(RESULTS / "parity.json", {"provenance": provenance(CPU, "bench.tables.parity"), "cases": cases})


if __name__ == "__main__":
    main()
