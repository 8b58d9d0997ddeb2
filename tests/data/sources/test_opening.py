"""What --data.root names is taken for what it is, or one message says what was found and what is taken."""

import shutil
from pathlib import Path

import pytest

from fastdino.cli import configured
from fastdino.config import ConfigError, DataConfig
from fastdino.data import FolderSource
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.opening import braces
from fastdino.data.sources.packed.images import PackedSource
from fastdino.data.sources.packed.shard import Packing
from tests.data.pictures import photos, write
from tests.data.sources.tars import names, opened, png, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of one image each."""
    for i in range(3):
        write_tar(tmp_path / "shards" / f"a-{i:03d}.tar", [(f"{i}.png", png(i))])
    return tmp_path / "shards"


def test_shards_are_named_in_any_way(shards, tmp_path, monkeypatch):
    cache, every = tmp_path / "cache", [f"a-{i:03d}.tar: {i}.png" for i in range(3)]
    for root in (shards, f"{shards}/*.tar", f"{shards}/a-{{000..002}}.tar", f"{shards}/a-{{000,001,002}}.tar"):
        assert names(opened(root, cache)) == every
    assert names(opened(f"{shards}/a-{{002..002}}.tar", cache)) == every[2:]
    assert names(opened(f"{shards}/a-{{002,000}}.tar", cache)) == [every[2], every[0]], "as they are given"
    assert names(opened(f"{shards}/a-00[12].tar", cache)) == every[1:]
    assert names(opened(f"{shards}/{{*1,*0}}.tar", cache)) == [every[1], every[0]]
    assert names(opened(shards / "a-001.tar", cache)) == every[1:2]
    words = ["--data.root", *sorted(map(str, shards.glob("*.tar"))), "--run.seed", "1"]
    assert names(opened(configured("vit_small_16", words).data.root, cache)) == every, "expanded by the shell"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(opened("~/shards/a-*.tar", cache)) == every
    monkeypatch.chdir(shards)
    source = opened("*.tar", cache)
    monkeypatch.chdir("/")
    assert source.read(2)[0].shape == (16, 16, 3), "a run may change its folder"


def test_a_name_is_taken_before_a_pattern(tmp_path):
    write_tar(tmp_path / "a[1].tar", [("a.png", png())])
    assert len(opened(tmp_path / "a[1].tar", tmp_path / "cache")) == 1
    write(tmp_path / "b{1..2}" / "a.png")
    assert isinstance(opened(tmp_path / "b{1..2}", tmp_path / "cache"), FolderSource)


@pytest.mark.parametrize("beside", ["x.txt", ".hidden.png", ".git/x.png", "classes.txt", "index.json"])
def test_shards_with_what_is_no_image(shards, tmp_path, beside):
    (shards / beside).parent.mkdir(exist_ok=True)
    (shards / beside).write_text("a")
    assert isinstance(opened(shards, tmp_path / "cache"), PackedSource)


@pytest.mark.parametrize("beside", ["x.png", "cat/x.png"])
def test_shards_among_images_are_left_over_from_unpacking(shards, tmp_path, beside, caplog):
    """As in ImageNet's folder, where the tar of a class may still lie beside its folder."""
    write(shards / beside)
    assert names(opened(shards, tmp_path / "cache")) == [beside]
    assert f"1 images are used, and not the 3 .tar files beside them; for these give {shards}/*.tar" in caplog.text


def test_a_folder_of_folders_of_shards_says_what_it_holds(shards, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no images. Found below it: 3 with \.tar.*Give .*\.tar shards"):
        opened(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("{}/nowhere", r"/nowhere' does not exist: give a folder of images, \.tar shards or \.parquet"),
        ("{}/nowhere.tar", r"/nowhere\.tar' does not exist: give"),
        ("{}/*.bin", r"there is no file .*/\*\.bin. Give a folder"),
        ("{}/*.tgz", r"names a \.tgz"),
        ("{}/a-{{000..003}}.tar", r"there is no file .*/a-003\.tar"),
        ("{}/a-{{000..001}}.tarr", r"there is no file .*/a-000\.tarr"),
        ("{}/x.tar.gz", r"names a \.tar\.gz, and images inside a compressed archive .* unpack it"),
        ("{}/x.tgz", r"names a \.tgz"),
        ("{}/x.zip", r"names \.zip: give a folder"),
        ("{}/README", r"names no ending: give a folder"),
        ("{}/{{x.zip,a-000.tar}}", r"names \.tar and \.zip"),
    ],
)
def test_a_wrong_root_is_one_message(shards, tmp_path, root, says):
    for name in ("x.tar.gz", "x.tgz", "x.zip", "README"):
        (shards / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=says):
        opened(root.format(shards), tmp_path / "cache")


@pytest.mark.parametrize("judged", ["val", "imagenet-validation", "Test", "data_test_"])
def test_shards_of_several_splits_are_not_mixed_up(shards, tmp_path, judged):
    shutil.move(shards / "a-000.tar", shards / "train-000.tar")
    assert len(opened(shards, tmp_path / "cache")) == 3
    shutil.move(shards / "a-001.tar", shards / f"{judged}-001.tar")
    with pytest.raises(ConfigError, match=rf"several splits, such as .*{judged}-001.*such as .*/\*train\*\.tar"):
        opened(shards, tmp_path / "cache")
    assert names(opened(f"{shards}/*train*.tar", tmp_path / "cache")) == ["train-000.tar: 0.png"]


def test_splits_of_shards_are_judged_as_those_of_folders(tmp_path):
    """The same bank, test images and classes; and half of each, with classes that are numbered the same."""
    data = DataConfig(cache=tmp_path / "cache")
    for split in ("train", "val"):
        photos(tmp_path / "folders" / split)
        Packing(per_shard=7, workers=1, cache=data.cache)(str(tmp_path / "folders" / split), tmp_path / "tars" / split)
    want, found = (bank_and_test(str(tmp_path / kind), data) for kind in ("folders", "tars"))
    assert found.rule == want.rule
    for a, b in zip(found[:2], want[:2], strict=True):
        assert a.labels == b.labels
        assert [a.encoded(i) for i in range(len(a))] == [b.encoded(i) for i in range(len(b))]
        assert [a.label(i) for i in range(len(a))] == [b.label(i) for i in range(len(b))]
    strided = bank_and_test(str(tmp_path / "tars" / "train"), data)
    assert len(strided.bank) == 16
    with pytest.raises(ConfigError, match=r"holds train/ and val/: give .*/train"):
        opened(tmp_path / "tars", data.cache)


def test_braces():
    assert braces("a") == ["a"]
    assert braces("{8..11}") == ["8", "9", "10", "11"]
    assert braces("x{08..10}y") == ["x08y", "x09y", "x10y"]
    assert braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert braces("{5..4}") == []
