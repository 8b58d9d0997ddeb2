"""``fastdino shard``: the same batches from a folder and its shards; stopped, damaged, resized, refused."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError
from fastdino.data import FolderSource, open_source
from fastdino.data.sources.packed import shard
from fastdino.data.sources.packed.shard import JOURNAL, BadShards, Packing
from tests.children import environment, wait_for
from tests.data.batches import assert_equal, make_config, take
from tests.data.pictures import noise, photo, photos, write
from tests.data.sources.tars import opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images of 2 classes."""
    return photos(tmp_path / "photos")


def pack(src: Path, dst: Path, **options) -> str:
    return Packing(**{"per_shard": 6, "workers": 2, "cache": dst.parent / "cache", **options})(str(src), dst)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_shards_hold_the_files_in_their_order(folder, tmp_path):
    assert pack(folder, tmp_path / "out") == f"20 images in 4 shards: {tmp_path}/out"
    assert sorted(os.listdir(tmp_path / "out")) == [*(f"{i:06d}.tar" for i in range(4)), "classes.txt", "shards.jsonl"]
    source, shards = FolderSource(folder), opened(tmp_path / "out", tmp_path / "cache")
    assert len(shards) == 20
    assert shards.labels == source.labels == ["cat", "dog"]
    for i in range(20):
        assert shards.encoded(i) == source.encoded(i)
        assert shards.label(i) == source.label(i)
    with tarfile.open(tmp_path / "out/000001.tar") as tar:
        assert tar.getnames()[:4] == ["000000006.png", "000000006.cls", "000000007.jpg", "000000007.cls"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_shards_is_that_of_the_folder(folder, tmp_path, num_workers):
    pack(folder, tmp_path / "out")
    want = take(10, make_config(), FolderSource(folder))
    shards, config = opened(tmp_path / "out", tmp_path / "cache"), make_config(num_workers)
    assert_equal(take(10, config, shards), want)
    assert_equal(take(7, config, shards, step=3), want[3:])


def test_images_without_classes(tmp_path):
    for i in range(3):
        write(tmp_path / "flat" / f"{i}.png", noise(i))
    pack(tmp_path / "flat", tmp_path / "out")
    shards = opened(tmp_path / "out", tmp_path / "cache")
    assert shards.labels == []
    assert [shards.label(i) for i in range(3)] == [-1] * 3


def test_shards_of_shards_and_of_shapes(folder, tmp_path):
    pack(folder, tmp_path / "out")
    pack(tmp_path / "out", tmp_path / "again", per_shard=9)
    again = opened(tmp_path / "again", tmp_path / "cache")
    assert_equal(take(5, make_config(), again), take(5, make_config(), FolderSource(folder)))
    shapes = Packing(per_shard=5000, workers=2)
    assert shapes.stored(open_source("shapes", make_config().data), 3)[0] == ".png"


def test_large_images_are_resized_and_small_ones_untouched(tmp_path):
    write(tmp_path / "in/a/large.png", photo(400, 300))
    write(tmp_path / "in/a/small.jpg", photo(300, 100), quality=95)
    write(tmp_path / "in/b/tall.jpg", photo(130, 500))
    write(tmp_path / "in/b/wide16.png", Image.fromarray(np.full((200, 300), 40000, np.uint16)))
    pack(tmp_path / "in", tmp_path / "out", short_side=120, quality=80)
    shards = opened(tmp_path / "out", tmp_path / "cache")
    assert [shards.read(i)[0].shape[1::-1] for i in range(4)] == [(160, 120), (300, 100), (120, 462), (180, 120)]
    assert shards.encoded(1) == (tmp_path / "in/a/small.jpg").read_bytes()
    assert shards.read(3)[0][0, 0].tolist() == [40000 >> 8] * 3
    with Image.open(io.BytesIO(shards.encoded(0))) as image:
        want = io.BytesIO()
        photo(400, 300).resize((160, 120), Image.Resampling.BICUBIC).save(want, "JPEG", quality=80)
        assert image.format == "JPEG"
        assert want.getvalue() == shards.encoded(0)
    assert shards.name(0) == "000000.tar: 000000000.jpg"


def test_what_cannot_be_decoded_is_named_and_left_out(folder, tmp_path):
    (folder / "cat/03.png").write_bytes(b"text")
    (folder / "dog/99.jpg").symlink_to("/nowhere")
    with pytest.raises(BadShards, match=r"of 21 images cannot be read, more than --max-bad 0\.01 allows: \w"):
        pack(folder, tmp_path / "out")
    done = pack(folder, tmp_path / "out", max_bad=0.1)
    assert done.startswith("19 images in 4 shards")
    assert "2 that cannot be read are left out: cat/03.png: Unident" in done
    assert "; dog/99.jpg: FileNotFoundError" in done
    source = FolderSource(folder)
    left = [i for i in range(21) if source.name(i) not in ("cat/03.png", "dog/99.jpg")]
    shards = opened(tmp_path / "out", tmp_path / "cache")
    assert [shards.encoded(i) for i in range(19)] == [source.encoded(i) for i in left]


def test_a_shard_of_which_nothing_can_be_read(folder, tmp_path):
    for path in sorted(folder.rglob("*.*"))[:12]:
        path.write_bytes(b"")
    assert pack(folder, tmp_path / "out", max_bad=0.6).startswith("8 images in 4 shards")
    assert len(opened(tmp_path / "out", tmp_path / "cache")) == 8


@pytest.mark.parametrize("damage", ["removed", "changed", "journal cut", "partial", "nothing"])
def test_given_again_it_makes_what_is_not_there_as_it_was(folder, tmp_path, monkeypatch, damage):
    out = tmp_path / "out"
    pack(folder, out)
    want, made = digests(out), tmp_path / "made"
    real = shard._write

    def write_(path, *rest):
        with open(made, "a") as file:
            file.write(path.name.partition(".")[0] + "\n")
        return real(path, *rest)

    monkeypatch.setattr(shard, "_write", write_)
    made.touch()
    if damage == "removed":
        (out / "000002.tar").unlink()
    elif damage == "changed":
        data = bytearray((out / "000002.tar").read_bytes())
        data[600] ^= 1
        (out / "000002.tar").write_bytes(data)
    elif damage == "journal cut":
        lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
        keep = [line for line in lines[1:] if json.loads(line)["shard"] != 2]
        (cut,) = [line for line in lines[1:] if json.loads(line)["shard"] == 2]
        (out / JOURNAL).write_bytes(lines[0] + b"".join(keep) + cut[:20])
    elif damage == "partial":
        (out / "000002.tar").rename(out / "000002.tar.partial")
    pack(folder, out)
    assert digests(out) == want
    assert made.read_text().split() == ([] if damage == "nothing" else ["000002"])
    pack(folder, out)
    assert len(made.read_text().split()) <= 1, "it is written down"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from fastdino.data.sources.packed import shard
real = shard.Packing.stored
def stored(self, source, index):
    time.sleep(0.05 if index < 9 else 2)
    return real(self, source, index)
shard.Packing.stored = stored
from fastdino.cli import main
main(["shard", *sys.argv[1:]])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_anywhere_it_goes_on(folder, tmp_path, number):
    """No shard is under its name before it is whole; what is finished is kept; no worker stays."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(folder), str(out), "--per-shard", "3", "--workers", "2"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: out.is_dir() and len(list(out.glob("*.tar"))) >= 2)
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not alive(process.pid))
    finished = digests(out)
    assert 2 <= len(finished) < 7
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 6
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert not list(out.glob("*.partial"))
        assert b"Traceback" not in process.communicate()[1]
    pack(folder, out, per_shard=3)
    assert finished.items() <= digests(out).items()
    assert_equal(take(5, make_config(), opened(out, tmp_path / "cache")), take(5, make_config(), FolderSource(folder)))


def alive(session: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_disk_that_gives_back_something_else_is_told(folder, tmp_path, monkeypatch):
    real = shard._check_read_back

    def check(path, *rest):
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
        return real(path, *rest)

    monkeypatch.setattr(shard, "_check_read_back", check)
    with pytest.raises(BadShards, match=r"00000\d\.tar reads back differently from what was written"):
        pack(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_a_worker_that_dies_is_one_message(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BadShards, match=r"a worker died.*lower --workers"):
        pack(folder, tmp_path / "out")


@pytest.mark.parametrize("change", [{"per_shard": 7}, {"short_side": 20}, {"bits": 12}, "images"])
def test_a_folder_of_other_shards_is_refused(folder, tmp_path, change):
    pack(folder, tmp_path / "out")
    before = digests(tmp_path / "out")
    if change == "images":
        write(folder / "dog" / "more.png")
        change = {}
    with pytest.raises(ConfigError, match=r"shards of another packing: \w+ was .*, now it is .* Give a new folder"):
        pack(folder, tmp_path / "out", **change)
    assert digests(tmp_path / "out") == before


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file"):
        pack(folder, tmp_path / "file")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/000007.tar").touch()
    with pytest.raises(ConfigError, match=r"holds 000007\.tar, which this command did not make"):
        pack(folder, tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000001.tar").mkdir()
    (tmp_path / "out" / JOURNAL).write_text("no journal\n")
    with pytest.raises(ConfigError, match="another packing: version was None"):
        pack(folder, tmp_path / "out")


def test_two_at_once(folder, tmp_path):
    with (
        shard._Journal(tmp_path / "out", {"version": 1}),
        pytest.raises(ConfigError, match="another fastdino shard is"),
    ):
        pack(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--quality", "90"], "--quality=90 must be given with --short-side"),
        (["--quality", "0", "--short-side", "9"], "--quality=0 must be in [1, 95]"),
        (["--short-side", "0"], "--short-side=0 must be at least 1"),
        (["--per-shard", "0"], "--per-shard=0"),
        (["--workers", "0"], "--workers=0"),
        (["--max-bad", "2"], "--max-bad=2.0"),
        ([], "/nowhere' does not exist"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, flags, says, capsys):
    from fastdino.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["shard", f"{tmp_path}/nowhere", f"{tmp_path}/out", *flags])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    from fastdino.cli import main

    monkeypatch.setenv("HOME", str(tmp_path))
    main(["shard", "~/photos", "~/out", "--per-shard", "20"])
    assert capsys.readouterr().out == f"20 images in 1 shard: {tmp_path}/out\n"
    shutil.rmtree(folder)
    assert opened(tmp_path / "out", tmp_path / "cache").read(0)[1] == 0
