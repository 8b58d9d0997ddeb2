"""Writes the tables of README.md and docs/ from the result files, between <!-- bench:NAME --> and <!-- /bench:NAME -->.

``python -m bench.report`` writes them and the tables in the code of what is fastest on a GPU, and draws anew the charts
that stand in docs/ as NAME.png; ``--check`` writes nothing and exits with 1 when one differs. ``--html`` and ``--png``
draw the same files instead: one page that needs no network, and a picture for each of its charts.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.kernels.attention import CHOICES
from bench.kernels.case import OURS
from bench.peers.contenders import PACKED, PER_SIZE
from bench.pictures.page import renew_pngs, write_page, write_pngs
from bench.record import H200, RESULTS, ROOT
from bench.tables import faults, longtail, plan, suite
from bench.tables.form import Rows, state, table
from bench.tables.trials import demo_table, small_table, small_trials_table
from fastdino.config import ConfigError

MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
OPENING = re.compile(r"<!-- bench:(\w+) -->")
MODEL = ROOT / "fastdino" / "model"
# Cases of the compile gate that bench.kernels times at the same sizes: operation, shape, variant.
HEADLINES = {
    "dino_loss": ("dino_loss", "10,2,64,65536,bf16", OURS),
    "prototype_weight": ("prototype_weight", "65536,256,bf16", OURS),
}
NOT_MEASURED = "On a GPU: not measured yet.\n"


class Choice(NamedTuple):
    """What the product takes on a GPU by a table in its code, which is written from the figures of a bench."""

    file: Path
    table: str
    bench: str
    variants: str
    """Their name in the bench's file."""
    ways: Callable[[dict[str, Any]], dict[str, Any]]
    """What the table says of each variant of a case."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when one differs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page of charts, with their history")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write every chart as NAME.png")
    options = parser.parse_args()
    if options.html or options.png:
        try:
            _draw(options.html, options.png)
        except ConfigError as error:
            parser.error(str(error))
        return 0
    check = options.check
    texts = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]}
    changed = {path: new for path, text in texts.items() if (new := rewritten(text, RESULTS)) != text}
    for choice in CHOSEN:
        if (new := rewritten_code(text := choice.file.read_text(), choice, RESULTS)) != text:
            changed[choice.file] = new
    for path, new in changed.items() if not check else ():
        path.write_text(new)
    stale = [*changed, *renew_pngs(RESULTS, ROOT / "docs", check)]
    for path in stale:
        print(path.relative_to(ROOT), "differs from bench/results: run python -m bench.report" if check else "written")
    for name in TABLES:
        if not any(f"<!-- bench:{name} -->" in text for text in texts.values()):
            print(f"no file has a place for the table: <!-- bench:{name} --> and <!-- /bench:{name} -->")
    return int(check and bool(stale))


def _draw(html: Path | None, png: Path | None) -> None:
    if html:
        write_page(RESULTS, html)
        print(html, "written")
    for path in write_pngs(RESULTS, png) if png else ():
        print(path, "written")


def rewritten(text: str, results: Path) -> str:
    """``text`` with every table as the files in ``results`` have it.

    Raises ValueError for a marker of no table, or one that is not closed.
    """
    for name in OPENING.findall(text):
        if name not in TABLES:
            raise ValueError(f"<!-- bench:{name} --> is no table: there are {', '.join(TABLES)}")
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise ValueError("a marker <!-- bench:NAME --> has no closing <!-- /bench:NAME --> after it")
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](results)}\n{match[3]}", text)


def kernels_table(results: Path) -> str:
    """One table for each device: milliseconds, share of the copy bandwidth, how many times as long the others take."""
    return _by_device(results, "kernels", _kernel_rows)


def step_table(results: Path) -> str:
    """One table for each device: images per second, MFU, memory, syncs and launches of the contenders."""
    return _by_device(results, "step", _step_rows)


def recorded(file: Path, of: Any) -> str:
    """What a module of bench.tables makes of its file."""
    if not file.exists():
        return "Not measured yet.\n"
    document = json.loads(file.read_text())
    return f"{of.caption(document)}{state(document['provenance'])}\n\n{table(of.HEADER, [*of.rows(document)])}"


def counts_table(results: Path) -> str:
    """The counters that CI holds."""
    document = json.loads((results / "counts.json").read_text())
    keys = ("host_syncs", "collectives", "triton_launches", "aten_calls", "graph_kernels")
    rows = []
    for case, c in document["cases"].items():
        totals = [str(sum(c[key].values())) if key in c else "-" for key in keys]
        size = [_megabytes(c[key]) if key in c else "-" for key in ("aten_bytes", "saved_bytes")]
        rows.append([case, *totals, *size])
    header = ["one step", "host syncs", "collectives", "Triton launches", "aten calls", "in graphs"]
    return table([*header, "aten MB", "saved MB"], rows)


def compile_table(results: Path) -> str:
    """What the compiler reports of each kernel for sm_90, and the bound that follows on an H200."""
    document = json.loads((results / "compile.json").read_text())
    rows = []
    for case, kernels in document["cases"].items():
        for kernel, reports in kernels.items():
            here, bound = reports["sm_90"], reports["h200"]
            times = [f"{bound[key]:.1f}" for key in ("memory_us", "issue_us", "exp_us")]
            figures = [f"{here['registers']}", f"{here['spills']}", f"{here['instructions_per_element']:.1f}"]
            rows.append([f"`{case}`", f"`{kernel}`", *figures, *times, bound["bound"]])
    header = ["case", "kernel", "registers", "spills", "instructions per element"]
    found = table([*header, "memory us", "issue us", "exp us", "bound by"], rows)
    return f"{found}\n{table(['case', 'bounds together, us', 'measured, us'], _predicted(document, results))}"


def _predicted(document: dict[str, Any], results: Path) -> Rows:
    """The bounds of a case's launches, one after another, beside what bench.kernels measured of it on an H200."""
    cases, rows = _cases(results / f"kernels-{H200}.json"), []
    for case, (operation, shape, variant) in HEADLINES.items():
        bounds = [kernel["h200"] for kernel in document["cases"][case].values()]
        together = sum(max(bound[key] for key in ("memory_us", "issue_us", "exp_us")) for bound in bounds)
        found = cases.get((operation, shape), {}).get(variant)
        measured = f"{1e3 * found['milliseconds']:.1f}" if found else "not measured"
        rows.append([f"`{case}`", f"{together:.1f}", measured])
    return rows


