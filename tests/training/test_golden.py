"""A line that may not move: 20 steps of a nano run, recorded to the bit, for every engine on one process.

``python tests/training/test_golden.py`` records golden.json anew, which only a change of what is computed may do; it
prints by how much the curve moved. Sums are rounded differently by other processors, so there the curve is compared
within a tolerance that a wrong formula or a lost random draw exceeds at once.
"""

import dataclasses
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdino import distributed
from fastdino.config import (
    Config,
    DataConfig,
    EngineConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.training.trainer import Trainer

GOLDEN = Path(__file__).with_name("golden.json")
ENGINES = {
    "torch": EngineConfig(name="torch", device="cpu"),
    **{f"deepspeed {stage}": EngineConfig(name="deepspeed", zero_stage=stage, device="cpu") for stage in (0, 1, 2)},
}
NUM_STEPS = 20
TOLERANCE = 1e-4  # relative; noise of 1e-6 in the weights moves the curve by 6e-6, a seed without the step by 5e-2


def config(folder: Path, engine: EngineConfig) -> Config:
    """Two epochs in which everything moves: drop path, warm-ups, clipping, frozen and then free prototypes."""
    return Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.3, pos_embed="sincos", init="xavier"),
        head=HeadConfig(num_prototypes=64, hidden_dim=48, bottleneck_dim=32, freeze_prototype_norm=False),
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        data=DataConfig(root="shapes", num_images=160, image_size=32, normalize="image", num_workers=0),
        loss=LossConfig(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=2),
        optim=OptimConfig(lr=0.003, warmup_epochs=0.4, clip=0.3, teacher_momentum=0.9, freeze_last_layer=1),
        engine=dataclasses.replace(engine, accumulate=2),
        run=RunConfig(dir=folder / "run", epochs=2, local_batch=8, knn_every=0),
    )


def processor() -> str:
    """What decides how sums are rounded: the machine's kind, which libraries choose their kernels and blocks by."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    kind = " ".join(first.get(name, "?") for name in ("model name", "cpu family", "model", "stepping", "cache size"))
    flags = zlib.crc32(first.get("flags", "").encode())
    return f"{kind}, flags {flags:08x}, torch {torch.__version__.split('+')[0]}"


def curve(engine: EngineConfig) -> list[dict[str, Any]]:
    """Per step: loss, gradient norm, and of student and teacher the norm and a checksum of every bit."""
    with tempfile.TemporaryDirectory() as folder:
        settings = config(Path(folder), engine)
        with distributed.init("cpu") as ranks:
            trainer = Trainer(settings, ranks)
            return [_step(trainer) for _ in range(NUM_STEPS)]


def _step(trainer: Trainer) -> dict[str, Any]:
    figures = trainer.train_step([next(trainer.batches) for _ in range(trainer.config.engine.accumulate)])
    line: dict[str, Any] = {"loss": figures["loss"].item(), "grad_norm": float(trainer.engine.grad_norm)}
    for role, network in (("student", trainer.engine.student_network), ("teacher", trainer.engine.teacher)):
        line[f"{role}_norm"], line[f"{role}_crc32"] = _summary(network)
    return line


def _summary(network: nn.Module) -> tuple[float, int]:
    crc, squares = 0, 0.0
    for _, param in sorted(network.named_parameters()):
        crc = zlib.crc32(param.detach().numpy().tobytes(), crc)
        squares += param.detach().double().square().sum().item()
    return math.sqrt(squares), crc


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> float:
    """Largest relative difference of a number over the curve."""
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_the_curve_has_not_moved(name):
    golden = json.loads(GOLDEN.read_text())
    found, expected = curve(ENGINES[name]), golden["curves"][name]
    if golden["processor"] == processor():
        assert found == expected, "another curve, to the bit, on the processor that recorded it"
    for number in ("loss", "grad_norm", "student_norm", "teacher_norm"):
        assert difference(found, expected, number) < TOLERANCE, number


def main() -> None:
    """Records the curves; says how far they are from those recorded before."""
    torch.set_num_threads(1)  # as tests/conftest.py does
    curves = {name: curve(engine) for name, engine in ENGINES.items()}
    if GOLDEN.exists():
        before = json.loads(GOLDEN.read_text())["curves"]
        for name, found in curves.items():
            numbers = ("loss", "grad_norm", "student_norm", "teacher_norm")
            moved = ", ".join(f"{number} {difference(found, before[name], number):.1e}" for number in numbers)
            print(f"{name}: moved by {moved}, relative" if found != before[name] else f"{name}: equal")
    GOLDEN.write_text(json.dumps({"processor": processor(), "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
