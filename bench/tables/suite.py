"""Times ``fastdino eval suite`` of a run and records its table: python -m bench.tables.suite RUN --data DIR."""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.record import provenance, result_path, write
from fastdino.cli import main as fastdino
from fastdino.eval.suite import HEADER, rows_of

__all__ = ["HEADER", "caption", "rows"]
CPU = torch.device("cpu")
KEPT = ("headline", "scores", "baselines", "published", "protocol", "data", "left_out", "notes")


def caption(document: dict[str, Any]) -> str:
    """The command, and how long it took."""
    where, run = document["provenance"], document["run"]
    took = f"{document['seconds']:.0f} s in all, features included"
    return f"`{where['command']}` on {where['device']}, {took}; the run: {run['epochs']} epochs, {run['steps']} steps; "


def rows(document: dict[str, Any]) -> Iterator[list[str]]:
    """Each kind's headline, as in the suite's own table."""
    return (next(iter(rows_of(told))) for told in document["found"].values() if told.get("scores"))


def main() -> None:
    """The first time: no features are there yet."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables.suite", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="keep the report here")
    options = parser.parse_args()
    where = provenance(CPU, "bench.tables.suite")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        flags = ["--data", str(options.data), "--out", str(out), "--cache-dir", f"{folder}/cache"]
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            fastdino(["eval", "suite", str(options.run), *flags])
        seconds = time.perf_counter() - started
        told = json.loads((out / "report.json").read_text())
        if options.report:
            shutil.copytree(out, options.report, dirs_exist_ok=True)
    found = {kind: {"kind": kind, **{k: v for k, v in x.items() if k in KEPT}} for kind, x in told.items()}
    for result in found.values():
        result.get("data", {}).pop("root", None)
    config = json.loads((options.run / "config.json").read_text())
    trained = {
        "epochs": config["run"]["epochs"],
        "steps": next(x for x in told.values() if "weights" in x)["weights"]["step"],
    }
    write(result_path("suite", CPU), {"provenance": where, "seconds": seconds, "run": trained, "found": found})


if __name__ == "__main__":
    main()
