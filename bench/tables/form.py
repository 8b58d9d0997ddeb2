"""How a table is written."""

from typing import Any

Rows = list[list[str]]


def state(where: dict[str, Any]) -> str:
    """Commit and day."""
    return f"commit {where['commit'][:9]}{' with changes' if where['dirty'] else ''}, {where['date'][:10]}"


def table(header: list[str], rows: Rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