def ceilings_table(results: Path) -> str:
    """One table for each device: what it can do at best."""
    return _by_device(results, "ceilings", _ceiling_rows)


def attention_table(results: Path) -> str:
    """One table for each device: every way to attend, forward and backward."""
    return _by_device(results, "attention", _attention_rows)


def choices_table(results: Path) -> str:
    """What the product takes on each GPU that was measured."""
    attention, packed = (_fastest(results, choice) for choice in CHOSEN)
    views = {gpu: "packed" if whole else "a pass per size" for gpu, whole in packed.items()}
    gpus = sorted(attention.keys() | views.keys())
    rows = [[gpu, *(found.get(gpu, "not measured") for found in (attention, views))] for gpu in gpus]
    return table(["GPU", "attention", "views"], rows) if rows else NOT_MEASURED


def rewritten_code(text: str, choice: Choice, results: Path) -> str:
    """``text`` with the table of ``choice`` as the files in ``results`` have it."""
    fastest = _fastest(results, choice).items()
    entries = "".join(f'    "{gpu}": {json.dumps(way) if isinstance(way, str) else way},\n' for gpu, way in fastest)
    table = f"{{\n{entries}}}" if entries else "{}"
    found = re.search(rf"^{re.escape(choice.table)} = (\{{.*?\}})$", text, re.DOTALL | re.MULTILINE)
    assert found, f"there is no line {choice.table} = ..."
    return text[: found.start(1)] + table + text[found.end(1) :]


