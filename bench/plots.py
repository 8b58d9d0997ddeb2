"""Draws docs/sweep-OPERATION.png from what ``python -m bench.kernels --sweep`` wrote, bench/results/sweep-DEVICE.json.

Time over sizes, and the share of the copy bandwidth that was measured in the same rounds; bars are 95 % intervals.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from bench.kernels.case import OURS
from bench.kernels.sweep import SWEEPS
from bench.record import H200, RESULTS, ROOT

OTHERS = 4  # alternatives in a plot: the fastest
Curves = dict[str, dict[int, dict[str, Any]]]  # figures by variant and size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("--results", type=Path, help="default: the H200's file, else another GPU's, else the CPU's")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    options = parser.parse_args()
    found = [options.results] if options.results else files(RESULTS)
    if not found:
        parser.error("there is no bench/results/sweep-DEVICE.json: run python -m bench.kernels --sweep")
    document = json.loads(found[0].read_text())
    where = document["machine_info"]
    for operation, curves in read(document).items():
        title = f"{operation} on {where['device']}, commit {where['commit'][:9]}, {where['date'][:10]}"
        draw(curves, SWEEPS[operation].axis, title, options.out / name(operation))
        print(options.out / name(operation))
    return 0


def files(results: Path) -> list[Path]:
    """The sweeps in ``results``, the one to draw first: the H200's, then other GPUs', then the CPU's."""
    return sorted(
        results.glob("sweep-*.json"), key=lambda f: (f.stem == "sweep-cpu", f.stem != f"sweep-{H200}", f.stem)
    )


def name(operation: str) -> str:
    """The picture's file name."""
    return f"sweep-{operation.strip('_')}.png"


def read(document: dict[str, Any]) -> dict[str, Curves]:
    """Of every operation ours and the fastest alternatives: those whose times are shortest on geometric average."""
    found: dict[str, Curves] = {}
    for entry in document["benchmarks"]:
        if info := entry["extra_info"]:
            curve = found.setdefault(info["operation"], {}).setdefault(info["variant"], {})
            curve[SWEEPS[info["operation"]].size(info["shape"])] = info
    for operation, curves in found.items():
        others = [variant for variant in curves if not variant.startswith(OURS)]
        others.sort(key=lambda variant, of=curves: _slowness(of[variant]))  # type: ignore[misc]
        found[operation] = {variant: curves[variant] for variant in (OURS, *others[:OTHERS])}
    return found


def _slowness(curve: dict[int, dict[str, Any]]) -> float:
    return sum(math.log(figures["times_ours"]["median"]) for figures in curve.values()) / len(curve)


def draw(curves: Curves, axis: str, title: str, path: Path) -> None:
    """Two panels over the sizes: milliseconds, and percent of the copy bandwidth."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for (key, scale, label), ax in zip(
        (("milliseconds", 1.0, "ms"), ("copy_fraction", 100.0, "% of the copy bandwidth")), panels, strict=True
    ):
        for number, (variant, curve) in enumerate(curves.items()):
            sizes = sorted(curve)
            middle = [scale * curve[size][key] for size in sizes]
            ends = [[scale * end for end in curve[size]["interval"][key]] for size in sizes]
            bars = [  # a median of ratios may lie a little outside the interval of the ratio of medians
                [max(0.0, m - low) for m, (low, _) in zip(middle, ends, strict=True)],
                [max(0.0, high - m) for m, (_, high) in zip(middle, ends, strict=True)],
            ]
            style = {"color": f"C{number}", "linewidth": 2.0 if variant == OURS else 1.0, "label": variant}
            ax.errorbar(sizes, middle, yerr=bars, marker="o", markersize=3, capsize=2, **style)
        ax.set(xscale="log", xlabel=axis, ylabel=label)
        ax.set_xticks(sorted(curves[OURS]), [_short(size) for size in sorted(curves[OURS])])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(LogFormatter())
    panels[0].yaxis.set_minor_formatter(LogFormatter())
    panels[1].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _short(size: int) -> str:
    """65536 -> 66 k; 304000000 -> 304 M."""
    power = max(0, int(math.log10(size)) // 3)
    return f"{size / 1000**power:.3g} {' kMG'[power]}".strip()


if __name__ == "__main__":
    sys.exit(main())
