"""Shards behind URLs: a store in memory, a real server, a cache that is full, and all that a network does."""

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from fastdino.config import ConfigError, DataConfig
from fastdino.data import BadImage, FolderSource
from fastdino.data.sources import remote
from fastdino.data.sources.packed.shard import Packing
from tests.data.batches import assert_equal, make_config, take
from tests.data.pictures import photos
from tests.data.sources.tars import names, opened, png, write_tar


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """A store in memory that is empty afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of one image, 10 kB each, and the names of the classes."""
    for i in range(4):
        write_tar(tmp_path / "here" / f"{i}.tar", [("a.png", png(i)), ("a.cls", b"1")])
    (tmp_path / "here/classes.txt").write_text("owl\nwren\n")
    return tmp_path / "here"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder; ``asked`` has the requests, ``cut`` the bytes after which an answer ends, ``delay`` seconds."""

    asked: list[str] = []  # noqa: RUF012
    cut: int | None = None
    delay = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        time.sleep(self.delay)
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        outputfile.write(source.read() if self.cut is None else source.read(self.cut))


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has the shards."""
    monkeypatch.setattr(Quiet, "asked", [])
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def store(memory: fsspec.AbstractFileSystem, shards: Path, folder: str = "/bucket/shards") -> None:
    for path in shards.iterdir():
        memory.pipe(f"{folder}/{path.name}", path.read_bytes())


@pytest.mark.parametrize("root", ["", "/", "/*.tar", "/{0..3}.tar", "/{0,1,2,3}.tar", "/[0-3].tar"])
def test_shards_of_a_store(memory, shards, tmp_path, root):
    store(memory, shards)
    source = opened(f"memory://bucket/shards{root}", tmp_path / "cache")
    assert names(source) == [f"{i}.tar: a.png" for i in range(4)]
    assert source.labels == ["owl", "wren"]
    memory.store.clear()
    assert [source.encoded(i) for i in range(4)] == [png(i) for i in range(4)]


@pytest.mark.parametrize("root", ["/{0..3}.tar", "/{0..3}.tar?signature=a*b", ""])
def test_shards_of_a_server(server, tmp_path, root):
    source = opened(server + root, tmp_path / "cache")
    assert names(source) == [f"{i}.tar: a.png" for i in range(4)]
    assert source.labels == ["owl", "wren"]
    assert [source.encoded(i) for i in range(4)] == [png(i) for i in range(4)]


def test_a_shard_is_fetched_once(server, shards, tmp_path):
    first = opened(f"{server}/{{0..3}}.tar?token=1", tmp_path / "cache")
    fetches = [path for path in Quiet.asked if ".tar" in path]
    assert len(fetches) == 4
    again = opened(f"{server}/{{0..3}}.tar?token=2", tmp_path / "cache")
    assert [path for path in Quiet.asked if ".tar" in path] == fetches
    assert again.fingerprint() == first.fingerprint()
    write_tar(shards / "2.tar", [("a.png", png(9)), ("a.cls", b"0"), ("b.txt", bytes(20000))])  # another size
    changed = opened(f"{server}/{{0..3}}.tar", tmp_path / "cache")
    assert len([path for path in Quiet.asked if ".tar" in path]) == 5
    assert changed.encoded(2) == png(9)


def test_an_epoch_of_a_store_is_that_of_the_folder(memory, tmp_path):
    folder = photos(tmp_path / "photos")
    Packing(per_shard=6, workers=1, cache=tmp_path / "cache")(str(folder), tmp_path / "out")
    store(memory, tmp_path / "out")
    source, want = opened("memory://bucket/shards", tmp_path / "cache"), take(10, make_config(), FolderSource(folder))
    assert_equal(take(10, make_config(2), source), want)
    assert source.labels == ["cat", "dog"]


def test_what_was_pushed_out_is_fetched_again_also_by_a_worker(server, tmp_path):
    source = opened(f"{server}/{{0..3}}.tar", tmp_path / "cache")
    whole = take(2, make_config(local_batch=2), source)
    for path in (tmp_path / "cache/files").glob("*.tar"):
        path.unlink()
    assert_equal(take(2, make_config(2, local_batch=2), source), whole)
    assert not [image for batch in whole for image in batch.bad]
    for path in (tmp_path / "cache/files").glob("*.tar"):
        path.unlink()
    assert source.encoded(3) == png(3)


def test_the_least_recently_used_go(memory, shards, tmp_path):
    size = (shards / "0.tar").stat().st_size
    for name in ("one", "two", "three"):
        store(memory, shards, f"/{name}")
    settings = {"cache": tmp_path / "cache", "cache_gb": 9.5 * size / 1e9}  # room for two sets of four
    kept = lambda: {path.name: path for path in (tmp_path / "cache/files").glob("*.tar")}  # noqa: E731
    one = opened("memory://one", **settings)
    first = kept()
    time.sleep(0.01)
    opened("memory://two", **settings)
    second = kept().keys() - first.keys()
    time.sleep(0.01)
    opened("memory://one", **settings)  # used again
    time.sleep(0.01)
    three = opened("memory://three", **settings)
    assert len(kept()) == 9
    assert first.keys() < kept().keys()
    assert len(second & kept().keys()) == 1
    assert three.encoded(0) == one.encoded(0) == png(0)
    with pytest.raises(ConfigError, match=r"0\.tar and the files with it take .* GB, and data\.cache_gb=.*Raise"):
        opened("memory://one", tmp_path / "cache", cache_gb=3.5 * size / 1e9)
    assert len(kept()) == 9, "nothing went for what does not fit"