def _fastest(results: Path, choice: Choice) -> dict[str, Any]:
    """The way that takes least time in the first case of each GPU's file, by the GPU's name."""
    found = {}
    for file in sorted({*results.glob(f"{choice.bench}-*.json")} - {results / f"{choice.bench}-cpu.json"}):
        document = json.loads(file.read_text())
        case = document["cases"][0]
        ways = choice.ways(case)
        times = {ways[name]: f["milliseconds"] for name, f in case[choice.variants].items() if name in ways}
        if len(times) > 1:
            found[document["provenance"]["device"]] = min(times, key=lambda way: times[way])
    return found


CHOSEN = (
    Choice(MODEL / "attention.py", "FASTEST: dict[str, str]", "attention", "variants", lambda case: CHOICES),
    Choice(MODEL / "packing.py", "PACKED: dict[str, bool]", "step", "contenders",
           lambda case: {OURS: case["packed"], PACKED: True, PER_SIZE: False}),
)  # fmt: skip


def data_table(results: Path) -> str:
    """Images per second of each stage, one process or several workers."""
    file = results / "data-cpu.json"
    if not file.exists():
        return "Not measured yet.\n"
    document = json.loads(file.read_text())
    rows = []
    for stage, contenders in document["stages"].items():
        for name, f in contenders.items():
            rows.append([stage, name, f"{f['images_per_second']:.3g}", f"{f['per_core']:.3g}", _times(f)])
            stage = ""
    files, where = document["files"], document["provenance"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "torchvision", "pillow"))
    what = f"{files['width']} x {files['height']} pixels in {1e-3 * files['mean_bytes']:.0f} kB"
    by = f"; views by {where['views']}" if "views" in where else ""
    caption = (
        f"{where['device']}{by}; {versions}; {state(where)}. JPEG files of {what}; views of {document['views']} pixels."
    )
    return f"{caption}\n\n{table(['stage', 'by', 'images/s', 'per core', 'time / ours'], rows)}"


