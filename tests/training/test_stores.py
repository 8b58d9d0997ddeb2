"""Checkpoints behind URLs: no death loses one, nothing is left, and what a URL lacks is said before any step."""

import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import fastdino
from fastdino import cli
from fastdino.config import ConfigError
from fastdino.engine.shards import Fragment
from fastdino.training import checkpoint
from fastdino.training.checkpoint import About, CheckpointError, Store, tensors
from fastdino.training.checkpoint.storage import Draft, Folder
from fastdino.training.export import export_run, run_backbone
from tests.training.test_checkpoint import read_weights, save
from tests.training.test_resume import config, half

FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "shared.safetensors")
WRITES = ("pipe_file", "rm_file", "open")


class Dead(BaseException):
    """The process is gone."""


class Deadly:
    """Ends the process before or after the n-th time that it changes a file system; n = 0 never."""

    def __init__(self, patch: pytest.MonkeyPatch, system: Any, at: int, after: bool) -> None:
        self.count, self._at, self._after = 0, at, after
        for name in WRITES:
            patch.setattr(system, name, self._deadly(getattr(system, name), name))

    def _deadly(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: str, *args: Any, **kwargs: Any) -> Any:
            if name == "open" and "wb" not in args:
                return original(path, *args, **kwargs)
            self.count += 1
            if self.count == self._at and not self._after:
                raise Dead
            done = original(path, *args, **kwargs)
            if self.count == self._at:
                raise Dead  # a file that was opened is there, and empty
            return done

        return call


def content(step: int, file: str) -> dict[str, torch.Tensor]:
    return {file: torch.full((100,), float(step))}


def write(store: Store, step: int) -> None:
    """A checkpoint of three files, as two ranks would write it."""
    draft = Draft(step, "x")
    written = [store.write(draft, file, lambda file=file: tensors.pieces(content(step, file))) for file in FILES]  # type: ignore[misc]
    pieces = {name: [("w", 0, 1)] for name, _ in written[:2]}
    manifest = checkpoint.Manifest(
        format=1, step=step, world_size=2, shapes={}, files=dict(written), pieces=pieces, meta={}
    )
    store.commit(draft, manifest.to_json())
    store.prune(2, keep_for_good=[1])


def newest(store: Store) -> int:
    """The step of the newest checkpoint, all of which is as it was written; 0 without one."""
    found = checkpoint.newest(store)
    for name in found.files if found else ():
        with store.open(found.step, name) as file:  # type: ignore[union-attr]
            (values,) = tensors.TensorFile(file, name).whole().values()
        assert (values == found.step).all()  # type: ignore[union-attr]
    return found.step if found else 0


