"""What recipes for a CPU learned, for docs/demo.md and docs/small-data.md."""

import json
from pathlib import Path
from typing import Any

from bench.tables.form import state, table


def demo_table(results: Path) -> str:
    """What the demo found, a row for each run."""
    document = json.loads((results / "demo.json").read_text())
    rows = []
    for case in document["cases"]:
        knn = [f"{case[f'knn_{of}']:.1f}" for of in ("teacher", "random_init", "raw_pixels_standardised")]
        iou = [f"{case[f'attention_iou_{of}']:.2f}" for of in ("teacher", "random_init")]
        miou = [f"{case[f'patch_miou{of}']:.1f}" for of in ("", "_random_init", "_raw_pixels")]
        rows.append([_settings(case), str(case["seed"]), *knn, *iou, *miou])
    header = ["settings", "seed", "k-NN teacher, %", "random init", "pixels, standardised"]
    header += ["attention IoU teacher", "random init", "patch mIoU teacher, %", "random init", "pixels"]
    return f"{_ran(document['provenance'])}\n\n{table(header, rows)}"


def small_table(results: Path) -> str:
    """What the recipe ``small`` learned, beside pixels and the random start."""
    columns = {"first_knn_5": "the first 2,000, k = 5", "first_knn_20": "k = 20", "rankme": "RankMe", "steps": "steps"}
    return _small_table(results / "small-cpu.json", {**columns, "seconds": "seconds"})


def small_trials_table(results: Path) -> str:
    """The search for the recipe ``small``: what other settings learned."""
    return _small_table(results / "small-trials-cpu.json", {"rankme": "RankMe", "steps": "steps"})


def _small_table(file: Path, columns: dict[str, str]) -> str:
    if not file.exists():
        return "Not measured yet.\n"
    document = json.loads(file.read_text())
    columns = {"knn_5": "k-NN, k = 5, %", "knn_20": "k = 20", **columns}
    rows, starts = [], set()
    for case in document["cases"]:
        if case["features"] == "random start":  # that of most trials is the recipe's
            if case["rankme"] in starts:
                continue
            starts.add(case["rankme"])
        run = ["", ""] if case["seed"] is None else [_settings(case), str(case["seed"])]
        kinds = {name: ".0f" if name in ("steps", "seconds") else ".1f" for name in columns}
        rows.append([case["features"], *run, *(format(case[n], kinds[n]) if n in case else "" for n in columns)])
    header = ["features", "settings", "seed", *columns.values()]
    return f"{_ran(document['provenance'])}\n\n{table(header, rows)}"


def _settings(case: dict[str, Any]) -> str:
    return f"`{case['flags']}`" if case["flags"] else "the recipe's"


def _ran(where: dict[str, Any]) -> str:
    """Of a gate's file: what wrote it, its command without the trials, which the rows have."""
    command = where["command"].split("; ")[0]
    return f"`{command}` and its trials on {where['device']}; {state(where)}."
