"""Manifests: CSV and JSONL as people write them, and the line of every mistake."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastdino.config import ConfigError
from fastdino.data import BadImage, FolderSource
from tests.data.batches import assert_equal, make_config, take
from tests.data.pictures import noise, photos, write
from tests.data.sources.tars import names, opened


def write_manifest(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("path", "label")) -> Path:
    if path.suffix == ".csv":
        path.write_text("".join(",".join(row) + "\n" for row in [header, *rows]))
    else:
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_epoch_of_a_manifest_is_that_of_the_folder(tmp_path, kind):
    folder = FolderSource(photos(tmp_path / "photos"))
    rows = [(folder.name(i), folder.labels[folder.label(i)]) for i in range(len(folder))]
    manifest = opened(write_manifest(tmp_path / "photos" / f"list.{kind}", rows), tmp_path / "cache")
    assert manifest.labels == folder.labels
    assert [manifest.label(i) for i in range(20)] == [folder.label(i) for i in range(20)]
    assert [manifest.encoded(i) for i in range(20)] == [folder.encoded(i) for i in range(20)]
    assert manifest.name(3) == f"list.{kind}, line {5 if kind == 'csv' else 4}: cat/03.png"
    want = take(10, make_config(), folder)
    assert_equal(take(10, make_config(2), manifest), want)
    assert_equal(take(4, make_config(), manifest, step=6), want[6:])


def test_csv_as_people_write_it(tmp_path):
    for name in ("a b,c.png", "\u00fcber.png", "plain.png"):
        write(tmp_path / "x" / name)
    write(tmp_path / "far.png", noise(7))
    rows = [
        "id, file_name ,class",
        '1,"x/a b,c.png",cat',
        "",
        '2,x/\u00fcber.png,"a ""dog"""',
        f"3,{tmp_path}/far.png,",
    ]
    text = "\ufeff" + "\r\n".join(rows) + '\r\n4,x/plain.png,"cat\n"\n5,x/plain.png,cat'
    (tmp_path / "list.csv").write_text(text, newline="")
    source = opened(tmp_path / "list.csv", tmp_path / "cache")
    assert source.labels == ['a "dog"', "cat"]
    assert [source.label(i) for i in range(5)] == [1, 0, -1, 1, 1]
    assert [source.name(i).split(":")[0] for i in range(5)] == [f"list.csv, line {n}" for n in (2, 4, 5, 7, 8)]
    assert np.array_equal(source.read(2)[0], noise(7))
    assert [source.read(i)[0].shape for i in range(5)] == [(16, 16, 3)] * 5