@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_moment_loses_nothing_and_leaves_nothing(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = 0
    for at in itertools.count(1):
        url = f"memory://{tmp_path}/{at}"
        store, done = checkpoint.at(url, tmp_path), 0
        store.mark("note")
        store.unmark("note")
        with monkeypatch.context() as patch:
            deadly = Deadly(patch, fsspec.filesystem("memory"), at, after)
            try:
                for step in range(1, 7):
                    write(store, step)
                    done = step
            except Dead:
                deaths += 1
        found = newest(store)
        assert found >= done, f"death at {at} lost a checkpoint"
        for step in range(found + 1, 9):
            write(store, step)
        assert newest(store) == 8
        assert store.steps() == [1, 7, 8]
        system, root = fsspec.core.url_to_fs(url)
        assert sorted(Path(path).name[:8] for path in system.ls(f"{root}/data", detail=False)) == sorted(
            f"{step:08d}" for step in (1, 7, 8) for _ in FILES
        )
        if deadly.count < at:
            break
    assert deaths == at - 1 > 30


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_a_damaged_object_is_passed_over_and_written_anew(tmp_path: Path, damage: str, caplog: Any) -> None:
    store, system = checkpoint.at(f"memory://{tmp_path}", tmp_path), fsspec.filesystem("memory")
    write(store, 1)
    write(store, 2)
    victim = f"{tmp_path}/manifests/00000002.json"
    if damage != "manifest":
        victim = next(path for path in system.ls(f"{tmp_path}/data", detail=False) if "00000002-" in path)
    whole = system.cat_file(victim)
    if damage == "gone":
        system.rm_file(victim)
    else:
        system.pipe_file(victim, whole[:-3] if damage in ("cut", "manifest") else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert newest(store) == 1
    assert "00000002.json" in caplog.text
    write(store, 2)
    assert newest(store) == 2
    assert system.cat_file(victim) == whole


def test_objects_of_a_newer_format_are_left_alone(tmp_path: Path, caplog: Any) -> None:
    store, system = checkpoint.at(f"memory://{tmp_path}", tmp_path), fsspec.filesystem("memory")
    write(store, 1)
    path = f"{tmp_path}/manifests/00000001.json"
    system.pipe_file(path, json.dumps(json.loads(system.cat_file(path)) | {"format": 99}).encode())
    before = {*system.ls(f"{tmp_path}/data", detail=False)}
    write(store, 2)
    assert before < {*system.ls(f"{tmp_path}/data", detail=False)}
    assert "has format 99" in caplog.text


class Stream(io.BytesIO):
    """What comes over a connection."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise AssertionError("it cannot")


class OneWay(MemoryFileSystem):
    """A store without ranges: what is opened can only be read on."""

    protocol = "oneway"
    store: Any = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return Stream(self.cat_file(path)) if mode == "rb" else super().open(path, mode, **kwargs)


def test_a_store_without_ranges_is_read_through_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fsspec.register_implementation("oneway", OneWay, clobber=True)
    store = checkpoint.at("oneway://run", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    values = torch.arange(100.0)
    fragment = Fragment("w", 0, 100, tensors={"ema": values})
    save(store, About(3, {"w": [100]}, {}), lambda copy: [fragment], {"c": torch.ones(2)})
    weights, shared = read_weights(store, checkpoint.read_manifest(store, 3), {"w": [100]})
    assert torch.equal(weights["w"], values)
    assert torch.equal(shared["c"], torch.ones(2))
    assert not any(tmp_path.iterdir())


def test_a_run_whose_checkpoints_are_elsewhere(tmp_path: Path) -> None:
    """It resumes from there, to the bit; export finds it; and it does not begin anew where there is none."""
    url, run, system = f"memory://{tmp_path}/store", tmp_path / "run", fsspec.filesystem("memory")
    half(config(tmp_path, run__checkpoints=url, run__keep=1, run__keep_every=0))
    fastdino.train(config(tmp_path, run__checkpoints=url, run__epochs=3, run__keep=1, run__keep_every=0))
    left = sorted(path.removeprefix(f"{tmp_path}/store/") for path in system.find(f"{tmp_path}/store"))
    assert [re.sub("-[0-9a-f]{16}$", "", name) for name in left] == [
        "data/00000006-rank-00000", "data/00000006-shared", "manifests/00000006.json",
    ]  # fmt: skip
    assert not (run / "checkpoints").exists()
    assert run_backbone(run)[2] == 6
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are: 6"):
        export_run(run, step=7)
    for place in ("checkpoints", f"file://{tmp_path}/empty"):
        with pytest.raises(ConfigError, match=r"run.checkpoints was 'memory://.*/store' and is .*begin anew"):
            fastdino.train(config(tmp_path, run__checkpoints=place, run__epochs=3))
    found = run_backbone(run)[0].state_dict()
    fastdino.train(config(tmp_path / "plain", run__epochs=3))
    for name, value in run_backbone(tmp_path / "plain/run")[0].state_dict().items():
        assert torch.equal(value, found[name])


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    settings = config(tmp_path, run__checkpoints=f"file://{tmp_path}/large disk")
    fastdino.train(settings)
    assert Folder(tmp_path / "large disk").steps() == [2, 4]
    assert [path.name for path in (tmp_path / "large disk").iterdir() if path.name.startswith(".")] == []
    assert run_backbone(settings.run.dir)[2] == 4


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nosuch://bucket/run", "Protocol not known"),
        ("s3://bucket/run", "s3fs"),
        ("file:///proc/nothing/run", "cannot be written"),
        ("/proc/nothing/run", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_message(
    tmp_path: Path, place: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained or left."""
    monkeypatch.setattr("fastdino.training.trainer.Trainer.__init__", lambda *_: pytest.fail("it trains"))
    flags = ["--run.dir", str(tmp_path / "run"), "--run.checkpoints", place, "--engine.device", "cpu"]
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "demo", *flags])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdino train")]
    assert says in line
    assert "run.checkpoints" in line
    assert not (tmp_path / "run").exists()
