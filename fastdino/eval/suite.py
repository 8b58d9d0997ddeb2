"""All evaluations that a data set has labels for, as one report; and whether two results differ."""

import base64
import dataclasses
import html
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastdino.config import ConfigError, UserError
from fastdino.config.errors import require
from fastdino.eval.evaluation import Common, Evaluation, Subject
from fastdino.eval.intervals import difference
from fastdino.eval.result import read_result, read_shares
from fastdino.files import whole_file

log = logging.getLogger(__name__)

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td,th{border-color:#444}img{background:#fff}}"""
HEADER = ("evaluation", "score", "value", "95 % interval", "pixels", "random start", "published")


class Section(NamedTuple):
    """What a kind found, or why it was left out."""

    kind: str
    told: dict[str, Any] | None
    """Its JSON."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Suite(Common):
    """Every evaluation that --data has labels for, as one report: report.md, report.html, report.json.

    What the data has no labels for is left out, and the report says why. Features are made once for all.
    """

    only: tuple[str, ...] = ()
    """These kinds alone."""
    skip: tuple[str, ...] = ()
    """Not these kinds."""

    def check(self, kinds: Sequence[str]) -> None:
        """Raises ConfigError for a kind that is none."""
        for flag, names in (("--only", self.only), ("--skip", self.skip)):
            for name in names:
                require(name in kinds, flag, name, f"one of {', '.join(kinds)}")

    def __call__(self, subject: Subject, kinds: dict[str, type[Evaluation]], folder: Path) -> Iterator[Section]:
        """Each kind's section as soon as it is there, its files in ``folder``."""
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(Common)}
        for name, kind in kinds.items():
            if (self.only and name not in self.only) or name in self.skip:
                continue
            log.info("%s ...", name)
            try:
                result = kind(**common)(subject)
            except UserError as error:
                log.info("%s: left out: %s", name, error)
                yield Section(name, None, str(error))
                continue
            log.info("%s", result.table())
            yield Section(name, result.write(folder) if subject.ranks.is_main else result.json())


def write_report(folder: Path, sections: list[Section], weights: str, data: str) -> str:
    """report.json, report.md and report.html, which holds the pictures itself. Returns the table in Markdown.

    Raises ConfigError when nothing was found, and when a file cannot be written.
    """
    if not any(section.told for section in sections):
        reasons = "; ".join(f"{section.kind}: {section.reason}" for section in sections)
        raise ConfigError(f"{data} has labels for no evaluation. {reasons}")
    title = f"What the features of {weights} are worth on {data}"
    rows = [row for section in sections if section.told for row in rows_of(section.told)]
    table = "\n".join(["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows)])
    content = {
        "report.json": json.dumps({section.kind: section.told or {"left_out": section.reason} for section in sections}),
        "report.md": _markdown(title, table, sections),
        "report.html": _page(title, rows, sections, folder),
    }
    for name, text in content.items():
        with whole_file(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    return table


def compare(one: Path, other: Path) -> dict[str, Any]:
    """By how many points the result ``one`` exceeds ``other``, on the images that both judged.

    Raises EvaluationError for files that are no results, ConfigError for results of different kinds.
    """
    told = [read_result(path) for path in (one, other)]
    asked = [f"{result['kind']} {result['headline']}" for result in told]
    if asked[0] != asked[1]:
        raise ConfigError(f"{one} is of {asked[0]} and {other} of {asked[1]}: compare like with like")
    score = difference(read_shares(one), read_shares(other))
    differs = score.low > 0 or score.high < 0
    first, second = (result["protocol"] for result in told)
    headline = told[0]["headline"]
    return {
        "kind": told[0]["kind"],
        "headline": headline,
        "scores": [result["scores"][headline]["value"] for result in told],
        "difference": score.json(),
        "verdict": "they differ" if differs else "no difference beyond chance: more test images would tell",
        "protocol_differs": sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key)),
    }


def rows_of(told: dict[str, Any]) -> Iterator[list[str]]:
    """A table's rows of a result: the headline with what it is compared with, then the other scores."""
    for name, score in told["scores"].items():
        first = name == told["headline"]
        baselines = told["baselines"] if first else {}
        published = (told["published"] or {}).get("score") if first else None
        numbers = [score["value"], *(baselines.get(base, {}).get("value") for base in ("pixels", "random_init"))]
        value, pixels, random = ("" if x is None else f"{x:.1f}" for x in numbers)
        ends = [score["low"], score["high"]]
        interval = "" if None in ends else f"{ends[0]:.1f} to {ends[1]:.1f}"
        shown = "" if published is None else f"{published:.1f}"
        yield [told["kind"] if first else "", name.replace("_", " "), value, interval, pixels, random, shown]


def _markdown(title: str, table: str, sections: list[Section]) -> str:
    parts = [f"# {title}", table]
    for section in sections:
        pictures = [name for name in (section.told or {}).get("files", ()) if name.endswith(".png")]
        notes = [*(section.told or {}).get("notes", ())] or ([f"Left out: {section.reason}"] if section.reason else [])
        if notes or pictures:
            parts.append(f"## {section.kind}")
            parts += [f"- {note}" for note in notes] + [f"![{section.kind}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _page(title: str, rows: list[list[str]], sections: list[Section], folder: Path) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    parts += [
        f"<h1>{html.escape(title)}</h1><table>",
        row(HEADER, "th"),
        *(row(cells, "td") for cells in rows),
        "</table>",
    ]
    for section in sections:
        told = section.told or {}
        said = [*told.get("notes", ()), *([f"Left out: {section.reason}"] if section.reason else [])]
        parts.append(f"<h2>{html.escape(section.kind)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in said]
        for name in told.get("files", ()):
            if name.endswith(".png"):
                picture = base64.b64encode((folder / name).read_bytes()).decode()
                parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{picture}">')
        if told:
            protocol = ", ".join(f"{key} {value}" for key, value in told["protocol"].items())
            parts.append(f"<p><small>{html.escape(protocol)}</small></p>")
    return "\n".join(parts) + "\n"
