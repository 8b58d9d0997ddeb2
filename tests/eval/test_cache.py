"""The cache of features: what makes an entry another one, what a kill leaves, and ranks that write together."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.folder import FolderSource
from fastdino.distributed import Ranks
from fastdino.eval import cache as room
from fastdino.eval.cache import Cache, Work, uncached, weights_digest
from fastdino.eval.evaluation import alone
from fastdino.eval.features import Features, Reading
from fastdino.model import ViT

READING = Reading(size=16)
WORK = Work(1, 0, alone())


class Counted(FolderSource):
    """Images of a folder, of which each reading is counted, and one ends the process."""

    def __init__(self, path: Path, fatal: int | None = None) -> None:
        super().__init__(path, DataConfig(num_workers=0))
        self.seen, self.fatal = list[int](), fatal

    def read(self, index: int, room: Any = None) -> Any:
        if index == self.fatal:
            raise KeyboardInterrupt
        self.seen.append(index)
        return super().read(index, room)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "images"


@pytest.fixture
def vit() -> ViT:
    return ViT("nano", patch_size=8, image_size=16).eval()


def made(cache: Cache, vit: ViT, source: Counted, reading: Reading = READING, work: Work = WORK) -> Features:
    return cache.features(vit, lambda: weights_digest(vit), source, reading, work, {"weights": "w", "data": "d"})


def equal(one: Features, other: Features) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_second_time_nothing_is_read(tmp_path: Path, images: Path, vit: ViT) -> None:
    cache, source = Cache(tmp_path / "cache", 1), Counted(images)
    fresh = uncached(vit, source, READING, WORK)
    first = made(cache, vit, source)
    assert equal(first, fresh)
    again = Counted(images)
    assert equal(made(cache, vit, again), fresh)
    assert not again.seen
    moved = images.rename(tmp_path / "moved")
    elsewhere = Counted(moved)
    copied = ViT("nano", patch_size=8, image_size=16)
    copied.load_state_dict(vit.state_dict())
    assert equal(made(cache, copied, elsewhere), fresh)
    assert not elsewhere.seen, "neither where the images lie nor where the weights came from matters"


def test_everything_that_features_depend_on_makes_another_entry(tmp_path: Path, images: Path, vit: ViT) -> None:
    cache = Cache(tmp_path / "cache", 1)
    made(cache, vit, Counted(images))

    def misses(backbone: ViT = vit, source: Counted | None = None, reading: Reading = READING) -> bool:
        source = source or Counted(images)
        made(cache, backbone, source, reading)
        return bool(source.seen)

    assert not misses()
    for reading in (
        Reading(size=24), Reading(size=16, crop=1.0), Reading(size=16, normalize="image"),
        Reading(size=16, precision="bf16"), Reading(size=16, tokens="mean"),
    ):  # fmt: skip
        assert misses(reading=reading), reading
    other = ViT("nano", patch_size=8, image_size=16)
    other.load_state_dict(vit.state_dict())
    with torch.no_grad():
        bits = other.blocks[3].mlp.fc2.bias.view(torch.int32)  # type: ignore[union-attr,index]
        bits[7] ^= 1
    assert misses(other), "one bit of one weight"
    assert weights_digest(other) != weights_digest(vit)
    os.utime(images / "a/00.png", ns=(0, 1))
    assert misses(), "a file that was written again"
    (images / "a/00.png").rename(images / "a/000.png")
    assert misses(), "another name"
    part = Subset(Counted(images), range(5))
    assert part.stamp() not in (Counted(images).stamp(), Subset(Counted(images), range(6)).stamp())


def test_what_a_kill_leaves_is_completed(tmp_path: Path, images: Path, vit: ViT) -> None:
    cache = Cache(tmp_path / "cache", 1)
    with pytest.raises(KeyboardInterrupt):
        made(cache, vit, Counted(images, fatal=37))
    ((entry, _, _, manifest),) = cache.entries()
    assert not manifest, "half an entry is none"
    rest = Counted(images)
    assert equal(made(cache, vit, rest), uncached(vit, Counted(images), READING, WORK))
    assert rest.seen == [*range(32, 40)], "two times 16 batches were kept"
    assert sorted(file.name for file in entry.iterdir()) == ["features.00000-of-00001.npy", "manifest.json"]


def test_images_that_cannot_be_read_are_remembered(tmp_path: Path, images: Path, vit: ViT) -> None:
    for name in ("a/00.png", "b/03.png", "b/39.png"):
        (images / name).write_bytes(b"")
    cache = Cache(tmp_path / "cache", 1)
    want = uncached(vit, Counted(images), READING, Work(4, 0, alone()))
    assert len(want.places) == 37
    assert equal(made(cache, vit, Counted(images), work=Work(4, 0, alone())), want)
    again = Counted(images)
    assert equal(made(cache, vit, again), want)
    assert not again.seen
    (images / "x").mkdir()
    for file in images.glob("?/*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the images could be read"):
        made(cache, vit, Counted(images))


class Threads(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        super().__init__(rank, size, rank, torch.device("cpu"))
        self.wait, self.board_ = barrier, board

    def gather(self, value: Any) -> list[Any]:
        self.board_[self.rank] = value
        self.wait.wait(60)
        values = [self.board_[rank] for rank in range(self.world_size)]
        self.wait.wait(60)
        return values

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))


def together(size: int, work: Callable[[Ranks], Features]) -> list[Features]:
    barrier, board, found = threading.Barrier(size), dict[int, Any](), dict[int, Features]()

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_what_one_does(tmp_path: Path, images: Path, vit: ViT, size: int) -> None:
    (images / "b/03.png").write_bytes(b"")
    want = uncached(vit, Counted(images), READING, WORK)
    cache, sources = Cache(tmp_path / "cache", 1), [Counted(images) for _ in range(size)]
    found = together(size, lambda ranks: made(cache, vit, sources[ranks.rank], work=Work(1, 0, ranks)))
    assert all(equal(features, want) for features in found)
    assert sum(len(source.seen) for source in sources) == 40, "each image once"
    alone_ = Counted(images)
    assert equal(made(cache, vit, alone_), want)
    assert not alone_.seen, "the number of readers is another matter"
    plain = together(size, lambda ranks: uncached(vit, Counted(images), READING, Work(1, 0, ranks)))
    assert all(equal(features, want) for features in plain)


def test_a_file_that_was_cut_off_is_made_again(tmp_path: Path, images: Path, vit: ViT) -> None:
    cache = Cache(tmp_path / "cache", 1)
    want = made(cache, vit, Counted(images))
    ((entry, *_),) = cache.entries()
    file = entry / "features.00000-of-00001.npy"
    want = Features(*(x.clone() for x in want))
    os.truncate(file, 1000)
    assert equal(made(cache, vit, Counted(images)), want)
    (entry / "manifest.json").write_text("{")
    assert equal(made(cache, vit, Counted(images)), want)


def test_the_oldest_make_room(tmp_path: Path, images: Path, vit: ViT) -> None:
    each = 40 * 96 * 4
    cache = Cache(tmp_path / "cache", 2.9 * each / 1e9)
    readings = [Reading(size=size) for size in (16, 24, 32)]
    for age, reading in enumerate(readings[:2]):
        made(cache, vit, Counted(images), reading)
        entry = cache.entries()[-1][0]
        for file in entry.iterdir():
            os.utime(file, (1000 + age, 1000 + age))
    made(cache, vit, Counted(images), readings[0])  # which makes the other the oldest
    made(cache, vit, Counted(images), readings[2])
    source = Counted(images)
    made(cache, vit, source, readings[0])
    assert not source.seen
    made(cache, vit, source, readings[1])
    assert len(source.seen) == 40
    with pytest.raises(ConfigError, match=r"take 1.54e-05 GB, and --cache-gb=1e-06 holds fewer"):
        made(Cache(tmp_path / "cache", 1e-6), vit, Counted(images), Reading(size=48))


def test_a_full_disk(tmp_path: Path, images: Path, vit: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        ConfigError, match=r"do not fit on the disk of .*cache.*1e-07 GB free: .*--cache-dir.*--no-cache"
    ):
        made(cache, vit, Counted(images))
    monkeypatch.undo()

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(room.os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"cannot keep features in .*No space left.*--no-cache"):
        made(cache, vit, Counted(images))
    monkeypatch.undo()
    assert equal(made(cache, vit, Counted(images)), uncached(vit, Counted(images), READING, WORK))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file"):
        made(Cache(tmp_path / "file" / "cache", 1), vit, Counted(images))
