"""status.json: what a run says of itself, and what is told of one that says nothing any more."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastdino import cli, status
from fastdino.config import ConfigError, UserError
from fastdino.status import Status, describe, read
from fastdino.training.preemption import Preempted
from tests.children import environment, wait_for


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def change(folder: Path, **values: Any) -> None:
    (folder / "status.json").write_text(json.dumps(written(folder) | values))


def test_a_running_run_says_where_it_is(folder):
    with Status(folder, 10, 200, 4) as kept:
        pace = {"images_per_second": 64.5, "step_seconds": 0.5, "eta_seconds": 7320.0, "loss": 3.0}
        kept.tell(step=12, step_time=written(folder)["time"], checkpoint=10, **pace)
        kept._write()
        found = read(folder, clock=lambda: written(folder)["time"] + 40)
        assert written(folder).keys() == set(status.FIELDS)
        assert [found[k] for k in ("state", "step", "steps", "checkpoint", "pid", "age")] == [
            "running", 12, 200, 10, os.getpid(), 40,
        ]  # fmt: skip
        first, *rest = describe(folder, found).splitlines()
        assert first == f"{folder}: running, process {os.getpid()} on {found['host']}, 4 ranks"
        assert rest == [
            "step 12 of 200, the last one 40 s ago, 64 images/s, 2 h 2 min to go",
            "newest checkpoint: step 10",
        ]
    assert not [thread for thread in threading.enumerate() if thread.name == "status"]


def test_it_is_written_on_while_no_step_ends(folder, monkeypatch):
    """A step that takes an hour: the process lives, and says so."""
    monkeypatch.setattr(status, "EVERY", 0.05)
    with Status(folder, 0, 10, 1):
        before = written(folder)["time"]
        wait_for(lambda: written(folder)["time"] > before)


@pytest.mark.parametrize(
    ("error", "state", "code", "says"),
    [
        (None, "finished", 0, ""),
        (Preempted("stopped by a signal at step 7"), "preempted", 85, "stopped by a signal at step 7"),
        (UserError("no images"), "failed", 2, "no images"),
        (RuntimeError("peer is gone"), "failed", 1, "RuntimeError: peer is gone"),
        (KeyboardInterrupt(), "stopped", 130, "Ctrl-C"),
    ],
)
def test_the_end_is_told(folder, error, state, code, says):
    kept = Status(folder, 7, 10, 1).__enter__()
    kept.__exit__(type(error) if error else None, error, None)
    found = read(folder)
    assert (found["state"], found["exit"], found["reason"]) == (state, code, says)
    assert f"{folder}: {state}, 0 s ago" in describe(folder, found)
    assert says in describe(folder, found) or state == "preempted"


def test_a_hang_is_what_counts_of_several_ends(folder):
    kept = Status(folder, 7, 10, 1).__enter__()
    kept.end(86, "rank 1 made no progress")
    kept.__exit__(RuntimeError, RuntimeError("connection closed by peer"), None)
    assert read(folder)["state"] == "hung"


def test_a_killed_run_is_told_from_a_running_one(folder):
    """At once, on its own host; elsewhere by its silence."""
    code = f"""
import time
from pathlib import Path
from fastdino.status import Status
with Status(Path({str(folder)!r}), 3, 10, 1):
    print("ready", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert read(folder)["state"] == "running"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    found = read(folder)
    assert (found["state"], written(folder)["state"]) == ("killed", "running")
    assert "gone without a word" in describe(folder, found)
    for elsewhere in ({"host": "gpu003"}, {"namespace": 1}):  # a container that shares the name of its host
        change(folder, **elsewhere)
        assert read(folder, clock=lambda: written(folder)["time"] + 60)["state"] == "running"
        silent = read(folder, clock=lambda: written(folder)["time"] + 300)
        assert silent["state"] == "silent"
        assert "the run has stopped talking: its last word is 5 min 0 s ago" in describe(folder, silent)


def test_a_process_that_has_the_folder_is_starting(folder):
    """A run that was preempted is started again: until it trains, the file is that of the process before."""
    kept = Status(folder, 7, 10, 1).__enter__()
    kept.__exit__(Preempted, Preempted("a signal"), None)
    holder = {"host": "gpu003", "pid": 7, "started": "1", "since": "noon"}
    (folder / ".lock").write_text(json.dumps(holder))
    found = read(folder)
    assert found["state"] == "starting"
    assert "process 7 on gpu003 has the folder, since noon" in describe(folder, found)
    (folder / ".lock").write_text(json.dumps(holder | {"host": written(folder)["host"]}))  # where it would be seen
    assert read(folder)["state"] == "preempted"


def test_a_run_without_a_status(folder):
    assert read(folder)["state"] == "unknown"
    assert "unknown, no status.json" in describe(folder, read(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": "running"}', "null"])
def test_a_status_that_is_none_is_refused(folder, text):
    (folder / "status.json").write_text(text)
    with pytest.raises(ConfigError, match=r"status.json cannot be read: .* writes it anew"):
        read(folder)


def test_the_command(folder, capsys):
    with Status(folder, 10, 200, 4):
        cli.main(["status", str(folder)])
        assert capsys.readouterr().out.startswith(f"{folder}: running, ")
        cli.main(["status", str(folder), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert (found["state"], found["step"]) == ("running", 10)


@pytest.mark.parametrize(
    ("path", "says"),
    [("no/such", "does not exist"), ("file", "is no folder"), ("empty", "has no config.json"), ("", "the following")],
)
def test_a_folder_that_is_no_run_is_one_message(tmp_path, monkeypatch, capsys, path, says):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", *([path] if path else [])])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err or not path


def test_the_command_needs_no_torch(folder):
    code = (
        f"import sys; from fastdino.cli import main; main(['status', {str(folder)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_disk_that_refuses_changes_nothing(tmp_path):
    with Status(tmp_path / "gone", 0, 10, 1) as kept:
        kept.tell(step=1)


def test_a_full_disk_leaves_the_file_before_alone(folder, monkeypatch):
    with Status(folder, 3, 10, 1) as kept:
        before = written(folder)
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        kept.tell(step=4)
    assert written(folder) == before
    assert not (folder / ".status.json").exists()
