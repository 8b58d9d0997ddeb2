"""Checkpoints: whole or not there, whatever dies when; the same values for any split; clear words for damage."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdino.distributed import Ranks
from fastdino.engine.shards import Fragment
from fastdino.training import checkpoint
from fastdino.training.checkpoint import About, CheckpointError, Folder, Manifest, Saves, Store, storage, tensors
from fastdino.training.checkpoint.snapshot import Source
from tests.children import forked, python

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
SHAPES = {"head.v": [7, 5], "head.b": [11]}


def parts(flat: dict[str, torch.Tensor], bounds: list[int]) -> list[Fragment]:
    """Fragments of one flat shard per kind, cut at ``bounds`` of the concatenated parameters."""
    offset, out = 0, []
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        edges = sorted({0, size, *(b - offset for b in bounds if 0 < b - offset < size)})
        for start, stop in itertools.pairwise(edges):
            views = {kind: buffer[offset + start : offset + stop] for kind, buffer in flat.items()}
            out.append(Fragment(name, start, stop, tensors=views))
        offset += size
    return out


def random_flat() -> dict[str, torch.Tensor]:
    return {kind: torch.randn(46) for kind in ("param", "exp_avg", "exp_avg_sq", "ema")}


def save(store: Store, about: About, fragments: Source, shared: dict[str, torch.Tensor], keep: int = 99) -> None:
    """Writes a checkpoint, whole or not at all."""
    Saves(store, ALONE, keep, lambda step: None).save(about, fragments, shared, last=True)


def read_weights(
    store: Store, manifest: Manifest, shapes: dict[str, list[int]], kind: str = "ema"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network's weights by name, and the tensors that all ranks share."""
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    wholes = [Fragment(name, 0, x.numel(), tensors={kind: x.view(-1)}) for name, x in weights.items()]
    return weights, checkpoint.load(store, manifest, wholes, shapes)


def write(folder: Path, step: int, flat: dict[str, torch.Tensor], bounds: list[int]) -> Path:
    shared, meta = {"center": torch.arange(3.0)}, {"epoch": 2, "note": "x"}
    about = About(step, SHAPES, meta)
    save(Folder(folder), about, lambda copy: parts({kind: copy(x) for kind, x in flat.items()}, bounds), shared)
    return folder / f"step-{step:08d}"


def newest(folder: Path) -> Manifest:
    """Of a folder that has a whole checkpoint."""
    found = checkpoint.newest(Folder(folder))
    assert found is not None
    return found


@pytest.mark.parametrize("read_bounds", [[], [35], [10, 20, 40], [1]])
@pytest.mark.parametrize("write_bounds", [[], [35], [17, 36]])
def test_loads_with_any_split(tmp_path, write_bounds, read_bounds):
    saved, loaded = random_flat(), {kind: torch.full((46,), torch.nan) for kind in random_flat()}
    write(tmp_path, 5, saved, write_bounds)
    store, manifest = Folder(tmp_path), newest(tmp_path)
    assert (manifest.step, manifest.meta) == (5, {"epoch": 2, "note": "x"})
    shared = checkpoint.load(store, manifest, parts(loaded, read_bounds), SHAPES)
    assert torch.equal(shared["center"], torch.arange(3.0))
    for kind in saved:
        assert torch.equal(saved[kind], loaded[kind]), kind
    assert torch.equal(read_weights(store, manifest, SHAPES)[0]["head.v"], saved["ema"][:35].view(7, 5))


def test_no_checkpoint(tmp_path):
    assert checkpoint.newest(Folder(tmp_path / "checkpoints")) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damaged_newest_falls_back_to_the_one_before(tmp_path, damage, caplog):
    older, newer = write(tmp_path, 1, random_flat(), []), write(tmp_path, 2, random_flat(), [])
    victim = newer / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[:-1])
    elif damage == "flip":
        content[-3] ^= 1
        victim.write_bytes(content)
    elif damage == "remove":
        victim.unlink()
    else:
        (newer / "manifest.json").write_text('{"format": 1')
    assert newest(tmp_path).step == 1
    assert "step-00000002" in caplog.text
    older.joinpath("manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-00000002"):
        newest(tmp_path)


def test_newer_format_is_refused_not_passed_over(tmp_path):
    write(tmp_path, 1, random_flat(), [])
    path = write(tmp_path, 2, random_flat(), []) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this fastdino reads up to 1"):
        newest(tmp_path)


def test_other_model_is_refused_before_anything_changes(tmp_path):
    write(tmp_path, 1, random_flat(), [])
    mine = {kind: torch.zeros(46) for kind in random_flat()}
    with pytest.raises(CheckpointError, match=r"another model: head.b is \[11\] there, \[12\] here"):
        checkpoint.load(Folder(tmp_path), newest(tmp_path), parts(mine, []), SHAPES | {"head.b": [12]})
    assert all(not buffer.any() for buffer in mine.values())


