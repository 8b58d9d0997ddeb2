"""Metrics: no disk ends a run, no line is half written, and a run says early how long it will take."""

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastdino.training import metrics
from fastdino.training.metrics import Metrics, about


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
@pytest.mark.parametrize("place", ["metrics.jsonl", "tensorboard"])
def test_a_disk_that_refuses_is_warned_of_once(tmp_path, monkeypatch, caplog, number, place):
    def refuse(*_: object) -> None:
        raise OSError(number, "the disk says no")

    written = Metrics(tmp_path, 0, 10, 8)
    written.write(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        if place == "tensorboard":
            patch.setattr(written._board, "flush", refuse)
        else:
            patch.setattr(metrics, "_append", refuse)
        written.write(2, {"loss": 2.0})
        written.write(3, {"loss": 3.0})
    written.write(4, {"loss": 4.0})
    written.close()
    assert caplog.text.count("the disk says no") == 1
    assert [line["step"] for line in lines(tmp_path)] == ([1, 2, 3, 4] if place == "tensorboard" else [1, 4])
    assert written.last["loss"] == 4.0


def test_a_line_for_which_there_is_no_room_is_not_begun(tmp_path):
    """A device with 20 bytes left, as the limit of a file's size."""
    import resource
    import signal

    path = tmp_path / "metrics.jsonl"
    metrics._append(path, b"x" * 90 + b"\n")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (110, before[1][1]))
        with pytest.raises(OSError, match="No space"):
            metrics._append(path, b"y" * 50 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert path.read_bytes() == b"x" * 90 + b"\n"


BROKEN = [b'{"step": 2, "lo', b"17", b'["step"]', b"null", b"\xff\xfe\x00", b'{"loss": 1}', b'{"step": "2"}']


@pytest.mark.parametrize("broken", [*BROKEN, b"\0" * 40, b"[" * 100000], ids=lambda line: repr(line)[:16])
def test_lines_that_are_not_whole_are_dropped(tmp_path, caplog, broken):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.5}\n' + broken + b'\n{"step": 7, "loss": 9}')
    Metrics(tmp_path, 3, 10, 8).close()
    assert lines(tmp_path) == [{"step": 1, "loss": 1.5}]
    assert "dropped 1 lines" in caplog.text


def test_the_file_is_replaced_not_rewritten(tmp_path, monkeypatch):
    """A power cut while lines are dropped leaves all of them."""
    path, content = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 1.5}\n{"step": 7, "loss": 9}\n'
    path.write_bytes(content)

    class Cut(BaseException):
        pass

    def cut(*_: object) -> None:
        raise Cut

    monkeypatch.setattr(metrics.os, "replace", cut)
    with pytest.raises(Cut):
        Metrics(tmp_path, 3, 10, 8)
    assert path.read_bytes() == content


def test_last_values_are_those_of_the_steps_kept(tmp_path):
    text = '{"step": 1, "loss": 3}\n{"step": 2, "knn": 50}\n{"step": 2, "loss": 2}\n{"step": 9, "loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = Metrics(tmp_path, 2, 10, 8)
    found.close()
    assert (found.last["loss"], found.last["knn"]) == (2, 50)


def said(seconds: list[float], total: int, compiles: bool, folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level(logging.INFO)
    told = Metrics(folder, 0, total, 8, compiles=compiles)
    for step, taken in enumerate(seconds, 1):
        told.advance(step, taken, waited=0.5)
    told.close()
    return [record.getMessage() for record in caplog.records]


def test_the_first_step_tells_how_long_the_run_takes(tmp_path, caplog):
    (line,) = said([12.3, 12.0, 2.0], 3000, False, tmp_path, caplog)
    assert line == "step 1 took 12.3 s, 0.5 s of it waiting for images: about 10 hours for the 2999 steps to the end"


def test_a_first_step_that_compiles_is_no_measure(tmp_path, caplog):
    first, second = said([90.0, 0.25, 0.25], 3000, True, tmp_path, caplog)
    assert "about" not in first
    assert second == "step 2 took 0.25 s: about 12 minutes for the 2998 steps to the end"


def test_a_slow_first_step_is_corrected(tmp_path, caplog):
    first, second = said([90.0, 9.0, 9.0], 100, False, tmp_path, caplog)
    assert "about 2 hours" in first
    assert "about 15 minutes" in second


def test_a_run_of_weeks_says_what_to_lower(tmp_path, caplog):
    _, alarm = said([60.0, 60.0, 60.0], 10**6, False, tmp_path, caplog)
    assert "train for 99 weeks" in alarm
    assert "views.num_local" in alarm
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"),
    (7200, "2 hours"), (4 * 86400, "4 days"), (15 * 86400, "2 weeks"), (900 * 86400, "2 years")])  # fmt: skip
def test_durations(seconds, text):
    assert about(seconds) == text


def test_a_long_silence_is_broken(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    told = Metrics(tmp_path, 0, 100, 8)
    told._bar.disable = True
    monkeypatch.setattr(metrics, "SILENCE", 0.0)
    told.advance(7, 1.0, 0.0)
    told.close()
    assert "step 7 of 100" in caplog.text


def reported(meter: dict[str, float] | None, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The line of a report of three losses, in a run of 200,000 steps that may know its devices."""
    caplog.set_level(logging.INFO)
    paces: list[float] = []

    def measure(images_per_second: float) -> dict[str, float]:
        paces.append(images_per_second)
        return meter or {}

    told = Metrics(folder, 0, 200_000, 1024, meter=measure)
    told._bar.disable = True
    told._clock.started -= 0.5
    losses = {"loss": 10.123, "loss_dino": 9.5, "loss_ibot": 8.25, "loss_koleo": -1.5, "patch_cos": 0.25}
    values = told.report(1, losses)
    told.close()
    assert paces == [values["images_per_second"]]
    return caplog.records[-1].getMessage()


def test_a_line_has_what_the_devices_make_of_the_pace(tmp_path, caplog):
    """On 8 GPUs, and with all losses: still on one line of a terminal of 160 columns."""
    meter = {"images_per_second_per_device": 253.9, "mfu": 0.414, "peak_memory_gb": 12.34}
    line = reported(meter, tmp_path, caplog)
    assert "img/s 20" in line
    assert "(254 each)  data 0%  mfu 41%  mem 12.3G  eta" in line
    assert len(line) <= 160
    assert meter.items() <= lines(tmp_path)[0].items()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("mfu")[0].value == pytest.approx(0.414)
    assert events.Scalars("peak_memory_gb")[0].value == pytest.approx(12.34)


def test_a_line_has_nothing_that_is_not_known(tmp_path, caplog):
    line = reported({"peak_memory_gb": 0.75}, tmp_path, caplog)
    assert "mem 0.8G" in line
    assert "mfu" not in line
    assert "each" not in line
    assert "mfu" not in lines(tmp_path)[0], "absent, not 0"


def test_one_device_has_one_pace(tmp_path, caplog):
    told = Metrics(tmp_path, 0, 10, 8, meter=lambda pace: {"images_per_second_per_device": pace})
    caplog.set_level(logging.INFO)
    told._bar.disable = True
    told.report(1, {"loss": 1.0})
    told.close()
    assert "each" not in caplog.records[-1].getMessage()
    assert "images_per_second_per_device" in lines(tmp_path)[0]