def test_jsonl_as_people_write_it(tmp_path):
    write(tmp_path / "a.png")
    rows = [{"image": "a.png", "label": 10, "tags": ["x"]}, {"image": "a.png", "label": 9}, {"image": "a.png"}]
    rows += [{"label": -1, "image": "./a.png"}, {"label": None, "image": str(tmp_path / "a.png")}]
    (tmp_path / "l.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    source = opened(tmp_path / "l.jsonl", tmp_path / "cache")
    assert source.labels == ["9", "10"]
    assert [source.label(i) for i in range(5)] == [1, 0, -1, -1, -1]
    assert source.name(4).startswith("l.jsonl, line 9: ")
    assert len({source.read(i)[0].tobytes() for i in range(5)}) == 1


def test_columns_are_chosen(tmp_path):
    write(tmp_path / "a.png", noise(1))
    write(tmp_path / "b.png", noise(2))
    header = ("path", "label", "clean", "species")
    write_manifest(tmp_path / "l.csv", [("a.png", "1", "b.png", "owl")], header)
    source = opened(tmp_path / "l.csv", tmp_path / "cache", image_column="clean", label_column="species")
    assert source.labels == ["owl"]
    assert np.array_equal(source.read(0)[0], noise(2))
    for setting in ("image_column", "label_column"):
        with pytest.raises(ConfigError, match=rf"no column data\.{setting}=x: it has path, label, clean, species"):
            opened(tmp_path / "l.csv", tmp_path / "cache", **{setting: "x"})


def test_a_file_that_is_not_there_is_a_bad_image_of_its_line(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "d.png").mkdir()
    write_manifest(tmp_path / "l.csv", [("a.png",), ("b.png",), ("c.png",), ("d.png",), ("e\0.png",)], ("path",))
    source = opened(tmp_path / "l.csv", tmp_path / "cache")
    assert source.labels == []
    for i, says in enumerate(["no bytes", "FileNotFoundError", "not a file but", "null"], 1):
        for read in (source.read, source.encoded):
            if i == 1 and read == source.encoded:
                continue  # it holds no bytes, and that is what it gives
            with pytest.raises(BadImage, match=rf"l\.csv, line {i + 2}: {'abcde'[i]}.*png: .*{says}"):
                read(i)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("csv", "", "has no column path or file or .*: it has none"),
        ("csv", "path\n", "lists no images"),
        ("csv", "id,url\n1,a.png\n", r"it has id, url\. Name that of the images: data\.image_column"),
        ("csv", "a.png\nb.png\n", r"has no column path .*: it has a\.png"),
        ("csv", "path,label\na.png,cat\na.png\n", "line 3: 1 values, and the first line names 2 columns"),
        ("csv", "path,label\na.png,cat\na,b.png,dog\n", "line 3: 3 values"),
        ("csv", "path,label\na.png,cat\n,dog\n", "line 3: the row names no file"),
        ("csv", 'path,label\n"a.png,cat\n', "line 2: not CSV"),
        ("jsonl", "", "lists no images"),
        ("jsonl", '{"path": "a.png"}\n{"path": "a', "line 2: not JSON"),
        ("jsonl", '{"path": "a.png"}\n\n["a.png"]', r"line 3: not an object such as \{\"path\""),
        ("jsonl", '{"path": "a.png"}\n{"label": 1}', "line 2: the row names no file: path is null"),
        ("jsonl", '{"path": 7}', "line 1: the row names no file: path is 7"),
        ("jsonl", '{"path": ""}', "line 1: the row names no file"),
        ("jsonl", '{"path": "a.png", "label": [1]}', r"line 1: label is \[1\], not a class"),
        ("jsonl", '{"url": "a.png"}', "has no column path .*: it has url"),
        ("jsonl", "[" * 100000, "line 1: not JSON"),
    ],
)
def test_a_mistake_is_named_by_its_line(tmp_path, kind, text, says):
    (tmp_path / f"l.{kind}").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        opened(tmp_path / f"l.{kind}", tmp_path / "cache")
    assert str(tmp_path / f"l.{kind}") in str(caught.value)


def test_a_path_in_any_encoding(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "caf\udce9.png")
    (tmp_path / "l.csv").write_bytes(b"path\ncaf\xe9.png\n")
    source = opened(tmp_path / "l.csv", tmp_path / "cache")
    assert names(source) == ["l.csv, line 2: caf\\xe9.png"]
    assert source.read(0)[0].shape == (16, 16, 3)


def test_fingerprints_follow_the_list(tmp_path):
    rows = [("a.png", "1"), ("b.png", "2")]
    (tmp_path / "there").mkdir()
    prints = [
        opened(write_manifest(tmp_path / name, rows), tmp_path / "cache").fingerprint()
        for name, rows in (("l.csv", rows), ("there/m.jsonl", rows), ("n.csv", rows[::-1]), ("o.csv", rows[:1]))
    ]
    assert prints[0] == prints[1]
    assert len({*prints}) == 3


def test_several_manifests(tmp_path):
    for name in "ab":
        write_manifest(tmp_path / f"{name}.csv", [("a.png", "1")])
    with pytest.raises(ConfigError, match="names 2 manifests: give one"):
        opened(f"{tmp_path}/*.csv", tmp_path / "cache")
