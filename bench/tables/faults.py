"""What tests.faults recorded, for docs/faults.md."""

from collections.abc import Iterator
from typing import Any

KINDS = {"kill": "SIGKILL", "term": "SIGTERM", "usr1": "SIGUSR1", "disk": "disk full", "nan": "NaN"}
HEADER = ["engine", *KINDS.values(), "survived", "resumed", "to the byte", "hung"]


def caption(document: dict[str, Any]) -> str:
    """Nothing but the commit."""
    return ""


def rows(document: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each engine and one for all: how many faults of each kind struck, and what became of the runs."""
    cases = document["cases"]
    for engine in (*sorted({case["engine"] for case in cases}), "all"):
        own = [case for case in cases if engine in (case["engine"], "all")]
        struck = {kind: sum(_struck(case) for case in own if case["kind"] == kind) for kind in KINDS}
        resumed = [case for case in own if "resumed" in case]
        figures = [
            sum(_struck(case) for case in own if not case["wrong"]),
            len(resumed),
            sum(case["exact"] for case in resumed),
            sum(case["hung"] for case in own),
        ]
        yield [engine.replace("zero", "ZeRO "), *map(str, (*struck.values(), *figures))]


def _struck(case: dict[str, Any]) -> int:
    return sum(fault["struck"] for fault in case["faults"])
