"""Landmarks as their authors lay them out, and what is refused of them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.landmarks import Landmarks, is_landmarks, open_landmarks
from tests.data.benchmarks.layouts import (
    DATABASE,
    QUERIES,
    TRUE,
    google,
    ground_truth,
    revisited,
    table,
    write_mat,
    write_pickle,
)
from tests.data.pictures import photo, write


def opened(root: Path, distractors: Path | None = None) -> Landmarks:
    return open_landmarks(root, DataConfig(), distractors)


def told(found: Landmarks) -> list[dict[str, list[int]]]:
    return [{kind: getattr(x, kind).tolist() for kind in ("easy", "hard", "junk")} for x in found.relevant]


def check(found: Landmarks) -> None:
    assert found.name == "roxford5k"
    assert [found.database.name(i) for i in range(6)] == [f"{name}.jpg" for name in DATABASE]
    assert [found.queries.name(i) for i in range(2)] == [f"{name}.jpg" for name in QUERIES]
    assert told(found) == [{kind: x for kind, x in query.items() if kind != "bbx"} for query in TRUE]
    assert found.boxes is not None
    assert found.boxes.tolist() == [query["bbx"] for query in TRUE]
    assert found.database.read(0)[0].shape == (30, 40, 3)


@pytest.mark.parametrize("arrays", [True, False], ids=["arrays", "lists"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_the_pickle_of_the_revisited_protocol(tmp_path: Path, protocol: int, arrays: bool) -> None:
    folder = revisited(tmp_path)
    write_pickle(folder, protocol, arrays=arrays)
    check(opened(folder))
    check(opened(tmp_path))  # the folder above it will do
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(ground_truth(arrays), protocol))  # by Python 3
    check(opened(folder))


def test_the_mat_of_the_revisited_protocol(tmp_path: Path) -> None:
    folder = revisited(tmp_path)
    write_mat(folder)
    check(opened(folder))
    write_mat(folder, TRUE[:1], QUERIES[:1])  # of one query, Matlab's lists are no lists
    assert told(opened(folder)) == [{"easy": [0], "hard": [1, 4], "junk": [2]}]


class Harm:
    """Unpickled blindly, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


class Evaluated(Harm):
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"__import__('os').mkdir({str(self.folder)!r})",)


class Plain:
    """An object of a class, whose state is a dict."""


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("made", [Harm, Evaluated])
def test_a_pickle_that_runs_something_is_refused_before_it_does(
    tmp_path: Path, made: type[Harm], protocol: int
) -> None:
    folder = revisited(tmp_path)
    harm = ground_truth() | {"imlist": made(tmp_path / "harm")}
    file = folder / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(harm, protocol))
    with pytest.raises(ConfigError, match=r"was not read: it holds (posix\.mkdir|(__)?builtins?(__)?\.eval)"):
        opened(folder)
    assert not (tmp_path / "harm").exists()
    pickle.loads(file.read_bytes())  # the pickle would have
    assert (tmp_path / "harm").exists()


def test_other_pickles_are_refused(tmp_path: Path) -> None:
    folder = revisited(tmp_path)
    file = folder / "gnd_roxford5k.pkl"
    for harm, says in [
        (pickle.dumps(Plain()), r"it holds .*\.Plain"),
        (b"cos\nsystem\n(S'true'\ntR.", r"it holds os\.system"),
        (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "it holds the codec rot13"),
        (b"not a pickle", "is no pickle, or not a whole one"),
        (b"", "is no pickle, or not a whole one"),
        (pickle.dumps(ground_truth())[:-9], "is no pickle, or not a whole one"),
        (pickle.dumps([1, 2]), "found list; looked for"),
        (pickle.dumps({"imlist": []}), "found imlist; looked for"),
    ]:
        file.write_bytes(harm)
        with pytest.raises(ConfigError, match=says):
            opened(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bbx": [3, 3, 3, 9]}, "bbx must be left, top, right, bottom"),
        ({"bbx": [3, 3, 9]}, "bbx must be left, top, right, bottom"),
        ({"easy": [6]}, r"easy must be places in imlist, from 0 to 5, and holds \[6\]"),
        ({"hard": [-1]}, "hard must be places"),
        ({"junk": [0.5]}, "junk must be places"),
        ({"junk": ["a"]}, "junk must be numbers"),
        ({"easy": [float("nan")]}, "easy must be finite"),
    ],
)
def test_ground_truth_that_is_not_as_it_should_be(tmp_path: Path, change: dict[str, list[float]], says: str) -> None:
    folder = revisited(tmp_path)
    told = ground_truth()
    told["gnd"][1] |= change
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(told))
    with pytest.raises(ConfigError, match=f"query oxford_002985.*{says}"):
        opened(folder)


