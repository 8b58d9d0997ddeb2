"""The charts as PNG files, and as one HTML page that needs nothing else: pictures are inside, no script, no address."""

import hashlib
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from bench.pictures.charts import Lines
from bench.pictures.history import what_is_missing
from bench.pictures.results import Chart, charts
from fastdino.config import ConfigError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .2rem; } p { margin: .2rem 0; color: #555; }
svg { max-width: 100%; height: auto; } nav a { margin-right: 1rem; } summary { cursor: pointer; color: #1b6ca8; }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0; }
td, th { padding: .1rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f4f6f8; }
"""
DRAWN = "Drawn from"  # where a PNG keeps the digest of its figures
NOTHING = "There are no result files yet: `make bench` writes them."


def write_page(results: Path, out: Path) -> None:
    """Writes the page of the files in ``results``; raises ConfigError where ``out`` cannot be written."""
    _write(out, page(charts(results), what_is_missing(results)).encode())


def write_pngs(results: Path, folder: Path) -> list[Path]:
    """Writes NAME.png for every chart of the files in ``results``; raises ConfigError where that is impossible."""
    return [_write_png(chart, folder / f"{chart.name}.png") for chart in charts(results)]


def renew_pngs(results: Path, folder: Path, check: bool) -> list[Path]:
    """The pictures of charts in ``folder`` that show other figures than ``results``; drawn anew unless ``check``."""
    found = [(chart, path) for chart in charts(results) if (path := folder / f"{chart.name}.png").exists()]
    stale = [(chart, path) for chart, path in found if Image.open(path).info.get(DRAWN) != _digest(chart)]
    return [path if check else _write_png(chart, path) for chart, path in stale]


def _write_png(chart: Chart, path: Path) -> Path:
    data, figure = io.BytesIO(), chart.figure()
    figure.suptitle(chart.title, fontsize=11)
    figure.savefig(data, format="png", dpi=110, metadata={DRAWN: _digest(chart)})
    _write(path, data.getvalue())
    return path


def _digest(chart: Chart) -> str:
    """Of the figures; the pixels depend on the version of what draws them."""
    return hashlib.sha256(repr((chart.title, chart.table())).encode()).hexdigest()


def page(found: Sequence[Chart], note: str) -> str:
    """The HTML document; ``note`` stands above the history."""
    links = "".join(f'<a href="#{chart.name}">{html.escape(chart.title)}</a>' for chart in found)
    parts, noted = [], not note
    for chart in found:
        if isinstance(chart, Lines) and not noted:
            parts.append(f"<p>{html.escape(note)}</p>")
            noted = True
        parts.append(_section(chart))
    body = "".join(parts) or f"<p>{NOTHING}</p>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastdino: measured</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>fastdino: what was measured</h1>\n<nav>{links}</nav>\n{body}"
        "</body></html>\n"
    )


def _section(chart: Chart) -> str:
    header, rows = chart.table()
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return (
        f'<section><h2 id="{chart.name}">{html.escape(chart.title)}</h2><p>{html.escape(chart.caption)}</p>\n'
        f"{_svg(chart)}\n<details><summary>as a table</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></details></section>\n"
    )


def _svg(chart: Chart) -> str:
    """The picture as an element whose identifiers are its own, with text that stays text."""
    text, figure = io.StringIO(), chart.figure()
    import matplotlib  # after the figure, which sees to it that it can be imported

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        figure.savefig(text, format="svg")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the declaration and DTD of a file
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{chart.name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(chart.title)}" ', 1)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
