"""The charts of a folder of result files."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.kernels.case import OURS
from bench.pictures.charts import Lines, Panel, Point, Rows
from bench.pictures.history import Recorded, history

Chart = Rows | Lines


def charts(results: Path) -> list[Chart]:
    """All that the files have something for: steps, kernels and attention by device, GPUs first; then the history."""
    found: list[Chart] = []
    for bench, draw in (("step", _step), ("kernels", _kernels), ("attention", _attention)):
        files = sorted(results.glob(f"{bench}-*.json"), key=lambda file: (file.stem == f"{bench}-cpu", file.name))
        found += [draw(file.stem, json.loads(file.read_text())) for file in files]
    return found + [chart for chart in _history(results) if chart.series]


def _step(name: str, document: dict[str, Any]) -> Rows:
    """Images per second and MFU of every trainer, by model."""
    labels, speed, mfu = [], [], []
    for case in document["cases"]:
        for trainer, figures in case["contenders"].items():
            labels.append(f"{case['arch']} x {case['batch']}: {trainer}")
            speed.append(figures["images_per_second"])
            mfu.append(100 * figures["mfu"])
    panels = [Panel("images/s", {OURS: speed}), Panel("MFU, %", {OURS: mfu})]
    views = ", ".join(dict.fromkeys(f"{case['views']} px, {case['precision']}" for case in document["cases"]))
    return Rows(name, f"A training step: {_device(document)}", f"Views {views}. {_origin(document)}", labels, panels)


def _kernels(name: str, document: dict[str, Any]) -> Rows:
    """Milliseconds of ours and of the alternatives, and how near ours comes to the copy bandwidth."""
    cases = document["cases"]
    series: dict[str, list[float | None]] = {word: [] for word in (OURS, "reference", "torch.compile", "best other")}
    for case in cases:
        variants = {name: figures["milliseconds"] for name, figures in case["variants"].items()}
        compiled = [ms for variant, ms in variants.items() if "torch.compile" in variant]
        own = [v for v in variants if v.startswith((OURS, "reference")) or "torch.compile" in v]
        others = [ms for variant, ms in variants.items() if variant not in own]
        series[OURS].append(variants[OURS])
        series["reference"].append(variants.get("reference"))
        series["torch.compile"].append(min(compiled, default=None))
        series["best other"].append(min(others, default=None))
    fraction = [100 * case["variants"][OURS]["copy_fraction"] for case in cases]
    panels = [Panel("milliseconds", series, log=True), Panel("ours, % of the copy bandwidth", {OURS: fraction})]
    labels = [f"{case['operation']} {case['shape']}" for case in cases]
    return Rows(name, f"Kernels: {_device(document)}", _origin(document), labels, panels)


def _attention(name: str, document: dict[str, Any]) -> Rows:
    """Milliseconds of every way to attend, and its share of a matrix product's FLOP/s."""
    labels, times, share = [], [], []
    for case in document["cases"]:
        for variant, figures in case["variants"].items():
            labels.append(f"{case['shape']}: {variant}")
            times.append(figures["milliseconds"])
            share.append(100 * figures["flops_per_s"] / document["matmul_flops_per_s"])
    panels = [Panel("milliseconds", {OURS: times}), Panel("% of a matrix product's FLOP/s", {OURS: share})]
    title = f"Attention, sequences x tokens: {_device(document)}"
    return Rows(name, title, _origin(document), labels, panels)


def _history(results: Path) -> Iterator[Lines]:
    """Images per second by device and model; calls and launches of one step by case; the calibrated ratio."""
    speed: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(results.glob("step-*.json")):
        for version in history(file):
            for case in version.document.get("cases", []):
                figures = case.get("contenders", {}).get(OURS)
                if figures:
                    label = f"{case['arch']} x {case['batch']}, {case['precision']}"
                    speed[file.stem][label].append(_point(version, figures["images_per_second"]))
    for name, series in speed.items():
        title = f"History: images/s of {OURS}, {name.removeprefix('step-')}"
        yield Lines(f"history-{name}", title, "By the commit that recorded them.", series)
    calls: dict[str, list[Point]] = defaultdict(list)
    for version in history(results / "counts.json"):
        for case, counters in version.document.get("cases", {}).items():
            parts = (counters.get(key, {}) for key in ("aten_calls", "triton_launches", "graph_kernels"))
            calls[case].append(_point(version, sum(sum(part.values()) for part in parts)))
    caption = "aten calls, Triton launches and kernels of compiled graphs; fewer is better."
    yield Lines("history-counts", "History: calls of one small step", caption, calls)
    ratios = [_point(v, v.document["ratio"]) for v in history(results / "cpu_ratio.json") if "ratio" in v.document]
    caption = "A small step on a CPU; less is better."
    series = {"time / the peer's": ratios} if ratios else {}
    yield Lines("history-ratio", "History: processor time as a multiple of the public peer's", caption, series)


def _point(version: Recorded, value: float) -> Point:
    return Point(version.commit, version.date, value)


def _device(document: dict[str, Any]) -> str:
    return str(document["provenance"]["device"])


def _origin(document: dict[str, Any]) -> str:
    where = document["provenance"]
    versions = ", ".join(f"{name} {where['versions'].get(name)}" for name in ("torch", "triton"))
    changed = " with changes" if where["dirty"] else ""
    return f"{versions}; commit {where['commit'][:9]}{changed}, {where['date'][:10]}; {where['command']}"