def test_several_processes_fetch_once(server, tmp_path, monkeypatch):
    """As the ranks of a machine do."""
    monkeypatch.setattr(Quiet, "delay", 0.3)
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            status = 1
            try:
                source = opened(f"{server}/{{0..3}}.tar", tmp_path / "cache")
                status = int([source.encoded(i) for i in range(4)] != [png(i) for i in range(4)])
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len([path for path in Quiet.asked if ".tar" in path]) == 4


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("http://127.0.0.1:9/a.tar", r"cannot read http://127\.0\.0\.1:9/a\.tar: \w*Error: .*Check the address"),
        ("http://no.such.host.invalid/a.tar", r"cannot read http://no\.such\.host\.invalid/a\.tar: .*Check"),
        ("{server}/x.tar", r"cannot read http.*/x\.tar: .*404"),
        ("{server}/nowhere", r"cannot read http.*/nowhere: FileNotFoundError"),
        ("memory://nowhere", r"cannot read memory://nowhere: FileNotFoundError"),
        ("memory://nowhere/*.tar", r"memory://nowhere/\*\.tar holds no files ending in \.tar"),
        ("memory://empty", r"memory://empty holds no files ending in \.tar"),
        ("nosuch://a/b.tar", r"cannot read nosuch://a/b\.tar: ValueError: Protocol not known: nosuch"),
        ("memory://packed/a.tar.gz", r"names a \.tar\.gz, and images inside a compressed archive"),
        ("memory://split", r"names files of several splits, such as train-0\.tar and val-0\.tar"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_message(memory, server, tmp_path, root, says):
    for path in ("/empty/readme.txt", "/packed/a.tar.gz", "/split/train-0.tar", "/split/val-0.tar"):
        memory.pipe(path, b"x")
    with pytest.raises(ConfigError, match=says) as caught:
        opened(root.replace("{server}", server), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_store_that_needs_another_package_says_so(tmp_path):
    pytest.importorskip("fsspec")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"cannot read gs://bucket/a\.tar: .*gcsfs"):
            opened("gs://bucket/a.tar", tmp_path / "cache")


def test_a_download_that_ends_early_is_tried_again_and_never_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Quiet, "cut", 700)
    with pytest.raises(ConfigError, match=r"cannot read http.*/\d\.tar: "):
        opened(f"{server}/{{0..3}}.tar", tmp_path / "cache")
    assert max(Quiet.asked.count(f"/{i}.tar") for i in range(4)) == 3
    assert not list((tmp_path / "cache/files").glob("*.tar"))
    assert not list((tmp_path / "cache/files").glob("*.partial"))
    monkeypatch.setattr(Quiet, "cut", None)
    assert len(opened(f"{server}/{{0..3}}.tar", tmp_path / "cache")) == 4


def test_a_file_that_changed_between_its_listing_and_its_fetching(memory, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    store(memory, shards)
    files = remote.listed(["memory://bucket/shards/0.tar"], (".tar",))
    memory.pipe("/bucket/shards/0.tar", b"short")
    with pytest.raises(ConfigError, match=r"0\.tar: EOFError: 5 bytes came of 10240"):
        remote.fetched(files, DataConfig(cache=tmp_path / "cache"))


def test_what_a_killed_process_left_makes_room(memory, shards, tmp_path):
    store(memory, shards)
    files, size = tmp_path / "cache/files", (shards / "0.tar").stat().st_size
    files.mkdir(parents=True)
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        (files / f"{name}.partial").write_bytes(bytes(size))
        os.utime(files / f"{name}.partial", (time.time() - age, time.time() - age))
    opened("memory://bucket/shards", tmp_path / "cache", cache_gb=5.5 * size / 1e9)
    assert [path.name for path in files.glob("*.partial")] == ["new.partial"]


def test_a_store_that_is_gone_when_a_shard_is_needed_again_is_a_bad_image(memory, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    store(memory, shards)
    source = opened("memory://bucket/shards", tmp_path / "cache")
    memory.store.clear()
    for path in (tmp_path / "cache/files").glob("*.tar"):
        path.unlink()
    with pytest.raises(BadImage, match=r"0\.tar: a\.png: ConfigError: cannot read memory:///bucket/shards/0\.tar: F"):
        source.read(0)


def test_a_cache_that_cannot_be_written(memory, shards, tmp_path):
    store(memory, shards)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file/cache/files/.*Set another data\.cache"):
        opened("memory://bucket/shards", tmp_path / "file/cache")
