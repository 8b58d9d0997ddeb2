"""``python -m bench.gates.demo --seeds 0 1`` runs the demo for each seed and records results/demo.json."""

import argparse
from pathlib import Path

import torch

from bench.record import RESULTS, ROOT, provenance, write
from fastdino.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gates.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds to run, one after another")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs", help="run folders are DIR/demo-SEED, and new")
    arguments = parser.parse_args()
    runs = {seed: run_demo(arguments.dir / f"demo-{seed}", seed) for seed in arguments.seeds}
    where = provenance(torch.device("cpu"), "bench.gates.demo")
    where["command"] = f"python -m bench.gates.demo --seeds {' '.join(map(str, runs))}"  # the folder does not matter
    write(RESULTS / "demo.json", {"provenance": where, "seeds": {str(seed): found for seed, found in runs.items()}})


if __name__ == "__main__":
    main()
