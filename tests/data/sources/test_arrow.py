"""Parquet, and folders that Hugging Face's ``datasets`` saved: real files of both, whole and damaged."""

import builtins
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from fastdino.config import ConfigError, DataConfig
from fastdino.data import BadImage, FolderSource
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.packed.shard import Packing
from tests.data.batches import assert_equal, make_config, take
from tests.data.pictures import noise, photos
from tests.data.sources.tars import names, opened, png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def table(**columns: Any) -> Any:
    return pa.table(columns)


def of_folder(folder: FolderSource, kind: str = "struct") -> Any:
    """The images of a folder as a table, as Hugging Face writes it or as plain bytes."""
    data, names = [folder.encoded(i) for i in range(len(folder))], [folder.name(i) for i in range(len(folder))]
    images: Any = [{"bytes": d, "path": n} for d, n in zip(data, names, strict=True)] if kind == "struct" else data
    return table(id=list(range(len(folder))), image=images, label=[folder.label(i) for i in range(len(folder))])


@pytest.mark.parametrize("kind", ["struct", "binary"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_an_epoch_of_parquet_is_that_of_the_folder(tmp_path, kind, compression):
    folder = FolderSource(photos(tmp_path / "photos"))
    whole = of_folder(folder, kind)
    (tmp_path / "p").mkdir()
    for number, (start, stop) in enumerate([(0, 7), (7, 20)]):
        pq.write_table(whole[start:stop], tmp_path / f"p/{number}.parquet", compression=compression, row_group_size=3)
    source = opened(tmp_path / "p", tmp_path / "cache")
    assert [source.encoded(i) for i in range(20)] == [folder.encoded(i) for i in range(20)]
    assert [source.label(i) for i in range(20)] == [folder.label(i) for i in range(20)]
    assert source.labels == ["0", "1"]
    assert source.name(9) == "1.parquet: row 2.jpg"
    want = take(10, make_config(), folder)
    assert_equal(take(10, make_config(2), source), want)
    assert_equal(take(4, make_config(), opened(f"{tmp_path}/p/*.parquet", tmp_path / "cache"), step=6), want[6:])


def saved(path: Path, folder: FolderSource, shards: int = 2, **options: Any) -> Any:
    """The folder as a Dataset, saved to ``path``."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = of_folder(folder)
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=folder.labels)}
    )
    made = datasets.Dataset.from_dict(whole.to_pydict(), features=features)
    made.save_to_disk(path, num_shards=shards, **options)
    return made


def test_an_epoch_of_a_saved_dataset_is_that_of_the_folder(tmp_path):
    folder = FolderSource(photos(tmp_path / "photos"))
    saved(tmp_path / "hf", folder)
    source = opened(tmp_path / "hf", tmp_path / "cache")
    assert source.labels == folder.labels == ["cat", "dog"]
    assert [source.encoded(i) for i in range(20)] == [folder.encoded(i) for i in range(20)]
    assert [source.read(i)[1] for i in range(20)] == [folder.label(i) for i in range(20)]
    assert source.name(12) == "data-00001-of-00002.arrow: row 2"
    assert not list(tmp_path.rglob("cache/files/*")), "read in place"
    want = take(10, make_config(), folder)
    assert_equal(take(10, make_config(2), source), want)
    assert_equal(take(4, make_config(), source, step=6), want[6:])


def test_a_dataset_that_was_changed_before_it_was_saved(tmp_path):
    """Rows that were selected, shuffled and joined: several batches, offsets within them."""
    datasets = pytest.importorskip("datasets")
    folder = FolderSource(photos(tmp_path / "photos"))
    made = saved(tmp_path / "first", folder)
    some = datasets.concatenate_datasets([made.select([5, 3, 19]), made.shuffle(seed=1).select(range(4)), made])
    some.save_to_disk(tmp_path / "hf")
    source = opened(tmp_path / "hf", tmp_path / "cache")
    raw = some.cast_column("image", datasets.Image(decode=False))
    assert [source.encoded(i) for i in range(27)] == [row["image"]["bytes"] for row in raw]
    assert [source.label(i) for i in range(27)] == some["label"][:]


def test_parquet_that_datasets_wrote_names_its_classes(tmp_path):
    folder = FolderSource(photos(tmp_path / "photos"))
    saved(tmp_path / "hf", folder).to_parquet(tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", tmp_path / "cache").labels == ["cat", "dog"]


def test_splits_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = FolderSource(photos(tmp_path / "photos"))
    made = saved(tmp_path / "hf", folder)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"holds test/ and train/: give .*/both/train"):
        opened(tmp_path / "both", tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"holds splits of a dataset: give the folder of one, such as .*/one/train"):
        opened(tmp_path / "one", tmp_path / "cache")
    bank, test, _ = bank_and_test(str(tmp_path / "both"), DataConfig(cache=tmp_path / "cache"))
    assert bank.labels == test.labels == ["cat", "dog"]
    assert len(bank) == len(test) == 20


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_without_an_image(tmp_path, kind):
    """Null, a null inside, no bytes, no image: each is counted with its reason, the others are read."""
    images = [png(0), None, b"", b"text", png(4)]
    whole = table(image=[None if i == 1 else {"bytes": d} for i, d in enumerate(images)], label=[1, 2, None, -1, 1])
    source = opened(written(tmp_path, whole, kind), tmp_path / "cache")
    assert [source.label(i) for i in range(5)] == [0, 1, -1, -1, 0]
    for i, says in {1: "null", 2: "holds no bytes", 3: "of 4 bytes"}.items():
        with pytest.raises(BadImage, match=rf"row {i}.*{says}"):
            source.read(i)
    assert [np.array_equal(source.read(i)[0], noise(i)) for i in (0, 4)] == [True, True]
    inside = table(image=[{"bytes": None, "path": "x.png"}, {"bytes": png(), "path": None}])
    source = opened(written(tmp_path, inside, kind), tmp_path / "cache")
    with pytest.raises(BadImage, match=r"row 0.*null"):
        source.read(0)
    assert source.encoded(1) == png()
    masked = pa.StructArray.from_arrays([pa.array([png(), png()])], ["bytes"], mask=pa.array([True, False]))
    source = opened(written(tmp_path, pa.table({"image": masked}), kind), tmp_path / "cache")
    with pytest.raises(BadImage, match=r"row 0.*null"):
        source.read(0)
    assert source.encoded(1) == png()


def written(folder: Path, whole: Any, kind: str, name: str = "a") -> Path:
    """A table as parquet, or as ``datasets`` lays its Arrow file out; the path to give."""
    if kind == "parquet":
        pq.write_table(whole, folder / f"{name}.parquet")
        return folder / f"{name}.parquet"
    (folder / name).mkdir(exist_ok=True)
    with pa.OSFile(str(folder / name / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=2)
    (folder / name / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / name / "dataset_info.json").write_text("{}")
    return folder / name


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_are_found_and_chosen(tmp_path, kind):
    whole = table(thumb=[png(1)], photo=[png(2)], text=["x"], kind=["owl"], label=[[1, 2]])
    root = written(tmp_path, whole, kind)
    assert opened(root, tmp_path / "cache").encoded(0) == png(2)
    source = opened(root, tmp_path / "cache", image_column="thumb", label_column="kind")
    assert source.encoded(0) == png(1)
    assert source.labels == ["owl"]
    for setting, value, says in [
        ("image_column", "x", r"no column data\.image_column=x: it has thumb \(binary\), photo \(binary\), text"),
        ("image_column", "text", r"which column holds encoded images.*\? text holds none; it has thumb"),
        ("label_column", "y", r"no column data\.label_column=y: it has thumb"),
        ("label_column", "label", r"data\.label_column=label holds no classes by name or number; it has"),
    ]:
        with pytest.raises(ConfigError, match=says):
            opened(root, tmp_path / "cache", **{setting: value})
    for columns, says in [
        ({"a": [png()], "b": [png()]}, r"which column .*\? name one by data\.image_column; it has a \(binary\), b"),
        ({"url": ["x"]}, r"which column .*; it has url \(string\)"),
    ]:
        with pytest.raises(ConfigError, match=says):
            opened(written(tmp_path, table(**columns), kind, "b"), tmp_path / "cache")
    assert opened(written(tmp_path, table(only=[png(5)]), kind, "c"), tmp_path / "cache").encoded(0) == png(5)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("values", [["b", "a", None], [True, False, None], "dictionary"], ids=str)
def test_classes_of_any_type(tmp_path, kind, values):
    if values == "dictionary":
        values = pa.array(["b", "a", None]).dictionary_encode()
    source = opened(written(tmp_path, table(image=[png()] * 3, label=values), kind), tmp_path / "cache")
    assert source.labels == (["False", "True"] if values[0] is True else ["a", "b"])
    assert [source.label(i) for i in range(3)] == [1, 0, -1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_binary_of_any_width_and_batches_that_are_cut(tmp_path, kind):
    column = pa.array([png(i) for i in range(9)], kind)
    source = opened(written(tmp_path, pa.table({"image": column})[2:7], "arrow"), tmp_path / "cache")
    assert [source.encoded(i) for i in range(5)] == [png(i) for i in range(2, 7)]
    schema = pa.schema([("image", kind)])
    with pa.OSFile(str(tmp_path / "a/data.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table({"image": column}), max_chunksize=4)
    source = opened(tmp_path / "a", tmp_path / "cache")
    assert [source.encoded(i) for i in range(9)] == [png(i) for i in range(9)]


def test_a_compressed_arrow_file(tmp_path):
    root = written(tmp_path, table(image=[png()]), "arrow")
    schema, options = pa.schema([("image", pa.binary())]), pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(root / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_table(table(image=[bytes(5000)]))
    with pytest.raises(ConfigError, match=r"data\.arrow is compressed: save the dataset again"):
        opened(root, tmp_path / "cache")


def test_files_that_are_damaged_are_one_message(tmp_path):
    path = written(tmp_path, table(image=[png(i) for i in range(30)]), "parquet")
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:1000], whole[:-8] + bytes(8), b"<html>"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"cannot read .*a\.parquet as parquet: ") as caught:
            opened(path, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:50] + bytes(200) + whole[250:])  # a page, not the footer
    with pytest.raises(ConfigError, match=r"cannot read .*a\.parquet as parquet: "):
        opened(path, tmp_path / "cache")
    assert not list((tmp_path / "cache/files").glob("*.parquet"))
    root = written(tmp_path, table(image=[png(i) for i in range(30)]), "arrow")
    whole = (root / "data.arrow").read_bytes()
    for data in (b"", b"text", whole[:100]):
        (root / "data.arrow").write_bytes(data)
        with pytest.raises(ConfigError, match=r"is not a whole dataset|cannot read .*data\.arrow|no image in"):
            opened(root, tmp_path / "cache")
    (root / "data.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cannot read .*data\.arrow"):
        opened(root, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["state", "data", "text"])
def test_a_saved_folder_that_is_not_whole(tmp_path, damage):
    root = written(tmp_path, table(image=[png()]), "arrow")
    if damage == "data":
        (root / "data.arrow").unlink()
    else:
        (root / "state.json").write_text("[" if damage == "text" else "[]")
    with pytest.raises(ConfigError, match=r"a is not a whole dataset as datasets\.save_to_disk writes it: \w+"):
        opened(root, tmp_path / "cache")


def test_a_table_without_rows(tmp_path):
    empty = pa.table({"image": pa.array([], pa.binary())})
    for kind in ("parquet", "arrow"):
        with pytest.raises(ConfigError, match="no image in 1 file"):
            opened(written(tmp_path, empty, kind), tmp_path / "cache")


def test_parquet_is_unpacked_once_and_again_when_it_changed_or_was_pushed_out(tmp_path):
    path = written(tmp_path, table(image=[png(i) for i in range(3)]), "parquet")
    source = opened(path, tmp_path / "cache")
    (unpacked,) = (tmp_path / "cache/files").glob("*.parquet")
    made = unpacked.stat().st_ino
    opened(path, tmp_path / "cache")
    assert unpacked.stat().st_ino == made
    unpacked.unlink()
    assert source.encoded(2) == png(2)
    written(tmp_path, table(image=[png(i) for i in range(5, 7)]), "parquet")
    assert [opened(path, tmp_path / "cache").encoded(i) for i in range(2)] == [png(5), png(6)]
    with pytest.raises(ConfigError, match=r"a\.parquet and the files with it take .* GB, and data\.cache_gb=0"):
        opened(path, tmp_path / "cache", cache_gb=0)


def test_parquet_is_packed(tmp_path):
    path = written(tmp_path, table(a=[png(i) for i in range(5)], b=[png(9)] * 5, kind=list("yxyxy")), "parquet")
    packing = {"workers": 1, "cache": tmp_path / "cache", "image_column": "a", "label_column": "kind"}
    Packing(per_shard=2, **packing)(str(path), tmp_path / "out")
    source = opened(tmp_path / "out", tmp_path / "cache")
    assert [source.encoded(i) for i in range(5)] == [png(i) for i in range(5)]
    assert [source.labels[source.label(i)] for i in range(5)] == list("yxyxy")


def test_parquet_behind_a_url(tmp_path):
    system = fsspec.filesystem("memory")
    for i in range(2):
        system.pipe(f"/p/{i}.parquet", written(tmp_path, table(image=[png(i)]), "parquet").read_bytes())
    source = opened("memory://p", tmp_path / "cache")
    system.store.clear()
    assert names(source) == ["0.parquet: row 0.jpg", "1.parquet: row 0.jpg"]
    assert [source.encoded(i) for i in range(2)] == [png(0), png(1)]


def test_files_of_several_data_sets(tmp_path):
    folder = FolderSource(photos(tmp_path / "photos"))
    other = FolderSource(photos(tmp_path / "others", ("owl", "wren")))
    (tmp_path / "p").mkdir()
    saved(tmp_path / "x", folder).to_parquet(tmp_path / "p/0.parquet")
    saved(tmp_path / "y", other).to_parquet(tmp_path / "p/1.parquet")
    with pytest.raises(ConfigError, match=r"1\.parquet names other classes than 0\.parquet"):
        opened(tmp_path / "p", tmp_path / "cache")
    for name in ("train-0", "test-0"):
        pq.write_table(table(image=[png()]), tmp_path / f"{name}.parquet")
    with pytest.raises(ConfigError, match=r"several splits, such as .*\*train\*\.parquet"):
        opened(f"{tmp_path}/*.parquet", tmp_path / "cache")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path, table(image=[png()]), "parquet")
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"are read with pyarrow: pip install 'fastdino\[parquet\]'"):
        opened(path, tmp_path / "cache")
