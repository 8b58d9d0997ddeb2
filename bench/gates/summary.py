"""What a GPU job found, as Markdown for its summary.

``python -m bench.gates.summary --verdicts FILE`` makes a table of what bench.compare printed; ``--benchmarks NOW.json``
one of a file that pytest-benchmark saved, beside ``--base BASE.json`` where there is one.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

SLOWER = 1.05  # of the median, as in --benchmark-compare-fail=median:5%
LINE = re.compile(r"(?P<case>.+?): (?P<word>[A-Z]{4,}), (?P<found>.+)")  # of bench.compare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gates.summary", description=__doc__)
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="what bench.compare printed")
    parser.add_argument("--benchmarks", type=Path, metavar="FILE", help="what pytest-benchmark saved")
    parser.add_argument("--base", type=Path, metavar="FILE", help="what it saved of the base")
    options = parser.parse_args()
    if options.base and not options.benchmarks:
        parser.error("--base FILE goes with --benchmarks FILE")
    if not (options.verdicts or options.benchmarks):
        parser.error("nothing to show: --verdicts FILE or --benchmarks FILE is missing")
    try:
        if options.verdicts:
            print(verdicts(_read(options.verdicts)))
        if options.benchmarks:
            print(benchmarks(_medians(options.benchmarks), _medians(options.base) if options.base else {}))
    except Unreadable as error:
        parser.error(str(error))
    return 0


class Unreadable(Exception):
    """A file is not there, or not what was asked for."""


def verdicts(printed: str) -> str:
    """A row for each case that bench.compare judged; its other lines below, such as the reason why it could not."""
    lines = printed.splitlines()
    found = [match for line in lines if (match := LINE.fullmatch(line))]
    rest = [f"    {line}" for line in lines if line.strip() and not LINE.fullmatch(line)]
    rows = [f"| {m['case']} | **{m['word']}** | {m['found']} |" for m in found]
    table = ["| case | | time |", "| --- | --- | --- |", *rows] if rows else ["bench.compare judged nothing."]
    return "\n".join(["### Against the base, in turns", "", *table, "", *rest, ""])


def benchmarks(now: dict[str, float], base: dict[str, float]) -> str:
    """A row for each benchmark, those that became slower first."""
    ratios = {name: seconds / base[name] for name, seconds in now.items() if base.get(name)}
    slower = sum(ratio > SLOWER for ratio in ratios.values())
    told = f"{slower} of {len(ratios)} slower than the base by 5 %" if ratios else "no base beside them"
    lines = [f"### Benchmarks: {told}", "", "| benchmark | median | base | ratio |", "| --- | --- | --- | --- |"]
    for name in sorted(now, key=lambda name: -ratios.get(name, 0)):
        before, ratio = (_time(base[name]), f"{ratios[name]:.3f}") if name in ratios else ("-", "-")
        marked = f"**{ratio}**" if ratios.get(name, 0) > SLOWER else ratio
        lines.append(f"| `{name}` | {_time(now[name])} | {before} | {marked} |")
    lines += [f"\nIn the base alone: {', '.join(sorted(base.keys() - now.keys()))}"] if base.keys() - now.keys() else []
    return "\n".join([*lines, ""])


def _medians(path: Path) -> dict[str, float]:
    """Seconds by name, from a file of pytest-benchmark."""
    try:
        document: Any = json.loads(_read(path))
        return {entry["fullname"]: float(entry["stats"]["median"]) for entry in document["benchmarks"]}
    except (ValueError, KeyError, TypeError):
        raise Unreadable(f"{path} is no file of pytest-benchmark: --benchmark-json={path.name} writes one") from None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


if __name__ == "__main__":
    sys.exit(main())
