"""Videos with masks: layouts, what values mean, and what cannot be followed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.davis import mask_png, open_videos, palette
from tests.data.benchmarks.moving_shapes import frame, write_davis, write_video

CONFIG = DataConfig()


def test_davis(tmp_path: Path) -> None:
    """The listed videos; a folder above or with the resolution left out is as good."""
    write_davis(tmp_path / "DAVIS", ("b", "a"))
    write_video(tmp_path / "DAVIS/JPEGImages/480p/c", tmp_path / "DAVIS/Annotations/480p/c", 2)
    for root in (tmp_path, tmp_path / "DAVIS"):
        assert [video.name for video in open_videos(str(root), CONFIG)] == ["b", "a"]
    (tmp_path / "DAVIS/ImageSets/2017/val.txt").unlink()
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / "DAVIS" / name / "480p").rename(tmp_path / name)
    videos = open_videos(str(tmp_path), CONFIG)
    assert [video.name for video in videos] == ["a", "b", "c"]
    assert [len(video) for video in videos] == [6, 6, 2]
    image, mask = frame(0.4, 48, 64)
    assert np.array_equal(videos[0].read(2), image)
    assert np.array_equal(videos[0].mask(2), mask)
    assert videos[0].masks.keys() == set(range(6))


def test_a_folder_of_frames(tmp_path: Path) -> None:
    """With a mask of the first frame, which may lie among them; or with a folder of masks of some. 2 is before 10."""
    write_video(tmp_path / "frames", tmp_path / "masks", 12)
    for path in (tmp_path / "frames").iterdir():
        path.rename(path.with_name(f"clip{int(path.stem)}.png"))
    first = (tmp_path / "masks/00000.png").rename(tmp_path / "frames/first.png")
    (video,) = open_videos(str(tmp_path / "frames"), CONFIG, first)
    assert [path.stem for path in video.frames] == [f"clip{i}" for i in range(12)]
    assert video.masks == {0: first}
    some = tmp_path / "some"
    some.mkdir()
    first.rename(some / "clip0.png")
    (tmp_path / "masks/00003.png").rename(some / "clip3.png")
    (video,) = open_videos(str(tmp_path / "frames"), CONFIG, some)
    assert {index: path.name for index, path in video.masks.items()} == {0: "clip0.png", 3: "clip3.png"}


def test_what_255_is(tmp_path: Path) -> None:
    """No object; or where the first mask has no other value, as in DAVIS 2016, the one object."""
    write_video(tmp_path / "frames", tmp_path / "masks", 2)
    for first, then, meaning in (([0, 2, 255], [255, 2, 0], [0, 2, 0]), ([0, 255, 0], [255, 255, 0], [1, 1, 0])):
        for index, values in enumerate((first, then)):
            mask = np.zeros((48, 64), np.uint8)
            mask[0, :3] = values
            Image.fromarray(mask).save(tmp_path / f"masks/0000{index}.png")
        (video,) = open_videos(str(tmp_path / "frames"), CONFIG, tmp_path / "masks")
        assert video.mask(1)[0, :3].tolist() == meaning


def test_masks_keep_their_values(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "a.png").write_bytes(mask_png(values))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), values)
        assert np.array_equal(np.asarray(image.convert("RGB")).reshape(256, 3), palette())
    assert palette()[[0, 1, 2, 3, 4, 8]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [64, 0, 0],
    ]  # fmt: skip


def paint(value: int, name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        mask = np.full((48, 64), value, np.uint8)
        Image.fromarray(mask).save(root / f"Annotations/480p/one/{name}.png")

    return change


def resize(path: str) -> Callable[[Path], None]:
    return lambda root: Image.new("L", (64, 50)).save(root / path)


def delete(*paths: str) -> Callable[[Path], None]:
    return lambda root: [path.unlink() for pattern in paths for path in [*root.glob(pattern)]] and None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (delete("JPEGImages/480p/one/0000[1-9].png"), "one needs two frames or more, it has 1"),
        (delete("JPEGImages/480p/one/*"), "one needs two frames or more, it has 0"),
        (delete("Annotations/480p/one/00000.png"), r"one has no mask of its first frame, 00000\.png"),
        (resize("Annotations/480p/one/00000.png"), r"00000\.png is of 64 x 50 pixels, and the first frame of 64 x 48"),
        (resize("JPEGImages/480p/one/00003.png"), r"JPEGImages.*00003\.png is of 64 x 50"),
        (paint(7, "00002"), r"00002\.png has an object 7, .*\[1, 2\]"),
        (paint(0, "00000"), r"mask of the first frame, 00000\.png, shows no object"),
        (lambda root: (root / "Annotations/480p/one/00001.png").write_bytes(b"x"), r"00001\.png"),
        (lambda root: (root / "ImageSets/2017/val.txt").write_text("absent"), "absent.*does not exist"),
        (lambda root: (root / "ImageSets/2017/val.txt").write_text(""), "names no video"),
    ],
)
def test_what_cannot_be_followed(change: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_davis(tmp_path, ("one",))
    change(tmp_path)
    with pytest.raises(ConfigError, match=says):
        open_videos(str(tmp_path), CONFIG)


def test_other_folders(tmp_path: Path) -> None:
    write_davis(tmp_path / "davis", ("one",))
    frames = tmp_path / "davis/JPEGImages/480p/one"
    with pytest.raises(ConfigError, match=r"no videos with masks\. Found in it: 00000\.png.*JPEGImages/480p/VIDEO"):
        open_videos(str(frames), CONFIG)
    with pytest.raises(ConfigError, match="leave --masks out"):
        open_videos(str(tmp_path / "davis"), CONFIG, frames)
    with pytest.raises(ConfigError, match="no mask of its first frame"):
        open_videos(str(frames), CONFIG, tmp_path / "absent.png")
    with pytest.raises(ConfigError, match="does not exist"):
        open_videos(str(tmp_path / "absent"), CONFIG)
