"""The page and the PNGs show what the result files say, need nothing else, and the history is git's."""

import json
import re
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import report
from bench.pictures import history, page
from bench.pictures.charts import Lines, Panel, Point, Rows
from bench.pictures.results import charts
from bench.record import RESULTS

VOID = {"meta", "br", "img", "link"}


class Checked(HTMLParser):
    """Tags that close, identifiers, references to them, cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.references: set[str] = set()
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids[value] += 1
            if name in ("href", "xlink:href", "src", "action", "data"):
                (self.references.add(value[1:]) if value.startswith("#") else self.addresses.append(value))
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value))


def test_the_page_of_the_repository_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    page.write_page(RESULTS, tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text()
    seen = Checked(text)
    assert not seen.addresses, "nothing is fetched"
    assert not {"script", "link", "img", "iframe", "object"} & seen.tags.keys()
    assert "@import" not in text
    assert [name for name, count in seen.ids.items() if count > 1] == []
    assert seen.references <= seen.ids.keys()
    found = charts(RESULTS)
    assert seen.tags["svg"] == seen.tags["table"] == len(found) >= 3
    fastdino = json.loads((RESULTS / "step-cpu.json").read_text())["cases"][0]["contenders"]["fastdino"]
    assert f"{fastdino['images_per_second']:.3g}" in seen.cells
    assert f"{100 * fastdino['mfu']:.3g}" in seen.cells
    assert f">{100 * fastdino['mfu']:.3g}</text>" in text, "the picture has it too, as text"


def gpu_results(folder: Path) -> None:
    """A step and a kernel of a GPU that nobody has, and of a CPU."""
    for name in ("cpu", "model-1"):
        where = {"commit": "0" * 40, "dirty": True, "device": f"<{name}>", "date": "2000-01-01T00:00:00"}
        where |= {"versions": {"torch": "0"}, "command": "python -m x"}
        contenders = {
            "fastdino": {"images_per_second": 1234.5, "mfu": 0.5},
            "peer": {"images_per_second": 7, "mfu": 0.1},
        }
        case = {"arch": "vit_x", "batch": 3, "views": "2 x 8", "precision": "bf16", "contenders": contenders}
        (folder / f"step-{name}.json").write_text(json.dumps({"provenance": where, "cases": [case]}))
        variants = {"fastdino": {"milliseconds": 0.25, "copy_fraction": 0.91}, "liger": {"milliseconds": 0.5}}
        kernel = {"operation": "op", "shape": "2,3", "variants": variants}
        (folder / f"kernels-{name}.json").write_text(json.dumps({"provenance": where, "cases": [kernel]}))


def test_what_a_chart_shows_is_what_was_measured(tmp_path: Path) -> None:
    gpu_results(tmp_path)
    steps, _, kernels, *_ = found = charts(tmp_path)
    assert [chart.name for chart in found[:4]] == ["step-model-1", "step-cpu", "kernels-model-1", "kernels-cpu"]
    header, rows = steps.table()
    assert header == ["", "images/s", "MFU, %"]
    assert rows == [["vit_x x 3: fastdino", "1,234", "50"], ["vit_x x 3: peer", "7", "10"]]
    assert kernels.table()[1] == [["op 2,3", "0.25", "-", "-", "0.5", "91"]], "no reference and nothing compiled"
    assert "&lt;model-1&gt;" in page.page(found, "")
    assert "with changes" in steps.caption


def test_a_figure_has_every_row_and_every_point() -> None:
    panels = [Panel("x", {"x": [1, 2]}), Panel("y", {"b": [1, None], "c": [3, 4]})]
    rows = Rows("a", "A", "", ["fastdino", "peer"], panels)
    bars, dots = rows.figure().axes
    assert [bar.get_width() for bar in bars.patches] == [1, 2]
    assert [list(line.get_xdata()) for line in dots.lines] == [[1], [3, 4]]
    points = [Point("c2", "2001", 5.0), Point("c1", "2000", 4.0)]
    lines = Lines("l", "L", "", {"one": points, "two": [Point("c2", "2001", 1.0)]})
    (axis,) = lines.figure().axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] == [([1, 0], [5, 4]), ([1], [1])]
    assert lines.table()[1] == [["c2", "2001", "5", "1"], ["c1", "2000", "4", "-"]]


@pytest.mark.parametrize("name", [chart.name for chart in charts(RESULTS)])
def test_pngs_are_pictures(name: str, tmp_path: Path, written: dict[str, Path]) -> None:
    with Image.open(written[name]) as image:
        assert image.width > 1000
        assert len(image.convert("L").getcolors()) > 20, "something is drawn"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.stem: path for path in page.write_pngs(RESULTS, tmp_path_factory.mktemp("pictures") / "new")}


def test_a_picture_of_other_figures_is_drawn_anew(tmp_path: Path) -> None:
    """Of those that stand in the folder; what is no chart's stays."""
    docs, results = tmp_path / "docs", tmp_path / "results"
    results.mkdir()
    gpu_results(results)
    for path in page.write_pngs(results, docs):
        if path.stem != "step-cpu":
            path.unlink()
    other = docs / "attention.png"
    other.write_bytes(b"somebody's own")
    assert page.renew_pngs(results, docs, check=True) == []
    file = results / "step-cpu.json"
    file.write_text(file.read_text().replace("1234.5", "4321.5"))
    before = (docs / "step-cpu.png").read_bytes()
    assert page.renew_pngs(results, docs, check=True) == [docs / "step-cpu.png"]
    assert (docs / "step-cpu.png").read_bytes() == before
    assert page.renew_pngs(results, docs, check=False) == [docs / "step-cpu.png"]
    assert page.renew_pngs(results, docs, check=True) == []
    assert other.read_bytes() == b"somebody's own"
    assert len(list(docs.iterdir())) == 2


