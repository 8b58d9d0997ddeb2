"""How long training waits for its checkpoints, beside the copies alone: python -m bench.tables.stall."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastdino
from bench.record import provenance, result_path, write
from fastdino.config import (
    Config,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.training.checkpoint.snapshot import Snapshot

CPU = torch.device("cpu")
STEPS, EVERY = 48, 8


def config(folder: Path) -> Config:
    """ViT-S with a head of 8,192 prototypes, small images: a step is short beside a checkpoint of its weights."""
    return Config(
        model=ModelConfig(arch="vit_small", patch_size=16),
        head=HeadConfig(num_prototypes=8192),
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        data=DataConfig(root="shapes", num_images=2 * STEPS, image_size=32, num_workers=0),
        optim=OptimConfig(warmup_epochs=0),
        engine=EngineConfig(name="torch", device="cpu"),
        run=RunConfig(dir=folder, epochs=1, local_batch=2, log_every=1, knn_every=0, save_every_steps=EVERY),
    )


def main() -> None:
    copies, take = [], Snapshot.take

    def timed(self: Snapshot, *args: Any) -> Any:
        started = time.perf_counter()
        taken = take(self, *args)
        copies.append(time.perf_counter() - started)
        return taken

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Snapshot, "take", timed):
        run = fastdino.train(config(Path(folder) / "run")).dir
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        size = sum(file.stat().st_size for file in (run / "checkpoints").glob("*/*")) / len(
            [*run.glob("checkpoints/*")]
        )
    # The first makes the buffers, and the last of a run is waited for.
    middle = lines[EVERY + 1 :]
    found = {
        "checkpoint_mb": size / 1e6,
        "copy_s": max(copies[1:-1]),
        "stall_s": max(line["checkpoint_stall_s"] for line in middle),
        "first_copy_s": copies[0],
        "write_s": max(line["checkpoint_write_s"] for line in middle),
        "step_s": sorted(line["step_seconds"] for line in middle)[len(middle) // 2],
    }
    write(result_path("stall", CPU), {"provenance": provenance(CPU, "bench.tables.stall"), **found})


if __name__ == "__main__":
    main()