def _cases(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Variants by operation and shape; none where there is no file, so that no other device's figures stand for it."""
    cases = json.loads(file.read_text())["cases"] if file.exists() else []
    return {(case["operation"], case["shape"]): case["variants"] for case in cases}


TABLES: dict[str, Callable[[Path], str]] = {
    "kernels": kernels_table,
    "step": step_table,
    "counts": counts_table,
    "compile": compile_table,
    "demo": demo_table,
    "small": small_table,
    "small_trials": small_trials_table,
    "ceilings": ceilings_table,
    "attention": attention_table,
    "choices": choices_table,
    "data": data_table,
    "faults": lambda results: recorded(results / "faults-cpu.json", faults),
    "longtail": lambda results: recorded(results / "longtail-cpu.json", longtail),
    "suite": lambda results: recorded(results / "suite-cpu.json", suite),
    "plan": lambda results: f"{plan.commands()}\n\n{table(plan.HEADER, [*plan.rows()])}",
}


def _by_device(results: Path, bench: str, rows_of: Callable[..., tuple[list[str], Rows]]) -> str:
    """GPUs first; says so when there is none."""
    files = sorted(results.glob(f"{bench}-*.json"))
    parts = [] if any(file.stem != f"{bench}-cpu" for file in files) else [NOT_MEASURED]
    for file in sorted(files, key=lambda file: file.stem == f"{bench}-cpu"):
        document = json.loads(file.read_text())
        on_gpu = file.stem != f"{bench}-cpu"
        parts.append(f"{_caption(document['provenance'], on_gpu)}\n\n{table(*rows_of(document, on_gpu))}")
    return "\n".join(parts)


def _caption(where: dict[str, Any], on_gpu: bool) -> str:
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton", "lightly", "timm"))
    meaning = f"driver {where['driver']}" if on_gpu else "processor time of one thread; kernels run as their references"
    return f"{where['device']} ({meaning}). {versions}; {state(where)}."


def _kernel_rows(document: dict[str, Any], on_gpu: bool) -> tuple[list[str], Rows]:
    rows = []
    for case in document["cases"]:
        variants = case["variants"]
        ours = variants[OURS]
        compiled = [f for name, f in variants.items() if "torch.compile" in name]
        own = [name for name in variants if name.startswith(("fastdino", "reference")) or "torch.compile" in name]
        others = {name: f for name, f in variants.items() if name not in own}
        name = min(others, key=lambda other: others[other]["times_ours"]["median"], default=None)
        best = others[name] if name else None  # none: all were left out
        memory = f"{_megabytes(ours['peak_bytes'])} / {_megabytes(best['peak_bytes']) if best else '-'}"
        row = [f"`{case['operation']}`", case["shape"], f"{ours['milliseconds']:.3g}"]
        row += [f"{100 * ours['copy_fraction']:.0f} %", _times(variants["reference"])] if on_gpu else []
        row += [_times(compiled[0]) if compiled else "-", f"{_times(best)}, {name}" if best else "-"]
        rows.append([*row, memory])
    device = ["of copy bandwidth", "reference / ours"] if on_gpu else []
    header = ["kernel", "sizes", "ms", *device, "torch.compile / ours", "best other / ours", "peak MB, ours / its"]
    return header, rows


def _step_rows(document: dict[str, Any], on_gpu: bool) -> tuple[list[str], Rows]:
    rows = []
    for case in document["cases"]:
        what = f"{case['arch']}, {case['views']} px, batch {case['batch']}, {case['precision']}"
        what += f", {case['order']}" if case.get("order", "in turns") != "in turns" else ""
        what += ", not finished" if "partial" in case else ""
        for name, f in case["contenders"].items():
            memory = _megabytes(f["peak_bytes"]) if f["peak_bytes"] is not None else "-"
            counted = [str(f[key]) if f[key] is not None else "-" for key in ("host_syncs", "launches")]
            speed = [f"{f['milliseconds']:.1f}", f"{f['images_per_second']:.1f}", f"{100 * f['mfu']:.0f} %"]
            shown = f"{name}, not compiled: it failed" if f.get("fallback") else name
            rows.append([what, shown, *speed, _times(f), memory, *counted])
            what = ""
        rows += [[what, name, "does not fit", *[""] * 6] for name in case.get("left_out", ())]
    calls = "launches" if on_gpu else "aten calls"
    header = ["step", "trainer", "ms", "images/s", "MFU", "time / ours", "peak MB", "host syncs", calls]
    return header, rows


def _ceiling_rows(document: dict[str, Any], on_gpu: bool) -> tuple[list[str], Rows]:
    rows = [
        [name, f"{f['median']:.4g}", f"{f['low']:.4g} to {f['high']:.4g}", f["unit"]]
        for name, f in document["ceilings"].items()
    ]
    return ["at best", "median", "95 % interval", "unit"], rows


def _attention_rows(document: dict[str, Any], on_gpu: bool) -> tuple[list[str], Rows]:
    rows = []
    for case in document["cases"]:
        what = case["shape"].replace("+", " + ")
        for name, f in case["variants"].items():
            share = f"{100 * f['flops_per_s'] / document['matmul_flops_per_s']:.0f} %"
            speed = [f"{f['milliseconds']:.3g}", f"{1e-12 * f['flops_per_s']:.3g}", share, _times(f)]
            rows.append([what, name, *speed, _megabytes(f["peak_bytes"])])
            what = ""
    return ["sequences x tokens", "attention", "ms", "TFLOP/s", "of a matrix product", "time / ours", "peak MB"], rows


def _times(figures: dict[str, Any]) -> str:
    """How many times as long as ours, with half the width of its 95 % interval."""
    ratio = figures["times_ours"]
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}x"
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g}" if num_bytes < 1e9 else f"{num_bytes / 1e6:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
