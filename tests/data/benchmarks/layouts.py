"""Small folders laid out as benchmarks are."""

import csv
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.io import savemat

from tests.data.pictures import photo, write

DATABASE = [f"all_souls_{i:06d}" for i in range(6)]
QUERIES = ["all_souls_000091", "oxford_002985"]
TRUE = [
    {"bbx": [4.2, 2.0, 30.0, 20.6], "easy": [0], "hard": [1, 4], "junk": [2]},
    {"bbx": [0.0, 1.0, 16.0, 24.0], "easy": [3, 5], "hard": [], "junk": []},
]
Query = Mapping[str, Sequence[float]]


def revisited(root: Path, name: str = "roxford5k") -> Path:
    """ROOT/NAME/jpg with 6 images and 2 queries of several shapes; the ground truth is not written."""
    for i, image in enumerate((*DATABASE, *QUERIES)):
        write(root / name / "jpg" / f"{image}.jpg", photo(*((40, 30), (30, 40), (36, 36))[i % 3], seed=i % 6))
    return root / name


def ground_truth(
    arrays: bool = True, true: Sequence[Query] = TRUE, queries: Sequence[str] = QUERIES
) -> dict[str, object]:
    """What a .pkl holds; places are arrays, or lists of numpy's numbers."""
    gnd = [
        {key: [*x] if key == "bbx" else np.array(x, int) if arrays else [*np.array(x, int)] for key, x in query.items()}
        for query in true
    ]
    return {"imlist": DATABASE, "qimlist": [*queries], "gnd": gnd}


class Python2(pickle._Pickler):
    """Writes text and the bytes of arrays as Python 2 does, as strings of bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode("latin1")
        if self.proto == 0:
            self.write(pickle.STRING + repr(data)[1:].encode() + b"\n")
        else:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def write_pickle(folder: Path, protocol: int = 2, arrays: bool = True) -> Path:
    """gnd_*.pkl; of protocols 0 to 2 as Python 2 writes it, which names numpy's modules as of old."""
    file, told = folder / f"gnd_{folder.name}.pkl", io.BytesIO()
    (Python2 if protocol < 3 else pickle.Pickler)(told, protocol).dump(ground_truth(arrays))
    old = told.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    file.write_bytes(old if protocol < 3 else told.getvalue())
    return file


def write_mat(folder: Path, true: Sequence[Query] = TRUE, queries: Sequence[str] = QUERIES) -> Path:
    """gnd_*.mat: columns of names, and a row of structs whose places count from 1."""
    gnd = np.empty((1, len(true)), [(key, object) for key in true[0]])
    for i, query in enumerate(true):
        for key, x in query.items():
            gnd[0, i][key] = np.array([x], np.float64) + (0 if key == "bbx" else 1)
    columns = {}
    for key, names in (("imlist", DATABASE), ("qimlist", queries)):
        columns[key] = np.empty((len(names), 1), object)
        columns[key][:, 0] = names
    file = folder / f"gnd_{folder.name}.mat"
    savemat(file, {**columns, "gnd": gnd})
    return file


def google(root: Path) -> Path:
    """Google Landmarks v2 with 5 images of the index and 3 queries, one of them ignored."""
    index, queries = [f"{i}aa{i}" for i in range(5)], [f"{i}bb{i}" for i in "fgh"]
    for folder, names in (("index", index), ("test", queries)):
        for i, name in enumerate(names):
            write(root / folder / name[0] / name[1] / name[2] / f"{name}.jpg", photo(40, 30, seed=i))
    rows = [("id", "images", "Usage"), (queries[0], f"{index[0]} {index[3]}", "Private")]
    rows += [(queries[1], "None", "Ignored"), (queries[2], index[2], "Public")]
    table(root / "retrieval_solution_v2.1.csv", rows)
    table(root / "index_image_to_landmark.csv", [("id", "landmark_id"), *((name, "7") for name in index)])
    return root


def table(file: Path, rows: Sequence[Sequence[str]]) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)


def copydays(root: Path, originals: int = 4) -> Path:
    """original/, strong/ with two copies of the first image, jpegqual/10/ and crops/50/."""
    for i in range(originals):
        image = photo(44, 33, seed=i)
        write(root / "original" / f"20{i:02d}00.jpg", image, quality=95)
        write(root / "strong" / f"20{i:02d}01.jpg", image.rotate(25))
        write(root / "jpegqual" / "10" / f"20{i:02d}00.jpg", image, quality=10)
        write(root / "crops" / "50" / f"20{i:02d}00.jpg", image.crop((6, 5, 37, 28)))
    write(root / "strong" / "200002.jpg", photo(44, 33, seed=0).rotate(-25))
    return root
