"""Seconds of a first step that compiles the network: by the number of its blocks, and with the last run's cache.

``python -m bench.gates.first_step`` records bench/results/first_step-DEVICE.json, each case in a process of its own.
Equal blocks are compiled once, so that 24 of them may cost 1.25 times what 6 cost at most; else it exits with 1.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from bench.record import ROOT, device_here, positive, provenance, python_path, result_path, write
from bench.workload import build_trainer, random_batch, step_config
from fastdino import distributed
from fastdino.engine.graphs import CACHES
from fastdino.model.vit import SIZES
from fastdino.training.throughput.timing import wall_seconds

BLOCKS = (6, 12, 24)
MOST = 1.25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gates.first_step", description=__doc__)
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: bench/results/first_step-DEVICE.json")
    parser.add_argument("--blocks", type=positive, help="print the seconds of this case alone")
    parser.add_argument("--cache", type=Path, help="its run.cache")
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    if options.blocks:
        print(first_step(options.blocks, device, options.cache))
        return 0
    where = provenance(device, "bench.gates.first_step")
    cases = []
    for blocks in BLOCKS:
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold", "warm") if blocks == BLOCKS[-1] else ("cold",):
                seconds = _alone(blocks, device, cache)
                cases.append({"blocks": blocks, "cache": start, "seconds": seconds})
                print(f"{blocks} blocks, {start} cache: {seconds:.1f} s", flush=True)
    write(options.out or result_path("first_step", device), {"provenance": where, "cases": cases})
    few, *_, many, _ = (case["seconds"] for case in cases)
    if many > MOST * few:
        print(f"24 blocks take {many / few:.2f} times what 6 take, more than {MOST}: equal blocks are compiled apart")
    return int(many > MOST * few)


def _alone(blocks: int, device: torch.device, cache: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}  # they go before --cache
    command = [sys.executable, "-m", "bench.gates.first_step", "--device", device.type, "--blocks", str(blocks)]
    child = subprocess.run(
        [*command, "--cache", cache], cwd=ROOT, env=environment | {"PYTHONPATH": python_path()}, text=True, check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return float(json.loads(child.stdout.splitlines()[-1]))


def first_step(blocks: int, device: torch.device, cache: Path) -> float:
    """Of ViT-tiny's width on views of bench.step; this process may not have compiled anything before."""
    config = step_config("vit_tiny", device)
    config = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, compile="on"),
        run=dataclasses.replace(config.run, cache=cache),
    )
    with (
        mock.patch.dict(SIZES, tiny=SIZES["tiny"]._replace(depth=blocks)),
        distributed.init(device.type) as ranks,
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = build_trainer(config, ranks, Path(folder))
        batch = random_batch(config, ranks.device, 0)
        return wall_seconds(lambda: trainer.train_step([batch]), ranks.device)


if __name__ == "__main__":
    sys.exit(main())
