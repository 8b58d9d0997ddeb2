"""Landmarks: the revisited Oxford and Paris (Radenovic et al. 2018), and Google Landmarks v2 (Weyand et al. 2020)."""

import csv
import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.composed import Mixture
from fastdino.data.sources.folder import FileSource
from fastdino.data.sources.source import Room, Source

REVISITED = ("roxford5k", "rparis6k")
DISTRACTORS = "revisitop1m"
LOOKED_FOR = (
    "jpg/ beside gnd_roxford5k.mat or .pkl (or those of rparis6k), or index/, test/, index_image_to_landmark.csv and "
    "retrieval_solution_v2.1.csv of Google Landmarks v2"
)
_RETRIEVAL_CSV, _INDEX_CSV = "retrieval_solution_v2.1.csv", "index_image_to_landmark.csv"
_NAMED = 3  # missing images that a message names


@dataclass(frozen=True)
class Relevant:
    """What a query's images in the database are: int64 places there. All others are wrong."""

    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray
    """Neither right nor wrong."""


@dataclass(frozen=True)
class Landmarks:
    """Queries, the images that are searched for them, and what is true."""

    name: str
    queries: Source
    database: Source
    relevant: list[Relevant]
    """Of each query."""
    boxes: np.ndarray | None = None
    """(queries, 4) fp64: left, top, right, bottom in pixels of what shows the landmark; None where it is unknown."""
    parts: list[str] | None = None
    """Of each query, Public or Private, in Google Landmarks v2."""


class Cropped:
    """Images of a source of which a part alone is seen, as the revisited protocol sees its queries.

    Args:
        source: the images.
        boxes: (len(source), 4) left, top, right, bottom in pixels, which are rounded; what lies outside is left out.
    """

    def __init__(self, source: Source, boxes: np.ndarray) -> None:
        self.source, self.boxes, self.labels = source, boxes, source.labels

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """Image and label, as in the source; the whole image where nothing of it lies in the box."""
        image, label = self.source.read(index)
        left, top, right, bottom = (max(0, round(x)) for x in self.boxes[index].tolist())
        seen = image[top:bottom, left:right]
        return np.ascontiguousarray(seen) if seen.size else image, label

    def encoded(self, index: int) -> bytes:
        """The whole image, as in the source."""
        return self.source.encoded(index)

    def label(self, index: int) -> int:
        """As in the source."""
        return self.source.label(index)

    def name(self, index: int) -> str:
        """As in the source."""
        return self.source.name(index)

    def fingerprint(self) -> str:
        """Of the source, and of the boxes."""
        return self._of(self.source.fingerprint())

    def stamp(self) -> str:
        """Likewise."""
        return self._of(self.source.stamp())

    def _of(self, source: str) -> str:
        return hashlib.sha256(source.encode() + self.boxes.tobytes()).hexdigest()[:16]


def is_landmarks(root: str | Path) -> bool:
    """Whether ``root`` says by its names that it is one of these data sets, whole or not, and none of classes."""
    folder = Path(root).expanduser()
    names = _names(folder)
    told = any(name.startswith(("gnd_", "retrieval_solution")) and (folder / name).is_file() for name in names)
    return told or bool({folder.name, *names} & {*REVISITED}) or names == {"jpg"} or names >= {"index", "test"}


def open_landmarks(root: str | Path, config: DataConfig, distractors: str | Path | None = None) -> Landmarks:
    """The data set below ``root``: roxford5k/ or rparis6k/, or a folder that holds one of them, or Google Landmarks v2.

    Args:
        root: see above.
        config: how images are decoded.
        distractors: the folder revisitop1m/, whose images are searched as well and are wrong for every query.

    Raises ConfigError for a folder of another layout, ground truth that is not as it should be, and images that are
    not there.
    """
    folder = Path(root).expanduser()
    names = _names(folder)
    if names & {_RETRIEVAL_CSV, _INDEX_CSV} or any(name.startswith("retrieval_solution") for name in names):
        if distractors is not None:
            raise ConfigError(f"--distractors go with {' and '.join(REVISITED)}, and {root} is Google Landmarks v2")
        return _google(folder, config)
    if not any(name.startswith("gnd_") for name in names):
        inside = [name for name in REVISITED if (folder / name).is_dir()]
        if len(inside) > 1:
            raise ConfigError(f"{root} holds {' and '.join(inside)}: give one, such as {folder / inside[0]}")
        if not inside:
            raise _unknown(folder)
        folder = folder / inside[0]
    whole = _revisited(folder, config)
    return whole if distractors is None else _with_distractors(whole, Path(distractors).expanduser(), config)


def _names(folder: Path) -> set[str]:
    """What lies in a folder; nothing where it cannot be listed, which a message says."""
    try:
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    except (OSError, ValueError):
        return set()


def _unknown(folder: Path) -> ConfigError:
    found = ", ".join(sorted(_names(folder))[:6]) or "nothing"
    return ConfigError(f"{folder} is not of a known layout: found {found}; looked for {LOOKED_FOR}")


