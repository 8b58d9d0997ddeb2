"""Exact counts of one training step, which need no GPU and are the same on every machine.

``python -m bench.gates.counts`` records them in bench/results/counts.json; ``--check`` compares with the record, exits
with 1 when anything differs, better or worse, and writes nothing. tests/training/test_throughput.py runs the check.

The cases "gpu ..." take the path of a GPU on CPU tensors: Triton launches are counted and not run, and attention is
torch's. Each is rank 0 of two in a group whose collectives do nothing, so their number is that of a real run.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.counters import HostReads, OpCounts, kernels_counted, saved_bytes
from bench.gates.changes import as_markdown, in_lines
from bench.gates.compiled import CPU, WARMUP_STEPS, count_compiled
from bench.record import RESULTS, provenance, write
from bench.workload import build_trainer, nano_config, nano_dinov2, random_batch
from fastdino.config import Config
from fastdino.distributed import Ranks

COUNTS = RESULTS / "counts.json"
COMPILED = "gpu, DINOv2, compiled"  # counted otherwise: see bench.gates.compiled
CASES = {
    "cpu, ZeRO 1": nano_config(),
    "gpu, not sharded": nano_config(engine="torch", precision="bf16"),
    "gpu, ZeRO 0": nano_config(precision="bf16", zero_stage=0),
    "gpu, ZeRO 1": nano_config(precision="bf16"),
    "gpu, ZeRO 2": nano_config(precision="bf16", zero_stage=2),
    "gpu, DINOv2": nano_dinov2(nano_config(precision="bf16", local_batch=8), sinkhorn=False),
    COMPILED: nano_dinov2(nano_config(precision="bf16", local_batch=8), sinkhorn=False),
    "gpu, DINOv2, separate heads, Sinkhorn": nano_dinov2(nano_config(precision="bf16", local_batch=8), sinkhorn=True),
}
HOW_TO = "If this is meant, record it with `python -m bench.gates.counts` and say why in the commit."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gates.counts", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the record; write nothing")
    parser.add_argument("--markdown", action="store_true", help="--check whose report is a table for a job's summary")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help="check these cases alone")
    options = parser.parse_args()
    check, chosen = options.check or options.markdown, options.only or list(CASES)
    if options.only and not check:
        parser.error("--only goes with --check or --markdown: a record is of all cases")
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    now = {name: _counters(name) for name in chosen}
    dist.destroy_process_group()
    where = provenance(CPU, "bench.gates.counts")
    if not check:
        write(COUNTS, {"provenance": where, "cases": now})
        return 0
    document = json.loads(COUNTS.read_text())
    recorded = {name: case for name, case in document["cases"].items() if name in chosen or not options.only}
    print((as_markdown if options.markdown else in_lines)(recorded, now))
    if recorded == now:
        return 0
    print(f"\n{HOW_TO}")
    if document["provenance"]["versions"] != where["versions"]:
        print(f"recorded with {document['provenance']['versions']}, compared with {where['versions']}")
    return 1


def _counters(name: str) -> dict[str, Any]:
    """Of a case; all but the first are on the path of a GPU."""
    config, ranks = CASES[name], Ranks(0, 2, 0, CPU)
    if name == COMPILED:
        engine = dataclasses.replace(config.engine, compile="on")
        return count_compiled(dataclasses.replace(config, engine=engine), ranks)
    return count(config, ranks, as_on_gpu=name.startswith("gpu"))


def count(config: Config, ranks: Ranks, as_on_gpu: bool) -> dict[str, Any]:
    """The counters of one step, after warm-up, in the process group that there is.

    ``host_syncs``: operations that wait for the device. ``collectives`` and ``triton_launches`` by name.
    ``aten_calls`` by operation, views and bare allocations left out. ``aten_bytes``: what they read and write.
    ``saved_bytes``: what the forward pass keeps for the backward pass beside the parameters.
    """
    batch = random_batch(config, CPU, 0)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        kernels = stack.enter_context(kernels_counted()) if as_on_gpu else Counter[str]()
        trainer = build_trainer(config, ranks, Path(folder))
        for _ in range(WARMUP_STEPS):
            trainer.train_step([batch])
        kernels.clear()
        with OpCounts() as counts, HostReads(counts.syncs), saved_bytes() as saved:
            trainer.train_step([batch])
            return {
                "host_syncs": dict(counts.syncs),
                "collectives": dict(sorted(counts.collectives.items())),
                "triton_launches": dict(sorted(kernels.items())),
                "aten_calls": dict(sorted(counts.calls.items())),
                "aten_bytes": counts.bytes,
                "saved_bytes": saved(),
            }


if __name__ == "__main__":
    sys.exit(main())
