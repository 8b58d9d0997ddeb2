"""What differs between recorded counters and those of now: by name, better or worse, in lines or as a table."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

WORSE, OTHER, BETTER = "worse", "other", "better"
Cases = dict[str, dict[str, Any]]
"""Counters by case and name: a number, or numbers by what was counted."""


@dataclass(frozen=True)
class Change:
    """A counter that is not as recorded; fewer is better."""

    case: str
    counter: str
    was: int
    now: int
    names: dict[str, tuple[int, int]]
    """What makes it so, recorded and now; empty for bytes."""

    @property
    def verdict(self) -> str:
        """OTHER where the total is the same and its parts are not."""
        return WORSE if self.now > self.was else BETTER if self.now < self.was else OTHER

    @property
    def why(self) -> str:
        return ", ".join(f"{name} {was} -> {now}" for name, (was, now) in self.names.items())

    def __str__(self) -> str:
        why = f" ({self.why})" if self.names else ""
        return f"{self.case}: {self.verdict}, {self.counter} was {self.was:,}, is {self.now:,}{why}"


def differences(recorded: Cases, now: Cases) -> list[Change]:
    """Every counter that differs in a case of both, the worse ones first."""
    found = []
    for case in sorted(recorded.keys() & now.keys()):
        for counter in now[case] | recorded[case]:
            old, new = recorded[case].get(counter), now[case].get(counter)
            if old != new:
                was, are = _parts(old), _parts(new)
                names = {name: (was.get(name, 0), are.get(name, 0)) for name in sorted(was | are)}
                names = {name: pair for name, pair in names.items() if pair[0] != pair[1]}
                found.append(Change(case, counter, _total(old), _total(new), names))
    return sorted(found, key=lambda change: (WORSE, OTHER, BETTER).index(change.verdict))


def unmatched(recorded: Cases, now: Cases) -> list[str]:
    """One line for each case that is only recorded, or only measured."""
    return [
        f"{case}: {'is not recorded' if case in now else 'is recorded, but measured no more'}"
        for case in sorted(recorded.keys() ^ now.keys())
    ]


def in_lines(recorded: Cases, now: Cases) -> str:
    """A line for each difference, and one that counts them."""
    missing, changes = unmatched(recorded, now), differences(recorded, now)
    return "\n".join([*missing, *map(str, changes), _headline(now, missing, changes)])


def as_markdown(recorded: Cases, now: Cases) -> str:
    """The totals of every case, those that changed beside the record; then what changed, by name."""
    missing, changes = unmatched(recorded, now), differences(recorded, now)
    changed = {(change.case, change.counter): change for change in changes}
    counters = list(dict.fromkeys(counter for case in now.values() for counter in case))
    lines = [f"### Exact counts of a training step: {_headline(now, missing, changes)}", ""]
    lines += [*(f"- {line}" for line in missing), ""] if missing else []
    lines += [_row(["one step", *counters]), _row(["---"] * (1 + len(counters)))]
    for case, figures in now.items():
        lines.append(_row([case, *(_cell(figures, counter, changed.get((case, counter))) for counter in counters)]))
    if changes:
        lines += ["", _row(["case", "counter", "recorded", "now", "", "by name"]), _row(["---"] * 6)]
        for c in changes:
            lines.append(_row([c.case, c.counter, f"{c.was:,}", f"{c.now:,}", f"**{c.verdict}**", c.why]))
    return "\n".join(lines)


def _headline(now: Cases, missing: list[str], changes: list[Change]) -> str:
    verdicts = Counter([change.verdict for change in changes] + ["unmatched"] * len(missing))
    told = [f"{verdicts[verdict]} {verdict}" for verdict in (WORSE, OTHER, BETTER, "unmatched") if verdicts[verdict]]
    return f"{len(now)} cases, {', '.join(told) or 'every counter as recorded'}"


def _cell(figures: dict[str, Any], counter: str, change: Change | None) -> str:
    total = f"{_total(figures[counter]):,}" if counter in figures else "-"
    return f"**{total}** (was {change.was:,})" if change else total


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _parts(counter: Any) -> dict[str, int]:
    return counter if isinstance(counter, dict) else {}


def _total(counter: Any) -> int:
    """0 for one that is absent."""
    return sum(counter.values()) if isinstance(counter, dict) else counter or 0