def _revisited(folder: Path, config: DataConfig) -> Landmarks:
    files = [folder / f"gnd_{name}{ending}" for name in REVISITED for ending in (".mat", ".pkl")]
    there = [file for file in files if file.is_file()]
    if not there:
        raise _unknown(folder)
    names = {file.stem for file in there}
    if len(names) > 1:
        raise ConfigError(
            f"{folder} holds the ground truth of both {' and '.join(sorted(names))}: put each beside its jpg/"
        )
    truth = there[0]
    told, first = (read_mat(truth), 1) if truth.suffix == ".mat" else (read_pickle(truth), 0)
    database, queries, relevant, boxes = _checked(told, truth, first)
    return Landmarks(
        name=truth.stem.removeprefix("gnd_"),
        queries=_files(folder / "jpg", queries, config, truth),
        database=_files(folder / "jpg", database, config, truth),
        relevant=relevant,
        boxes=boxes,
    )


def _files(folder: Path, names: list[str], config: DataConfig, told_by: Path) -> FileSource:
    """Images by name, ``.jpg`` where a name has no ending. Raises ConfigError where some are not there."""
    paths = [os.fsencode(name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.jpg") for name in names]
    missing = [path for path in paths if not os.path.isfile(os.path.join(os.fsencode(folder), path))]
    if missing:
        some = ", ".join(os.fsdecode(path) for path in missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise ConfigError(f"{folder} lacks {len(missing)} of {len(paths)} images that {told_by.name} names: {some}")
    source = FileSource(os.fsencode(folder), paths, np.full(len(paths), -1, np.int32), config)
    source.labels = []
    return source


def _with_distractors(found: Landmarks, folder: Path, config: DataConfig) -> Landmarks:
    """Images of revisitop1m/jpg, listed by revisitop1m.txt, behind those of the database."""
    listing = folder / f"{DISTRACTORS}.txt"
    try:
        names = listing.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--distractors={folder}: cannot read {listing.name} there, the list of its images: {error}"
        ) from error
    if not names:
        raise ConfigError(f"{listing} names no image")
    more = _files(folder / "jpg", names, config, listing)
    both = {found.name: found.database, DISTRACTORS: more}
    return replace(found, database=Mixture(both, [1, 1]))


# Ground truth. What is read is of plain types, and nothing in it is run.


class _Harmful(Exception):
    """A pickle that holds more than arrays and names."""


def _admitted() -> dict[tuple[str, str], Any]:
    """What a pickle of arrays calls, by every name that numpy and Python 2 and 3 have given it."""
    array, scalar = np.zeros(1), np.float64(0)
    calls: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        calls |= {(module, "_reconstruct"): array.__reduce__()[0], (module, "scalar"): scalar.__reduce__()[0]}
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        calls[module, "_frombuffer"] = array.__reduce_ex__(5)[0]
    return calls | {("_codecs", "encode"): _encoded, ("__builtin__", "bytes"): bytes, ("builtins", "bytes"): bytes}


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as protocols 0 to 2 of Python 3 write them; no codec but this one is called."""
    if encoding != "latin1":
        raise _Harmful(f"the codec {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, text, lists, dicts and numpy arrays; anything else is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _admitted()[module, name]
        except KeyError:
            raise _Harmful(f"{module}.{name}") from None


def read_pickle(file: Path) -> Any:
    """Ground truth of a .pkl that Python 2 or 3 wrote, by an unpickler that admits arrays alone.

    Raises ConfigError for anything else in it, before it is run, and for a file that cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            return _ArraysOnly(opened, encoding="latin1").load()
    except _Harmful as error:
        raise ConfigError(
            f"{file} was not read: it holds {error}, and ground truth holds numbers, names and arrays alone. It may be "
            "made to do harm; nothing in it was run. Take it from the authors' page again, or the .mat"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # an unpickler raises anything on a damaged file
        raise ConfigError(f"{file} is no pickle, or not a whole one ({type(error).__name__}: {error})") from error


def read_mat(file: Path) -> Any:
    """The same of a .mat, whose places count from 1. Raises ConfigError for a file that cannot be read."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(
            f"{file} needs scipy: pip install 'fastdino[eval]', or put {file.with_suffix('.pkl').name} in its place"
        ) from error
    try:
        return loadmat(file, simplify_cells=True)
    except NotImplementedError as error:
        raise ConfigError(f"{file} is of version 7.3, which scipy does not read: save it with -v7") from error
    except Exception as error:  # likewise
        raise ConfigError(f"{file} is no .mat, or not a whole one ({type(error).__name__}: {error})") from error


_SETS = ("easy", "hard", "junk")


def _rows(value: Any) -> list[Any]:
    """A list, whatever wrote it: Matlab's of one entry is that entry."""
    return (
        list(np.atleast_1d(value)) if isinstance(value, np.ndarray) else value if isinstance(value, list) else [value]
    )


def _checked(told: Any, file: Path, first: int) -> tuple[list[str], list[str], list[Relevant], np.ndarray]:
    """Names of database and queries, what is true and boxes, each of the type that it should be.

    Places in ``told`` count from ``first``; boxes count from 0 in both kinds of files.
    """
    keys = {"imlist", "qimlist", "gnd"}
    if not isinstance(told, dict) or not keys <= told.keys():
        found = ", ".join(sorted(map(str, told))[:6]) if isinstance(told, dict) else type(told).__name__
        raise ConfigError(f"{file} is no ground truth of the revisited protocol: found {found}; looked for {keys}")
    database, queries = (_texts(told[name], f"{name} of {file}") for name in ("imlist", "qimlist"))
    gnd = _rows(told["gnd"])
    if len(gnd) != len(queries):
        raise ConfigError(f"{file}: {len(queries)} queries in qimlist, and {len(gnd)} entries in gnd")
    relevant, boxes = [], []
    for name, entry in zip(queries, gnd, strict=True):
        where = f"{file}, query {name}"
        if not isinstance(entry, dict) or not {*_SETS, "bbx"} <= entry.keys():
            found = ", ".join(sorted(map(str, entry))) if isinstance(entry, dict) else type(entry).__name__
            unrevised = " (ok and junk alone are of the protocol before it was revisited)" if "ok" in found else ""
            raise ConfigError(f"{where}: found {found}; looked for bbx, easy, hard, junk{unrevised}")
        relevant.append(Relevant(*(_places(entry[kind], first, len(database), f"{where}, {kind}") for kind in _SETS)))
        boxes.append(_box(entry["bbx"], where))
    return database, queries, relevant, np.array(boxes)


def _texts(value: Any, where: str) -> list[str]:
    names = [x.item() if isinstance(x, np.ndarray) and x.size == 1 else x for x in _rows(value)]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{where} must be names of images")
    return [str(name) for name in names]


def _numbers(value: Any, where: str) -> np.ndarray:
    try:
        numbers = np.atleast_1d(np.asarray(value, np.float64)).ravel()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} must be numbers, and holds {value!r:.60}") from error
    if not np.isfinite(numbers).all():
        raise ConfigError(f"{where} must be finite numbers")
    return numbers


def _places(value: Any, first: int, count: int, where: str) -> np.ndarray:
    numbers = _numbers(value, where) - first
    if (numbers != numbers.round()).any() or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < count):
        raise ConfigError(
            f"{where} must be places in imlist, from {first} to {count - 1 + first}, and holds {value!r:.60}"
        )
    return numbers.astype(np.int64)


def _box(value: Any, where: str) -> np.ndarray:
    box = _numbers(value, f"{where}, bbx")
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise ConfigError(f"{where}: bbx must be left, top, right, bottom in pixels, not {value!r:.60}")
    return box


def _google(folder: Path, config: DataConfig) -> Landmarks:
    """index/a/b/c/ID.jpg is searched for test/a/b/c/ID.jpg; queries whose Usage is Ignored are left out."""
    index = [row["id"] for row in _table(folder / _INDEX_CSV, {"id"})]
    solution = [row for row in _table(folder / _RETRIEVAL_CSV, {"id", "images", "Usage"}) if row["Usage"] != "Ignored"]
    place = {name: i for i, name in enumerate(index)}
    none, relevant = np.zeros(0, np.int64), []
    for row in solution:
        right = row["images"].split()
        if unknown := [name for name in right if name not in place]:
            raise ConfigError(f"{folder / _RETRIEVAL_CSV}, query {row['id']}: {unknown[0]} is not in {_INDEX_CSV}")
        relevant.append(Relevant(np.array([place[name] for name in right], np.int64), none, none))
    if not solution:
        raise ConfigError(f"{folder / _RETRIEVAL_CSV} has no query that is not Ignored")
    return Landmarks(
        name="gldv2",
        queries=_files(folder / "test", [_nested(row["id"]) for row in solution], config, folder / _RETRIEVAL_CSV),
        database=_files(folder / "index", [_nested(name) for name in index], config, folder / _INDEX_CSV),
        relevant=relevant,
        parts=[row["Usage"] for row in solution],
    )


def _nested(name: str) -> str:
    return "/".join([*name[:3], name])


def _table(file: Path, columns: set[str]) -> list[dict[str, str]]:
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            return list(_read(csv.DictReader(opened), columns, file))
    except FileNotFoundError:
        raise _unknown(file.parent) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _read(rows: csv.DictReader, columns: set[str], file: Path) -> Iterator[dict[str, str]]:
    if missing := columns - {*(rows.fieldnames or [])}:
        raise ConfigError(f"{file} has columns {rows.fieldnames}; looked for {', '.join(sorted(missing))} as well")
    for row in rows:
        if any(not row[name] for name in columns):
            raise ConfigError(f"{file}, line {rows.line_num}: a row lacks one of {', '.join(sorted(columns))}")
        yield row
