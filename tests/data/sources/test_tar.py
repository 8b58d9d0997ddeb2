"""Tar shards: every layout that people have, every kind of damage, an index that is kept and never stale."""

import gzip
import io
import os
import tarfile
import threading
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from fastdino.config import ConfigError
from fastdino.data import BadImage
from fastdino.data.sources.packed import index as index_module
from fastdino.data.sources.packed.index import DAMAGED
from fastdino.data.sources.packed.tar import index_tar
from tests.data.pictures import noise
from tests.data.sources.tars import names, opened, png, write_tar


def samples(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """KEY.png and KEY.cls of ``count`` images."""
    return [
        member
        for i in range(start, start + count)
        for member in ((f"{i:06d}.png", png(i)), (f"{i:06d}.cls", str(i % 3).encode()))
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 4, 1 and 5 images; image i is noise(i)."""
    for number, (start, stop) in enumerate([(0, 4), (4, 5), (5, 10)]):
        write_tar(tmp_path / "shards" / f"{number}.tar", samples(stop - start, start))
    return tmp_path / "shards"


def test_images_come_in_the_order_of_the_shards(shards, tmp_path):
    source = opened(shards, tmp_path / "cache")
    assert len(source) == 10
    assert source.labels == ["0", "1", "2"]
    for i in range(10):
        image, label = source.read(i)
        assert np.array_equal(image, noise(i))
        assert label == source.label(i) == i % 3
    assert source.name(4) == "1.tar: 000004.png"
    assert source.encoded(7) == png(7)
    with pytest.raises(IndexError):
        source.read(10)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "a/" * 60, "b" * 90 + "/", "c" * 160 + "/", "\u00fcber/"])
def test_names_of_any_length_and_kind(tmp_path, format, folder):
    if format == tarfile.USTAR_FORMAT and len(folder) > 155:
        return  # which it cannot hold
    members = [(f"{folder}{name}", data) for name, data in samples(3)]
    write_tar(tmp_path / "a.tar", members, format)
    source = opened(tmp_path / "a.tar", tmp_path / "cache")
    assert names(source) == [f"a.tar: {folder}{i:06d}.png" for i in range(3)]
    for i in range(3):
        assert np.array_equal(source.read(i)[0], noise(i))
        assert source.label(i) == i


def test_keys_and_endings_are_those_of_webdataset(tmp_path, caplog):
    members = [
        *(("x/a.seg.png", png(1)), ("x/a.jpg", png(2)), ("x/a.json", b"{}"), ("x/a.cls", b"7\n")),
        *(("y/a.png", png(3)), ("y/a.webp", png(4)), ("._b.png", b"x"), (".c.png", b"x"), ("noending", b"x")),
        *(("d.PNG", png(5)), ("e.v2.png", png(6)), ("f.txt", b"x"), ("f.cls", b"9")),
    ]
    write_tar(tmp_path / "a.tar", members)
    source = opened(tmp_path / "a.tar", tmp_path / "cache")
    assert names(source) == [f"a.tar: {name}" for name in ("x/a.jpg", "y/a.png", "d.PNG", "e.v2.png")]
    assert [source.label(i) for i in range(4)] == [0, -1, -1, -1]
    assert source.labels == ["7", "9"]
    for i, seed in enumerate((2, 3, 5, 6)):
        assert np.array_equal(source.read(i)[0], noise(seed))
    assert "2 images are not used, because another one has the same key" in caplog.text


def test_a_class_may_come_before_its_image_or_far_behind(tmp_path):
    members = sorted(samples(6), key=lambda member: member[0].endswith("png"))
    write_tar(tmp_path / "first.tar", members)
    write_tar(tmp_path / "last.tar", members[::-1])
    for name, order in (("first", range(6)), ("last", range(5, -1, -1))):
        source = opened(tmp_path / f"{name}.tar", tmp_path / "cache")
        assert [source.label(i) for i in range(6)] == [i % 3 for i in order]


def test_folders_and_links_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}{'x' * 120}.png")
            member.type, member.linkname = kind, "y" * 120
            tar.addfile(member)
        member = tarfile.TarInfo("z.png")
        member.size = len(png())
        tar.addfile(member, io.BytesIO(png()))
    assert names(opened(tmp_path / "a.tar", tmp_path / "cache")) == ["a.tar: z.png"]


@pytest.mark.parametrize(("words", "labels", "ids"), [
    (["10", "9", "-1"], ["9", "10"], [1, 0, -1]),
    (["\n", "9", " 8 "], ["8", "9"], [-1, 1, 0]),
    (["dog", "cat", "10"], ["10", "cat", "dog"], [2, 1, 0]),
])  # fmt: skip
def test_words_of_classes(tmp_path, words, labels, ids):
    write_tar(
        tmp_path / "a.tar",
        [m for i, w in enumerate(words) for m in ((f"{i}.png", png()), (f"{i}.cls", w.encode()))],
    )
    source = opened(tmp_path / "a.tar", tmp_path / "cache")
    assert source.labels == labels
    assert [source.label(i) for i in range(3)] == ids


def test_names_of_classes(shards, tmp_path):
    (shards / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    assert opened(shards, tmp_path / "cache").labels == ["ant", "bee", "cat", "dog"]
    (shards / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ConfigError, match="names 2 classes, and an image is of class '2'"):
        opened(shards, tmp_path / "cache")
    (shards / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot read .*classes\.txt"):
        opened(shards, tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------- damage


def test_a_shard_that_was_cut_off(shards, tmp_path):
    """Images that are whole are read; one that is not says so."""
    whole = (shards / "2.tar").read_bytes()
    offsets = index_tar(shards / "2.tar").offset
    (shards / "2.tar").write_bytes(whole[: offsets[3] + 100])
    source = opened(shards, tmp_path / "cache")
    assert len(source) == 9
    assert np.array_equal(source.read(7)[0], noise(7))
    with pytest.raises(BadImage, match=r"2\.tar: 000008\.png: OSError: the file is cut off: it ends \d+ bytes before"):
        source.read(8)
    (shards / "2.tar").write_bytes(whole[: offsets[3] - 100])  # within the header
    source = opened(shards, tmp_path / "cache")
    assert len(source) == 9
    with pytest.raises(BadImage, match=r"2\.tar: header at byte \d+: damaged"):
        source.read(8)
    (shards / "2.tar").write_bytes(whole[: offsets[3] - 512])  # before it, as when the end of the archive is missing
    assert len(opened(shards, tmp_path / "cache")) == 8


@pytest.mark.parametrize("damage", ["name", "size", "checksum", "zeros", "text"])
def test_images_behind_a_damaged_header_are_found(shards, tmp_path, damage):
    data = bytearray((shards / "2.tar").read_bytes())
    at = int(index_tar(shards / "2.tar").offset[1]) - 512
    place, what = {"name": (0, b"Q"), "size": (124, b"77777777777"), "checksum": (148, b"zz"), "text": (0, b"<" * 512),
                   "zeros": (0, bytes(512))}[damage]  # fmt: skip
    data[at + place : at + place + len(what)] = what
    (shards / "2.tar").write_bytes(data)
    source = opened(shards, tmp_path / "cache")
    assert len(source) == 10
    with pytest.raises(BadImage, match="damaged, so the image behind it is lost"):
        source.read(6)
    for i in (5, 7, 8, 9):
        image, label = source.read(i)
        assert label == i % 3
        assert np.array_equal(image, noise(i))


def test_any_damage_is_a_bad_image_or_one_message(shards, tmp_path):
    whole, rng, lost = (shards / "2.tar").read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(data), 3):
            stop = place + int(rng.integers(1, 1500))
            data[place:stop] = rng.bytes(len(data[place:stop]))
        path = tmp_path / "x.tar"
        path.write_bytes(data)
        with suppress(ConfigError):  # all of it is damaged
            source = opened(path, tmp_path / "cache")
            for i in range(len(source)):
                try:
                    source.read(i)
                except BadImage:
                    lost += 1
    assert lost > 50


def test_a_number_of_bytes_beyond_all_bounds(tmp_path):
    """A size that is sound by its checksum asks for no memory."""
    head = tarfile.TarInfo("a.png")
    head.size = 2**40
    (tmp_path / "a.tar").write_bytes(head.tobuf(tarfile.GNU_FORMAT) + png())
    with pytest.raises(BadImage, match="cut off: it ends 10995"):
        opened(tmp_path / "a.tar", tmp_path / "cache").read(0)


def test_a_second_image_of_a_name_is_counted(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])
    source = opened(tmp_path / "a.tar", tmp_path / "cache")
    assert np.array_equal(source.read(0)[0], noise(1))
    with pytest.raises(BadImage, match=r"a\.tar: a\.png: a second image of this name"):
        source.read(2)


def test_members_of_no_bytes_and_of_no_image(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", b""), ("b.png", b"text"), ("c.png", png(3))])
    source = opened(tmp_path / "a.tar", tmp_path / "cache")
    for i, says in enumerate([r"a\.png: ValueError: it holds no bytes", r"b\.png: Unident.* of 4 bytes"]):
        with pytest.raises(BadImage, match=says):
            source.read(i)
    assert np.array_equal(source.read(2)[0], noise(3))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty, not a tar shard"),
        (gzip.compress(bytes(2000)), "is compressed with gzip.*unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed with zstd"),
        (b"<html>404</html>" * 100, "is not a tar: its first header is damaged"),
        (b"short", "is not a tar"),
        (bytes(10240), "no image in 1 file"),
    ],
    ids=["empty", "gzip", "zstd", "page", "short", "zeros"],  # gzip's bytes hold the time
)
def test_what_is_no_shard(tmp_path, data, says):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"a\.tar.*{says}"):
        opened(tmp_path / "a.tar", tmp_path / "cache")


# -------------------------------------------------------------------------------------------------- kept indexes


def test_an_index_is_made_once_and_only_where_a_shard_changed(shards, tmp_path, monkeypatch):
    made: list[str] = []
    real = index_module._made
    monkeypatch.setattr(
        index_module, "_made", lambda make, files: (made.extend(f.name for f in files), real(make, files))[1]
    )
    first = opened(shards, tmp_path / "cache")
    assert made == ["0.tar", "1.tar", "2.tar"]
    again = opened(shards, tmp_path / "cache")
    assert len(made) == 3
    assert names(again) == names(first)
    assert again.fingerprint() == first.fingerprint()
    assert [again.label(i) for i in range(10)] == [first.label(i) for i in range(10)]
    write_tar(shards / "1.tar", samples(2, 20))
    changed = opened(shards, tmp_path / "cache")
    assert made[3:] == ["1.tar"]
    assert len(changed) == 11
    assert np.array_equal(changed.read(5)[0], noise(21))
    os.utime(shards / "0.tar", ns=(1, 1))  # the same size, another time
    opened(shards, tmp_path / "cache")
    assert made[4:] == ["0.tar"]


def test_a_damaged_or_unwritable_cache_costs_time_only(shards, tmp_path, caplog):
    want = names(opened(shards, tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    for data in (b"", b"PK\x03\x04", kept.read_bytes()[:-50], kept.read_bytes().replace(b"words", b"wards")):
        kept.write_bytes(data)
        assert names(opened(shards, tmp_path / "cache")) == want
    (tmp_path / "file").touch()
    assert names(opened(shards, tmp_path / "file" / "cache")) == want
    assert "the index of the images cannot be kept" in caplog.text


def test_a_shard_that_changes_under_a_run_is_never_taken_for_an_image(shards, tmp_path):
    source = opened(shards, tmp_path / "cache")
    write_tar(shards / "1.tar", samples(1, 30))
    with pytest.raises(BadImage, match=r"1\.tar: 000004\.png: OSError: the file has changed since it was indexed"):
        source.read(4)
    assert np.array_equal(source.read(3)[0], noise(3))
    (shards / "0.tar").unlink()
    with pytest.raises(BadImage, match="FileNotFoundError"):
        source.read(0)


def test_shards_that_moved_keep_their_fingerprint(shards, tmp_path):
    before = opened(shards, tmp_path / "cache").fingerprint()
    shards.rename(tmp_path / "elsewhere")
    assert opened(tmp_path / "elsewhere", tmp_path / "cache").fingerprint() == before
    write_tar(tmp_path / "elsewhere" / "1.tar", [("000004.png", png(4) + b" "), ("000004.cls", b"1")])
    assert opened(tmp_path / "elsewhere", tmp_path / "cache").fingerprint() != before


def test_threads_and_forked_processes_read_at_once(shards, tmp_path):
    source = opened(shards, tmp_path / "cache")
    wrong: list[int] = []

    def read() -> None:
        some = np.random.default_rng(threading.get_ident() % 1000).integers(0, 10, 100).tolist()
        wrong.extend(i for i in some if source.encoded(i) != png(i))

    threads = [threading.Thread(target=read) for _ in range(4)]
    process = get_context("fork").Process(target=lambda: (read(), os._exit(len(wrong))))
    for each in (*threads, process):
        each.start()
    for each in (*threads, process):
        each.join()
    assert not wrong
    assert process.exitcode == 0


def test_no_open_files_are_kept(shards, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    source = opened(shards, tmp_path / "cache")
    for i in range(10):
        source.read(i)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_is_small(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i:09d}.jpg", b"") for i in range(5000)])
    index = index_tar(tmp_path / "a.tar")
    arrays = index.offset, index.size, index.word, index.names.ends
    assert sum(array.nbytes for array in arrays) + len(index.names.block) < 5000 * 45


def test_a_resynchronised_header_needs_its_checksum(tmp_path):
    """``ustar`` inside an image is no header."""
    fake = bytearray(tarfile.TarInfo("fake.png").tobuf(tarfile.USTAR_FORMAT))
    fake[150] ^= 1
    write_tar(tmp_path / "a.tar", [("a.png", png()), ("b.png", bytes(fake) * 3), ("c.png", png(2))])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = int(index_tar(tmp_path / "a.tar").offset[1]) - 512
    data[at] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    index = index_tar(tmp_path / "a.tar")
    assert [index.names[i] for i in range(3)] == [b"a.png", b"header at byte %d" % at, b"c.png"]
    assert index.size[1] == DAMAGED
