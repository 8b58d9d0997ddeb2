"""Where figures come from, and that they are not lost where that cannot be told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import compare, record, report

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
    assert report._state(where).startswith("commit unknown, ")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("git rev-parse: unknown, because ")


@pytest.mark.usefixtures("without_git")
def test_compare_needs_git_and_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.compare", "--base", "main"])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == 2, "1 would mean slower"
    assert "error: --base main: " in capsys.readouterr().err


def test_the_driver_may_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    record._printed.cache_clear()
    assert record._driver(torch.device("cuda")) == "unknown"
    record._printed.cache_clear()


def test_kernels_write_their_file_without_git(tmp_path: Path) -> None:
    """pytest-benchmark asks git too."""
    out = tmp_path / "out.json"
    arguments = f"--only center_mean --shape 2,3,100 --rounds 3 --device cpu --no-compile --out {out}"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{record.ROOT}:{record.ROOT / 'kernels'}", "GIT_DIR": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", *arguments.split()],
        cwd=record.ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"commit": "unknown"' in out.read_text()
    assert "git rev-parse: unknown, because fatal: not a git repository" in done.stdout + done.stderr
