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


# ---------------------------------------------------------------------------------------------------------- requeue


def ended(folder: Path, code: int, checkpoint: int | None = 40, reason: str = "") -> None:
    """The file of a start of its own that came to an end; of one that was killed where ``code`` is -9."""
    kept = Status(folder, 50, 200, 4)
    kept.tell(checkpoint=checkpoint)
    kept._write()
    if code != -9:
        kept.end(code, reason)
    gone = {} if code != -9 else {"pid": 2**22 + 1, "started": "1"}
    change(folder, time=written(folder)["time"] + code, **gone)


def asked(folder: Path, capsys: Any) -> tuple[int, str]:
    """Exit code of the command, and the line that it prints."""
    with pytest.raises(SystemExit) as exited:
        cli.main(["status", "--requeue", str(folder)])
    (line,) = capsys.readouterr().out.splitlines()
    return exited.value.code, line.removeprefix(f"{folder}: ")


@pytest.mark.parametrize(
    ("code", "says"),
    [(0, "finished"), (2, "failed (2) data.root holds 7 images"), (130, "stopped (130)")],
)
def test_a_run_that_is_done_or_has_to_be_mended_is_left_alone(folder, capsys, code, says):
    for _ in range(2):
        ended(folder, code, reason="data.root holds 7 images\nand more" if code == 2 else "")
        assert asked(folder, capsys) == (1, f"do not start it again: {says}")
    assert not list(folder.glob(".restarts*"))


def test_a_run_that_was_preempted_is_started_again_and_again(folder, capsys):
    for number in range(8):
        ended(folder, 85, reason="stopped by a signal at step 50")
        change(folder, time=number)
        assert asked(folder, capsys) == (0, "start it again: preempted (85) stopped by a signal at step 50")


@pytest.mark.parametrize("code", [1, 86, 143, -9])
def test_what_fails_is_started_three_times_at_a_checkpoint(folder, capsys, code):
    state = {1: "failed (1) boom", 86: "hung (86) boom", 143: "failed (143) boom", -9: "killed"}[code]
    for checkpoint in (None, 40, 60):
        since = "at the start" if checkpoint is None else f"at the checkpoint of step {checkpoint}"
        for start in range(1, 5):
            ended(folder, code, checkpoint, "boom")
            change(folder, time=start)
            what = f"{state}; start {start} of 3 {since}" if start < 4 else f"{state}; 3 starts {since} came no further"
            assert asked(folder, capsys) == (
                (0, f"start it again: {what}") if start < 4 else (1, f"do not start it again: {what}")
            )


@pytest.mark.parametrize("code", [85, 1])
def test_a_start_that_never_begins_is_not_taken_for_the_one_before(folder, capsys, code):
    """It ends, with any code, before it writes a status: the file goes on saying what was."""
    ended(folder, code)
    found = [asked(folder, capsys) for _ in range(6)]
    assert [code for code, _ in found].count(0) == (4 if code == 85 else 3)
    assert found[-1] == (
        1,
        "do not start it again: ended before it began to train; 3 starts at the checkpoint of step 40 came no further",
    )


def test_a_run_without_a_status_is_started_three_times(folder, capsys):
    assert [asked(folder, capsys)[0] for _ in range(5)] == [0, 0, 0, 1, 1]


def test_a_run_that_goes_on_is_left_alone(folder, capsys):
    with Status(folder, 10, 200, 4):
        assert asked(folder, capsys) == (1, f"do not start it again: it goes on: process {os.getpid()}")


def test_hosts_count_on_their_own_and_believe_who_saw_the_end(folder, capsys, monkeypatch):
    """Each host of a torchrun has a loop: rank 0 of another one cannot be asked, and one end is one start for each."""
    ended(folder, -9)
    change(folder, host="gpu001")
    for host in ("gpu002", "gpu003"):
        monkeypatch.setattr(status.socket, "gethostname", lambda host=host: host)
        assert asked(folder, capsys) == (0, "start it again: running; start 1 of 3 at the checkpoint of step 40")


def test_what_cannot_be_counted_is_not_started(folder, capsys):
    ended(folder, 1)
    (folder / f".restarts-{status.socket.gethostname()}.json.partial").mkdir()
    with pytest.raises(SystemExit) as exited:
        cli.main(["status", str(folder), "--requeue"])
    assert exited.value.code == 2
    assert "cannot be written: Is a directory. Restarts are counted there" in capsys.readouterr().err


def test_a_count_that_is_none_begins_anew(folder, capsys):
    ended(folder, 1)
    for text in ("", "[]", "{"):
        (folder / f".restarts-{status.socket.gethostname()}.json").write_text(text)
        assert "start 1 of 3" in asked(folder, capsys)[1]