def test_missing_piece_is_named(tmp_path):
    flat = random_flat()
    save(Folder(tmp_path), About(1, SHAPES, {}), lambda copy: parts(flat, [35])[:1], {"c": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"0 of 11 values of head.b"):
        checkpoint.load(Folder(tmp_path), newest(tmp_path), parts(flat, []), SHAPES)


def test_prune_keeps_newest_and_those_for_good(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, random_flat(), [])
    Folder(tmp_path).prune(keep=2, keep_for_good=[3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000005", "step-00000006"]


def test_full_disk_leaves_older_checkpoints_and_says_so(tmp_path):
    """A write that the system refuses: the limit on a file's size stands for the full disk."""
    older = write(tmp_path, 1, random_flat(), [])
    script = f"""
import resource, signal, torch
from pathlib import Path
from fastdino.engine.shards import Fragment
from tests.training.test_checkpoint import About, Folder, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
part = Fragment("w", 0, 100000, tensors={{"param": torch.ones(100000)}})
save(Folder(Path({str(tmp_path)!r})), About(2, {{"w": [100000]}}, {{}}), lambda copy: [part], {{"c": torch.ones(1)}})
"""
    done = forked(python, "-c", script)
    assert "CheckpointError" in done.stderr, done.stderr
    assert "Older checkpoints are whole" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [older.name]


KILLED_AT = ["mkdir", "copied", "fsync", "write_text", "_sync", "rename"]


@pytest.mark.parametrize("point", KILLED_AT)
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_at_any_point_leaves_the_newest_whole_checkpoint(tmp_path, point, when):
    """SIGKILL in a child process before and after every operation that touches the disk."""
    first = random_flat()
    write(tmp_path, 1, first, [])
    script = f"""
import os, signal, torch
from pathlib import Path
from fastdino.engine.shards import Fragment
from fastdino.training.checkpoint import storage
from tests.training.test_checkpoint import About, Folder, save
home = os if {point!r} == "fsync" else storage if {point!r} in ("copied", "_sync") else Path
original = getattr(home, {point!r})
def killed(*args, **kwargs):
    if {when!r} == "after": original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(home, {point!r}, killed)
part = Fragment("head.v", 0, 35, tensors={{"param": torch.ones(35)}})
about = About(2, {{"head.v": [7, 5]}}, {{}})
save(Folder(Path({str(tmp_path)!r})), about, lambda copy: [part], {{"c": torch.ones(1)}})
"""
    done = forked(python, "-c", script)
    assert done.returncode == -9, done.stderr
    assert newest(tmp_path).step == (2 if (point, when) == ("rename", "after") else 1)
    assert write(tmp_path, 2, first, []).exists()
    Folder(tmp_path).clear()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_nothing_is_unpickled(tmp_path):
    """A pickle that runs code on loading does not run: files are read as safetensors or not at all."""
    path = write(tmp_path, 1, random_flat(), [])
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    torch.save({"x": Trap()}, path / "rank-00000.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["rank-00000.safetensors"] = size(path / "rank-00000.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="rank-00000"):
        read_weights(Folder(tmp_path), newest(tmp_path), SHAPES)
    assert not trap.exists()


def size(path: Path) -> dict[str, int]:
    """What a manifest says of a file."""
    with path.open("rb") as file:
        return tensors.copied(tensors.blocks(file))


def leave(folder: Path) -> None:
    """What people and systems leave beside checkpoints."""
    for name in ("step-00000003 (copy)", "step-3-backup", "step-three", "step-000000003", "step-", "notes"):
        (folder / name).mkdir()
    for name in ("notes.txt", ".DS_Store", "step-00000009", "step-00000001.tar", ".removing-step-00000001"):
        (folder / name).write_text("x")


def test_what_a_person_leaves_ends_nothing(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, random_flat(), [])
    leave(tmp_path)
    strangers = {path.name for path in tmp_path.iterdir()} - {f"step-0000000{step}" for step in (1, 2, 3)}
    (tmp_path / "step-00000004").symlink_to("gone")
    write(tmp_path, 4, random_flat(), [])
    assert Folder(tmp_path).steps() == [1, 2, 3, 4]
    assert newest(tmp_path).step == 4
    Folder(tmp_path).prune(keep=2, keep_for_good=[])
    assert Folder(tmp_path).steps() == [3, 4]
    assert {path.name for path in tmp_path.iterdir()} - {"step-00000003", "step-00000004"} >= strangers - {
        ".removing-step-00000001"
    }
    Folder(tmp_path).clear()
    assert not (tmp_path / ".removing-step-00000001").exists()


def test_a_renamed_checkpoint_is_passed_over(tmp_path, caplog):
    write(tmp_path, 1, random_flat(), [])
    write(tmp_path, 2, random_flat(), []).rename(tmp_path / "step-00000007")
    assert newest(tmp_path).step == 1
    assert "step-00000007 was renamed: it is the checkpoint of step 2" in caplog.text


@pytest.mark.parametrize(
    "content", [b"[1]", b"null", b"{}", b'{"format": "one"}', b"\xff\xfe", b'{"format": 1, "files": 3}']
)
def test_a_manifest_of_something_else_is_damage(tmp_path, content):
    path = write(tmp_path, 1, random_flat(), [])
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="step-00000001"):
        newest(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*Not a directory"):
        write(tmp_path / "checkpoints", 1, random_flat(), [])


def test_two_writers_do_not_touch_each_other(tmp_path, monkeypatch):
    """A second save while the first is half done: the first's files stay."""
    original = storage.copied

    def second(*arguments: Any) -> dict[str, int]:
        monkeypatch.setattr(storage, "copied", original)
        write(tmp_path, 1, random_flat(), [])
        return original(*arguments)

    monkeypatch.setattr(storage, "copied", second)
    write(tmp_path, 2, random_flat(), [])
    assert Folder(tmp_path).steps() == [1, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_pruning_on_a_disk_that_refuses_is_a_warning(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        write(tmp_path, step, random_flat(), [])

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    Folder(tmp_path).prune(keep=1, keep_for_good=[])
    assert "Read-only file system" in caplog.text
    assert Folder(tmp_path).steps() == [1, 2]
