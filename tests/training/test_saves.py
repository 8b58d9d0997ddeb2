"""Saves beside the steps: what is saved is of its step; who waits for whom; what a disk that refuses costs."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdino
from fastdino.config import Config, ConfigError, RunConfig
from fastdino.distributed import Ranks
from fastdino.engine.shards import Fragment
from fastdino.training import checkpoint, trainer
from fastdino.training.checkpoint import About, CheckpointError, Folder, Saves, storage
from fastdino.training.checkpoint import saves as saves_module
from fastdino.training.run_folder import RunFolder
from tests.children import forked
from tests.training.test_checkpoint import read_weights
from tests.training.test_resume import config
from tests.training.test_trainer import losses, state

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
SIZE = 1000


def save(saves: Saves, step: int, values: torch.Tensor, **how: bool) -> None:
    about = About(step, {"w": [SIZE]}, {})
    saves.save(
        about, lambda copy: [Fragment("w", 0, SIZE, tensors={"ema": copy(values)})], {"c": values[:3]},
        **{"last": False, **how},
    )  # fmt: skip


def read(folder: Path, step: int) -> torch.Tensor:
    store = Folder(folder)
    weights, shared = read_weights(store, checkpoint.read_manifest(store, step), {"w": [SIZE]})
    assert torch.equal(shared["c"], weights["w"][:3])
    return weights["w"]


class Disk:
    """Writes are held back until ``open`` is set, and refused at the steps in ``bad``; who wrote is noted."""

    def __init__(self) -> None:
        self.open, self.bad, self.threads = threading.Event(), set[int](), set[str]()
        self._copied = storage.copied

    def copied(self, content: Any, file: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        assert self.open.wait(60)
        if int(Path(file.name).parent.name.split("-")[1]) in self.bad:
            raise OSError(28, "No space left on device")
        return self._copied(content, file)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(storage, "copied", disk.copied)
    yield disk
    disk.open.set()


def test_what_is_saved_is_of_its_step_and_no_write_is_waited_for(tmp_path: Path, disk: Disk) -> None:
    """Steps go on, and change every value, before the first byte is written."""
    saves, values = Saves(Folder(tmp_path), ALONE, 3, lambda step: None), torch.arange(float(SIZE))
    save(saves, 1, values)
    for _ in range(3):
        values.add_(1000.0)
        saves.advance(*saves.flags)
    assert saves.flags == (True, False)
    assert Folder(tmp_path).steps() == []
    disk.open.set()
    saves.finish()
    assert torch.equal(read(tmp_path, 1), torch.arange(float(SIZE)))
    assert disk.threads == {"checkpoint"}
    assert saves.newest_step == 1


def test_a_second_save_waits_and_is_counted(tmp_path: Path, disk: Disk, caplog: Any, monkeypatch: Any) -> None:
    told: list[int] = []
    monkeypatch.setattr(saves_module, "LONG", 0.1)
    saves, values = Saves(Folder(tmp_path), ALONE, 3, told.append), torch.zeros(SIZE)
    save(saves, 1, values)
    values.fill_(2.0)
    threading.Timer(0.3, disk.open.set).start()
    save(saves, 2, values, last=True)
    assert (saves.waits, told) == (1, [1, 2])
    assert "until checkpoint 1 was written: save less often" in caplog.text
    assert saves.figures()["checkpoint_stall_s"] > 0.2
    assert saves.figures()["checkpoint_stall_s"] == 0, "since the last call"
    assert [float(read(tmp_path, step)[5]) for step in (1, 2)] == [0.0, 2.0]
    save(saves, 2, values, last=True)
    assert told == [1, 2], "a step is saved once"


def test_a_failed_save_is_told_and_the_next_one_tried(tmp_path: Path, disk: Disk, caplog: Any) -> None:
    disk.bad = {2, 3, 5, 6, 7}
    disk.open.set()
    saves, values = Saves(Folder(tmp_path), ALONE, 9, lambda step: None), torch.zeros(SIZE)
    for step in range(1, 7):
        save(saves, step, values, wait=True)
    assert Folder(tmp_path).steps() == [1, 4]
    assert saves.figures()["failed_saves"] == 4
    assert "step-00000003 (rank 0: [Errno 28] No space left on device). Older checkpoints are whole" in caplog.text
    assert "the run ends when 1 more saves in a row fail" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(CheckpointError, match="step-00000007"):
        save(saves, 7, values, wait=True)


def test_the_last_save_has_to_succeed(tmp_path: Path, disk: Disk) -> None:
    disk.bad = {1}
    disk.open.set()
    with pytest.raises(CheckpointError, match="step-00000001"):
        save(Saves(Folder(tmp_path), ALONE, 3, lambda step: None), 1, torch.zeros(SIZE), last=True)


def test_a_commit_that_fails_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"rank 0: .*Read-only file system"):
        save(Saves(Folder(tmp_path), ALONE, 3, lambda step: None), 1, torch.zeros(SIZE), last=True)
    assert not any(tmp_path.iterdir())


def test_an_error_of_another_kind_in_the_thread_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "copied", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="rank 0: ZeroDivisionError"):
        save(Saves(Folder(tmp_path), ALONE, 3, lambda step: None), 1, torch.zeros(SIZE), last=True)


def test_a_run_resumes_to_the_bit_from_what_was_written_while_it_went_on(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 2 is written when step 3 is done; Ctrl-C in step 4 ends the run, which goes on from 2."""
    original, seen = trainer.Trainer.train_step, []

    def train_step(self: trainer.Trainer, batches: Any) -> Any:
        if self.step == 3:
            seen.append(Folder(tmp_path / "stopped/run/checkpoints").steps())
            disk.open.set()
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            fastdino.train(config(tmp_path / "stopped", run__epochs=3))
    assert seen == [[]]
    assert Folder(tmp_path / "stopped/run/checkpoints").steps() == [2], "who leaves alone waits for what is written"
    for name in ("stopped", "straight"):
        fastdino.train(config(tmp_path / name, run__epochs=3))
    expected, found = (state(tmp_path / name / "run", 6) for name in ("straight", "stopped"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert losses(tmp_path / "stopped/run") == losses(tmp_path / "straight/run")


def test_figures_of_saves_are_in_the_metrics(tmp_path: Path) -> None:
    fastdino.train(config(tmp_path, run__epochs=3))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["checkpoint_stall_s"] >= 0 for line in lines)
    assert lines[1]["checkpoint_stall_s"] == 0 < lines[2]["checkpoint_stall_s"], "the copy after step 2"
    assert lines[5]["checkpoint_write_s"] > 0


def test_a_run_that_diverges_finishes_what_it_was_writing(tmp_path: Path, disk: Disk) -> None:
    """Its last good step is worth more than the time."""
    threading.Timer(0.2, disk.open.set).start()
    settings = config(tmp_path, run__epochs=3, run__max_nonfinite=1, run__save_every=1)
    original = trainer.Trainer._normalized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer.Trainer, "_normalized",
            lambda self, batch: original(self, batch).each(lambda x: x * torch.nan if self.step == 2 else x),
        )  # fmt: skip
        with pytest.raises(trainer.TrainingDiverged):
            fastdino.train(settings)
    assert Folder(tmp_path / "run/checkpoints").steps() == [2]