def test_ground_truth_of_another_kind(tmp_path: Path) -> None:
    folder = revisited(tmp_path)
    file = folder / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(ground_truth(true=TRUE[:1])))
    with pytest.raises(ConfigError, match="2 queries in qimlist, and 1 entries in gnd"):
        opened(folder)
    file.write_bytes(pickle.dumps({**ground_truth(), "gnd": [{"bbx": [0, 0, 1, 1], "ok": [1], "junk": []}] * 2}))
    with pytest.raises(ConfigError, match=r"found bbx, junk, ok; looked for .*before it was revisited"):
        opened(folder)
    write_mat(
        folder, [{**TRUE[0], "easy": [-1]}], QUERIES[:1]
    )  # a place that counts from 0 in a file that counts from 1
    with pytest.raises(ConfigError, match="easy must be places in imlist, from 1 to 6"):
        opened(folder)
    (folder / "gnd_roxford5k.mat").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"is no \.mat"):
        opened(folder)


def test_images_that_are_not_there(tmp_path: Path) -> None:
    folder = revisited(tmp_path)
    write_pickle(folder)
    for name in DATABASE[:4]:
        (folder / "jpg" / f"{name}.jpg").unlink()
    with pytest.raises(ConfigError, match=r"lacks 4 of 6 images that gnd_roxford5k.pkl names: all_souls_000000.jpg, "):
        opened(folder)


def test_distractors_come_behind(tmp_path: Path) -> None:
    folder, more = revisited(tmp_path), tmp_path / "revisitop1m"
    write_pickle(folder)
    with pytest.raises(ConfigError, match=r"cannot read revisitop1m\.txt"):
        opened(folder, more)
    write(more / "jpg" / "0a" / "x.jpg", photo(20, 30))
    (more / "revisitop1m.txt").write_text("0a/x.jpg\n")
    found = opened(folder, more)
    assert len(found.database) == 7
    assert found.database.read(6)[0].shape == (30, 20, 3)
    assert np.array_equal(found.database.read(5)[0], opened(folder).database.read(5)[0])
    with pytest.raises(ConfigError, match="is Google Landmarks v2"):
        opened(google(tmp_path / "g"), more)


def test_google_landmarks(tmp_path: Path) -> None:
    found = opened(google(tmp_path))
    assert [found.queries.name(i) for i in range(len(found.queries))] == ["f/b/b/fbbf.jpg", "h/b/b/hbbh.jpg"]
    assert [x.easy.tolist() for x in found.relevant] == [[0, 3], [2]]
    assert found.parts == ["Private", "Public"]
    assert len(found.database) == 5
    solution = tmp_path / "retrieval_solution_v2.1.csv"
    for rows, says in [
        ([("id", "images"), ("fbbf", "0aa0")], r"has columns \['id', 'images'\]; looked for Usage"),
        ([("id", "images", "Usage"), ("fbbf", "9zz9", "Private")], "9zz9 is not in index_image_to_landmark.csv"),
        ([("id", "images", "Usage"), ("fbbf", "", "Private")], "line 2: a row lacks one of"),
        ([("id", "images", "Usage"), ("fbbf", "None", "Ignored")], "no query that is not Ignored"),
        ([("id", "images", "Usage"), ("abba", "0aa0", "Public")], "lacks 1 of 1 images that .*: a/b/b/abba.jpg"),
    ]:
        table(solution, rows)
        with pytest.raises(ConfigError, match=says):
            opened(tmp_path)
    solution.unlink()
    with pytest.raises(ConfigError, match=r"not of a known layout: found index, index_image_to_landmark\.csv, test"):
        opened(tmp_path)


def test_unknown_layouts(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match=r"found a\.jpg; looked for jpg/ beside gnd_roxford5k"):
        opened(tmp_path)
    for name in ("roxford5k", "rparis6k"):
        write_pickle(revisited(tmp_path, name))
    with pytest.raises(ConfigError, match="holds roxford5k and rparis6k: give one"):
        opened(tmp_path)
    assert is_landmarks(tmp_path)
    assert opened(tmp_path / "rparis6k").name == "rparis6k"


def test_landmarks_are_told_by_their_names(tmp_path: Path) -> None:
    """Also where a part is missing: folders of images of other kinds would be taken for classes."""
    for told in ("a/roxford5k/jpg/x.jpg", "b/jpg/x.jpg", "c/index/0/x.jpg", "c/test/0/x.jpg", "d/gnd_x.mat"):
        (tmp_path / told).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / told).touch()
    for told in ("a", "a/roxford5k", "b", "c", "d"):
        assert is_landmarks(tmp_path / told), told
        with pytest.raises(ConfigError, match="is not of a known layout"):
            opened(tmp_path / told)
    for other in ("e/gnd_floor/x.jpg", "e/first_floor/x.jpg", "f/train/a/x.jpg", "f/test/a/x.jpg"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).touch()
    assert not any(is_landmarks(tmp_path / other) for other in ("e", "f", "none"))