def test_no_results_is_a_page_that_says_so(tmp_path: Path) -> None:
    page.write_page(tmp_path / "none", tmp_path / "page.html")
    assert page.NOTHING in (tmp_path / "page.html").read_text()
    assert page.write_pngs(tmp_path / "none", tmp_path / "pictures") == []


@pytest.mark.parametrize("flag", ["--html", "--png"])
def test_an_output_that_cannot_be_written_is_one_message(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["bench.report", flag, str(tmp_path / "file" / "below")])
    with pytest.raises(SystemExit) as error:
        report.main()
    assert error.value.code == 2
    assert "cannot be written: " in capsys.readouterr().err


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The folder of result files of a repository whose counts.json has been committed three times, once broken."""
    results = tmp_path / "origin" / "bench" / "results"
    results.mkdir(parents=True)
    git(tmp_path / "origin", "init", "-q")
    for text in (counted(7), "{broken", counted(5)):
        (results / "counts.json").write_text(text)
        git(results, "add", ".")
        git(results, "commit", "-qm", "a figure")
    return results


def counted(calls: int) -> str:
    return json.dumps({"cases": {"small": {"aten_calls": {"add": calls}, "triton_launches": {"k": 2}}}})


def values(results: Path) -> list[float]:
    found: list[Any] = [chart for chart in charts(results) if chart.name == "history-counts"]
    return [point.value for point in found[0].series["small"]] if found else []


def test_the_history_is_what_commits_recorded(repository: Path) -> None:
    assert values(repository) == [9, 7]
    (repository / "counts.json").write_text(counted(3))
    assert values(repository) == [9, 7, 5]
    assert history.history(repository / "counts.json")[-1].commit == "uncommitted"
    assert history.what_is_missing(repository) == ""


def test_a_shallow_clone_says_what_is_missing(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{tmp_path / 'origin'}", "clone")
    results = tmp_path / "clone" / "bench" / "results"
    assert values(results) == [7]
    assert history.what_is_missing(results) == history.SHALLOW
    page.write_page(results, tmp_path / "page.html")
    assert "git fetch --unshallow" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("lacking", ["git", "repository"])
def test_without_git_there_are_todays_figures(
    lacking: str, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if lacking == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert values(repository) == [7]
    page.write_page(repository, tmp_path / "page.html")
    assert "No history: " in (tmp_path / "page.html").read_text()
