"""Two kinds of charts, each with a table of the same figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdino.eval.pictures import new_figure

OURS = "fastdino"
COLORS = ("#1b6ca8", "#e07b39", "#4f9d69", "#a23b72", "#7d7d7d", "#b59a00", "#5b4ea0", "#333333")
GRID = {"color": "#dddddd", "linewidth": 0.6}
Cells = tuple[list[str], list[list[str]]]
"""A table's header and rows."""


@dataclass(frozen=True)
class Panel:
    """One quantity of every row: one series as bars, several as dots, of which the first is filled."""

    title: str
    series: dict[str, Sequence[float | None]]
    """Values of the rows by name; None where there is none."""
    log: bool = False


@dataclass(frozen=True)
class Rows:
    """Panels side by side that share their rows."""

    name: str
    title: str
    caption: str
    labels: list[str]
    panels: list[Panel]

    def figure(self) -> Any:
        """A matplotlib Figure."""
        figure = new_figure(11, 1.4 + 0.26 * len(self.labels))
        widths = [1.6 if len(panel.series) > 1 else 1 for panel in self.panels]
        axes = figure.subplots(1, len(self.panels), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axis, panel in zip(axes, self.panels, strict=True):
            _draw_panel(axis, panel, self.labels)
        axes[0].set_yticks(range(len(self.labels)), self.labels)
        axes[0].set_ylim(len(self.labels) - 0.4, -0.6)
        return figure

    def table(self) -> Cells:
        """A row for each label, a column for each series."""
        columns = [(f"{panel.title}: {name}" if len(panel.series) > 1 else panel.title, values)
                   for panel in self.panels for name, values in panel.series.items()]  # fmt: skip
        rows = [[label, *(_number(values[i]) for _, values in columns)] for i, label in enumerate(self.labels)]
        return ["", *(title for title, _ in columns)], rows


@dataclass(frozen=True)
class Point:
    """A figure as a commit recorded it."""

    commit: str
    date: str
    value: float


@dataclass(frozen=True)
class Lines:
    """One quantity over time, a line for each name. Points stand in order, not to scale."""

    name: str
    title: str
    caption: str
    series: dict[str, list[Point]]

    def commits(self) -> list[tuple[str, str]]:
        """(commit, date) of all points, in order of time."""
        return sorted({(p.commit, p.date) for points in self.series.values() for p in points}, key=lambda pair: pair[1])

    def figure(self) -> Any:
        """A matplotlib Figure."""
        figure = new_figure(11, 3.6)
        axis = figure.subplots()
        commits = self.commits()
        place = {commit: i for i, (commit, _) in enumerate(commits)}
        for i, (name, points) in enumerate(self.series.items()):
            xs, ys = [place[point.commit] for point in points], [point.value for point in points]
            axis.plot(xs, ys, "o-", color=COLORS[i % len(COLORS)], label=name, markersize=4, linewidth=1.4)
        step = math.ceil(len(commits) / 24)  # so that their names do not overlap
        shown = [(i, f"{commit[:7]}\n{date[:10]}") for i, (commit, date) in enumerate(commits) if i % step == 0]
        axis.set_xticks([i for i, _ in shown], [text for _, text in shown])
        axis.set_ylim(0, 1.08 * max(point.value for points in self.series.values() for point in points))
        axis.grid(axis="y", **GRID)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
        _plain(axis)
        axis.tick_params(axis="x", rotation=50, labelsize=7, labelrotation_mode="xtick")
        return figure

    def table(self) -> Cells:
        """A row for each commit, the newest first."""
        known = {(name, p.commit): p.value for name, points in self.series.items() for p in points}
        rows = [[commit[:9], date[:10], *(_number(known.get((name, commit))) for name in self.series)]
                for commit, date in reversed(self.commits())]  # fmt: skip
        return ["commit", "date", *self.series], rows


def _draw_panel(axis: Any, panel: Panel, labels: list[str]) -> None:
    for i, (name, values) in enumerate(panel.series.items()):
        color = COLORS[i % len(COLORS)]
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        if len(panel.series) > 1:
            rows, xs = [row for row, _ in known], [value for _, value in known]
            axis.plot(xs, rows, "o", color=color, markersize=7 if i == 0 else 5, label=name,
                      fillstyle="full" if i == 0 else "none", zorder=3 if i == 0 else 2)  # fmt: skip
            continue
        for row, value in known:
            ours = OURS in labels[row] or not any(OURS in label for label in labels)
            axis.barh(row, value, color=COLORS[0] if ours else "#b8c4ce", height=0.7)
            axis.annotate(_number(value), (value, row), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.margins(x=0.14)
    axis.set_title(panel.title, fontsize=9, loc="left")
    if panel.log:
        axis.set_xscale("log")
    if len(panel.series) > 1:
        axis.legend(
            fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.5 / len(labels)), ncols=4
        )
    axis.grid(axis="x", **GRID)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _number(value: float | None) -> str:
    """Three digits, or all of a larger number's."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
