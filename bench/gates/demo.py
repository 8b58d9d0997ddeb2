"""What the demo learns: k-NN accuracy, where its attention lies, and what its patches know of their class.

``python -m bench.gates.demo --seeds 0 1 2`` runs the demo once for each seed and records bench/results/demo.json.
``--trial "--loss.patch-weight 0.3"`` trains with other settings instead and adds their figures to the file; the flags
are those of ``fastdino train``. Runs that are there go on.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from bench.record import RESULTS, ROOT, add, may_add, provenance, write
from fastdino.cli import overridden
from fastdino.demo import demo_config, run_demo
from fastdino.eval import PatchProbe, Subject
from fastdino.training.export import run_backbone

FILE = RESULTS / "demo.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gates.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="runs, one after another")
    parser.add_argument("--trial", default="", help="flags of fastdino train that differ from the recipe's")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs", help="the run folders are in it")
    parser.add_argument("--out", type=Path, default=FILE, help="the file of results")
    options = parser.parse_args()
    where = provenance(torch.device("cpu"), "bench.gates.demo") | {"threads": 1}
    flags = shlex.split(options.trial)
    if flags and not may_add(options.out, where):
        return 1
    if not flags:
        write(options.out, {"provenance": where, "cases": []})
    for seed in options.seeds:
        folder = options.dir / "-".join(["demo", *(flag.strip("-") for flag in flags), str(seed)])
        add(options.out, {"provenance": where, "cases": [trial(flags, seed, folder)]}, name)
    return 0


def name(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["flags"], case["seed"]


def trial(flags: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Figures of the demo with ``flags``, see :func:`fastdino.demo.run_demo` and :class:`fastdino.eval.PatchProbe`."""
    config = overridden(demo_config(folder, seed), flags)
    found = run_demo(config)
    probe = PatchProbe(data="shapes")(Subject(run_backbone(folder)[0], config, folder))
    patches = {key: score for key, score in probe.items() if key.startswith("patch_miou")}
    print(json.dumps(patches))
    return {"flags": shlex.join(flags), "seed": seed, **found, **patches}


if __name__ == "__main__":
    sys.exit(main())
