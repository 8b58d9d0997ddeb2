"""Where figures come from, and that they are not lost where that cannot be told."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, record
from bench.tables import form
from tests.bench.conftest import Python

CPU = torch.device("cpu")


@pytest.fixture(params=["no repository", "no git"])
def without_git(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    if request.param == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    record._printed.cache_clear()
    yield
    record._printed.cache_clear()


@pytest.mark.usefixtures("without_git")
def test_no_figure_is_lost_for_want_of_a_commit(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        where = record.provenance(CPU, "bench.x")
        assert (where["commit"], where["dirty"]) == ("unknown", None)
    assert form.state(where).startswith("commit unknown, ")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("git rev-parse: unknown, because ")


@pytest.mark.usefixtures("without_git")
def test_a_copy_without_git_is_told_its_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTDINO_COMMIT", "0" * 40)
    where = record.provenance(CPU, "bench.x")
    assert (where["commit"], where["dirty"]) == ("0" * 40, None)
    assert form.state(where).startswith("commit 000000000, ")
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("without_git")
def test_compare_needs_git_and_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.compare", "--base", "main"])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == 2, "1 would mean slower"
    assert "error: --base main: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare --base HEAD --rounds -3", "argument --rounds: '-3' is not a whole number above 0"),
        ("step --rounds 0", "argument --rounds: '0' is not a whole number above 0"),
        ("step --batch two", "argument --batch: 'two' is not a whole number above 0"),
        ("step --device gpu", "argument --device: 'gpu' is neither cuda nor cpu"),
        ("step --device cuda", "argument --device: torch sees no GPU here"),
        ("step --device cpu --arch vit_nano:0", "--arch: '0' is not a whole number above 0"),
        ("step --device cpu --arch vit_nanno", "--arch: model.arch='vit_nanno' must be one of vit_nano, "),
        ("kernels.__main__ --only koleo_loss --shape 2,x", "--shape 2,x: koleo_loss takes such as 2,64,"),
        ("kernels.attention --device cpu --shape 2y3", "--shape 2y3: such as 2x37+8x10"),
        ("kernels.ceilings --device cuda:1", "argument --device: torch sees no GPU here"),
        ("compare --base HEAD --device cpu:0", "argument --device: 'cpu:0' has a number: CUDA_VISIBLE_DEVICES chooses"),
        ("data --workers 0", "argument --workers: '0' is not a whole number above 0"),
        ("gates.first_step --blocks -1", "argument --blocks: '-1' is not a whole number above 0"),
        ("visit.step_profile vit_nano --device x", "argument --device: 'x' is neither cuda nor cpu"),
        ("visit.step_profile vit_nano vit_nano:x --device cpu", "ARCH: 'x' is not a whole number above 0"),
        ("visit.step_profile vit_nanno --device cpu", "ARCH: model.arch='vit_nanno' must be one of vit_nano, "),
        ("visit.launch_configs --rounds 0", "argument --rounds: '0' is not a whole number above 0"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *words = arguments.split()
    monkeypatch.setattr("sys.argv", [module, *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"bench.{module}").main()
    assert caught.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_driver_may_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    record._printed.cache_clear()
    assert record._driver(torch.device("cuda")) == "unknown"
    record._printed.cache_clear()


def test_a_child_finds_what_its_parent_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Python) -> None:
    (tmp_path / "only_on_the_path.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = (
        "from importlib.util import find_spec; "
        "print(*(find_spec(name).origin for name in ('only_on_the_path', 'bench', 'fastdino_kernels')))"
    )
    done = python("-c", code, fresh=True)
    ours = [str(record.ROOT / folder / "__init__.py") for folder in ("bench", "kernels/fastdino_kernels")]
    assert done.stdout.split() == [str(tmp_path / "only_on_the_path.py"), *ours], done.stderr


def test_kernels_write_their_file_without_git(tmp_path: Path, python: Python) -> None:
    out = tmp_path / "out.json"
    arguments = f"--only koleo_loss --shape 2,10,32 --rounds 3 --device cpu --no-compile --out {out}"
    done = python("-m", "bench.kernels", *arguments.split(), GIT_DIR=str(tmp_path / "none"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"commit": "unknown"' in out.read_text()
    assert "git rev-parse: unknown, because fatal: not a git repository" in done.stdout + done.stderr


def document(command: str, **entries: int) -> dict[str, Any]:
    where = {**record.provenance(CPU, "bench.x"), "command": command}
    return {"provenance": where, "cases": [{"name": name, "figure": figure} for name, figure in entries.items()]}


def test_a_part_takes_the_place_of_its_own_entries_alone(tmp_path: Path) -> None:
    path = tmp_path / "x-cpu.json"
    assert record.may_add(path, record.provenance(CPU, "bench.x")), "a part may come first"
    for part in (document("one", a=1, b=2), document("two", b=3), document("two", b=4)):
        record.add(path, part, lambda case: case["name"])
    found = json.loads(path.read_text())
    assert [(case["name"], case["figure"]) for case in found["cases"]] == [("a", 1), ("b", 4)]
    assert found["provenance"]["command"] == "one; two"
    assert record.may_add(path, record.provenance(CPU, "bench.x"))


def test_what_is_partial_takes_no_whole_entrys_place(tmp_path: Path) -> None:
    path = tmp_path / "x-cpu.json"
    for figure, partial in ((1, True), (2, True), (3, False), (4, True), (5, False), (6, True)):
        part = document("one", a=figure)
        if partial:
            part["cases"][0]["partial"] = True
        record.add(path, part, lambda case: case["name"])
    assert json.loads(path.read_text())["cases"] == [{"name": "a", "figure": 5}]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write_text = tmp_path / "x-cpu.json", Path.write_text
    record.write(path, {"cases": [1]})

    def killed(self: Path, text: str) -> None:
        write_text(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        record.write(path, {"cases": [1, 2]})
    assert json.loads(path.read_text()) == {"cases": [1]}


@pytest.mark.parametrize("key", ["device", "driver", "threads", "versions", "sources"])
def test_figures_of_different_origin_are_not_mixed(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = record.provenance(CPU, "bench.x")
    record.write(tmp_path / "x-cpu.json", {"provenance": {**now, key: "another"}})
    assert not record.may_add(tmp_path / "x-cpu.json", now)
    assert f"x-cpu.json is of other {key} and stays as it is" in capsys.readouterr().out


def test_sources_are_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "kernels" / "a").mkdir(parents=True)
    seen = [record._sources()]
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", ""), ("c.h", ""), ("b.txt", "no code")):
        (tmp_path / "kernels" / "a" / name).write_text(text)
        seen.append(record._sources())
    assert len(set(seen)) == 5
    assert seen[4] == seen[5]


PARTS = """
import json, sys
import torch
from pathlib import Path
from typing import Any
from bench.kernels import __main__ as kernels
from bench.kernels.measure import BENCHES, ROUNDS
for name, shape in (("koleo_loss", "2,10,32"), ("segment_squares", "5,400")):
    BENCHES[name].shapes["cpu"] = [shape]
path = Path(sys.argv[1])
kernels.result_path = lambda bench, device: path
torch._dynamo.config.disable = True  # compiling is slow
for ROUNDS["cpu"], arguments in json.loads(sys.argv[2]):
    sys.argv[1:] = ["--device", "cpu", "--only", *arguments]
    assert kernels.main() == 0
"""


def test_kernels_in_parts(tmp_path: Path, python: Python) -> None:
    path = tmp_path / "kernels-cpu.json"
    runs = [
        (3, ["koleo_loss"]),
        (3, ["segment_squares"]),
        (4, ["koleo_loss"]),
        (3, ["segment_squares", "--rounds", "5"]),  # not the usual rounds: measured, and not added
    ]
    done = python("-c", PARTS, str(path), json.dumps(runs))
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = {case["operation"]: case["rounds"] for case in json.loads(path.read_text())["cases"]}
    assert rounds == {"segment_squares": 3, "koleo_loss": 4}
    assert [file.name for file in tmp_path.iterdir()] == ["kernels-cpu.json"]