# --------------------------------------------------------------------------------------------------- two ranks


def two(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What happens on one of two ranks; the case by its name."""
    import logging
    import resource
    import signal
    import time

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastdino").addHandler(handler)
    saves, values = Saves(Folder(folder), ranks, 99, lambda step: None), torch.full((SIZE,), float(ranks.rank))
    half = SIZE // 2

    def begin(step: int, last: bool = False) -> None:
        part = (ranks.rank * half, (ranks.rank + 1) * half)
        about = About(step, {"w": [SIZE]}, {})
        fragments = lambda copy: [Fragment("w", *part, tensors={"ema": copy(values[slice(*part)])})]  # noqa: E731
        saves.save(about, fragments, {"c": torch.zeros(3)}, last=last)

    def steps_until(done: Callable[[], bool]) -> int:
        """Steps in which the ranks tell each other what they know, as in a training."""
        for number in range(1, 10000):
            asked = ranks.ask(*saves.flags)
            time.sleep(0.002)
            saves.advance(*asked())
            if done():
                return number
        raise AssertionError("no end")

    found: dict[str, Any] = {}
    original = storage.copied

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2 * ranks.rank)
        return original(*arguments)

    storage.copied = slow
    begin(1)
    found["steps beside a write"] = steps_until(lambda: saves.newest_step == 1)
    begin(2)
    begin(3, last=True)
    found["waits"] = saves.waits
    # A limit on the size of a file stands for the full disk of one rank.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if on and ranks.rank == 1 else limits[1], limits[1]))

    limit(True)
    begin(4)
    steps_until(lambda: saves.failed == 1)
    found["after a failure"] = [path.name for path in folder.iterdir() if path.name.startswith(".writing-00000004")]
    found["said"] = [line for line in said if "step-00000004" in line]
    limit(False)
    begin(5, last=True)
    limit(True)
    ends = []
    for step in (6, 7, 8):
        try:
            begin(step)
            steps_until(lambda: saves.flags == (False, False) and saves._saver.step is None)
        except CheckpointError as error:
            ends.append((step, str(error)))
    limit(False)
    begin(9)
    if ranks.rank == 1:  # as one that a signal ends, alone
        saves.leave()
    found["ends"] = ends
    try:
        RunFolder(Config(run=RunConfig(dir=folder.parent / "run", checkpoints="memory://run")), ranks).__enter__()
    except ConfigError as error:
        found["memory"] = str(error)
    ranks.barrier()
    if ranks.rank == 0:
        saves.leave()
    found["steps"] = Folder(folder).steps()
    found["left"] = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return found


def main(folder: Path) -> None:
    from fastdino import distributed

    with distributed.init("cpu") as ranks:
        found = two(ranks, folder / "checkpoints")
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    done = forked(main, folder, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert torch.equal(read(folder / "checkpoints", 1), torch.arange(2.0).repeat_interleave(SIZE // 2))
    return found


def test_ranks_commit_at_the_same_step_though_one_is_slow(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["steps beside a write"] == ranks[1]["steps beside a write"] > 10
    assert [found["waits"] for found in ranks] == [1, 1]


def test_the_full_disk_of_one_rank_costs_nothing_but_that_save(ranks: list[dict[str, Any]]) -> None:
    assert [found["after a failure"] for found in ranks] == [[], []]
    assert "rank 1: [Errno 27] File too large" in ranks[0]["said"][0]
    assert ranks[1]["said"] == []
    assert all(set(found["steps"]) == {1, 2, 3, 5} for found in ranks)


def test_three_in_a_row_end_the_run_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["ends"] == ranks[1]["ends"]
    (step, message), = ranks[0]["ends"]  # fmt: skip
    assert step == 8
    assert "could not write checkpoint" in message
    assert "rank 1: " in message


def test_a_store_that_the_ranks_do_not_share_is_refused(ranks: list[dict[str, Any]]) -> None:
    """The memory of a process, or a folder of one host."""
    for found in ranks:
        assert "'memory://run' is not one place for all ranks: rank 1 on " in found["memory"]


def test_a_rank_that_leaves_alone_leaves_no_draft(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["left"] == []
