"""Images whose objects have boxes: PASCAL VOC's Annotations, and COCO's instances."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks.voc import BELOW
from fastdino.data.sources.decode import decode, file_bytes

LAYOUTS = "Annotations/ and JPEGImages/ of VOC, annotations/instances_*.json of COCO, or such a .json file"
"""How boxes may lie, for a message about what does not."""

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Item(NamedTuple):
    """An image and where its objects are."""

    name: str
    path: Path
    boxes: np.ndarray  # (m, 4) fp64, m >= 1: left, top, right, bottom; the right and the bottom lie outside


class BoxedFiles:
    """Images in files, with the boxes of their objects.

    Args:
        items: the images.
        rule: by which they were listed, for the record.
        bare: how many were left out, because they have no box.
        config: how they are decoded.
    """

    def __init__(self, items: Sequence[Item], rule: str, bare: int, config: DataConfig) -> None:
        self.items, self.rule, self.bare, self._config = list(items), rule, bare, config

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> np.ndarray:
        """uint8 (height, width, channels). Raises BadImage."""
        return decode(file_bytes(self.items[index].path, self.name(index)), self.name(index), self._config)

    def boxes(self, index: int) -> np.ndarray:
        """(m, 4) fp64 pixels."""
        return self.items[index].boxes

    def mask(self, index: int) -> None:
        """There is none."""

    def name(self, index: int) -> str:
        """What to call the image."""
        return self.items[index].name


def open_boxes(root: str, config: DataConfig, listed: Path | None = None) -> BoxedFiles | None:
    """Every image with boxes below ``root``; None where it is of none of LAYOUTS.

    Of VOC the boxes of all objects, also of those that are marked as difficult, of the images in
    ImageSets/Main/trainval.txt, or without it of every .xml; less 1 on the left and the top, because VOC counts pixels
    from 1. Of COCO all but crowds, rounded to whole pixels. Images without a box are left out.

    Args:
        root: the folder, or a .json file of COCO.
        config: how images are decoded.
        listed: a file that names the images to take, one a line, as COCO20k does; the folders and the ending of a name
            are not compared.

    Raises ConfigError for an image without annotation or file, an annotation that cannot be read, and none at all.
    """
    folder = Path(os.path.expanduser(root))
    if voc := next((folder / x for x in BELOW if _is_voc(folder / x)), None):
        found, rule = _voc(voc, listed)
    elif folder.suffix == ".json" or os.path.isdir(folder / "annotations"):
        file = _instances(folder)
        if file is None:
            return None
        found, rule = _coco(file, listed)
    else:
        return None
    items = [item for item in found if len(item.boxes)]
    if not items:
        raise ConfigError(f"no image of {root} has a box ({rule}): there is nothing to discover")
    if lost := [str(item.path) for item in items if not os.path.isfile(item.path)]:
        raise ConfigError(f"{len(lost)} of {len(items)} images with boxes are not there, such as {lost[0]}")
    return BoxedFiles(items, rule, len(found) - len(items), config)


def _listed(file: Path | None) -> set[str] | None:
    """Stems of the first words of a file's lines. Raises ConfigError where there are none."""
    if file is None:
        return None
    try:
        words = [line.split()[0] for line in file.expanduser().read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the list of images {file}: {error}") from error
    if not words:
        raise ConfigError(f"the list of images {file} is empty")
    return {Path(word).stem for word in words}


def _check_listed(wanted: set[str], known: set[str], where: Path) -> None:
    """Raises ConfigError that names an image that is wanted and not known."""
    if unknown := sorted(wanted - known):
        raise ConfigError(f"{len(unknown)} of {len(wanted)} images have no annotation in {where}, such as {unknown[0]}")


# --------------------------------------------------------------------------------------------------------------- VOC


def _is_voc(folder: Path) -> bool:
    return all(os.path.isdir(folder / name) for name in ("Annotations", "JPEGImages"))


def _voc(folder: Path, listed: Path | None) -> tuple[list[Item], str]:
    annotations, usual = folder / "Annotations", folder / "ImageSets" / "Main" / "trainval.txt"
    known = {path.stem for path in annotations.glob("*.xml")}
    listed = usual if listed is None and usual.exists() else listed
    wanted, rule = _listed(listed) or known, f"{folder.name}, {listed.name if listed else 'every annotation'}"
    _check_listed(wanted, known, annotations)
    images = {path.stem: path for path in (folder / "JPEGImages").iterdir()}
    at = {stem: images.get(stem, folder / "JPEGImages" / f"{stem}.jpg") for stem in sorted(wanted)}
    return [Item(path.name, path, _voc_boxes(annotations / f"{stem}.xml")) for stem, path in at.items()], rule


def _voc_boxes(path: Path) -> np.ndarray:
    """(m, 4) of a file. Raises ConfigError that names it."""
    try:
        tree = ElementTree.parse(path)
        boxes = [[float(_text(x, f"bndbox/{side}")) for side in _SIDES] for x in tree.iter("object")]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ConfigError(f"cannot read the boxes of {path}: {error}") from error
    found = np.array(boxes, np.float64).reshape(-1, 4) - (1, 1, 0, 0)
    for box in found[~(found[:, 2:] > found[:, :2]).all(axis=1)]:  # also where one is not a number
        raise ConfigError(f"a box of {path} has no area: left, top, right, bottom {box.tolist()}")
    return found


def _text(element: ElementTree.Element, name: str) -> str:
    text = element.findtext(name)
    if text is None:
        raise ValueError(f"an object has no {name}")
    return text


# -------------------------------------------------------------------------------------------------------------- COCO


def _instances(folder: Path) -> Path | None:
    """The one file of instances. Raises ConfigError for several."""
    if folder.suffix == ".json":
        return folder
    files = sorted((folder / "annotations").glob("instances_*.json"))
    if len(files) > 1:
        raise ConfigError(f"{folder} holds {', '.join(x.name for x in files)}: give one of them, such as {files[0]}")
    return files[0] if files else None


def _coco(file: Path, listed: Path | None) -> tuple[list[Item], str]:
    try:
        content = json.loads(file.read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        boxes: dict[Any, list[list[float]]] = {id_: [] for id_ in names}
        for id_, box in _solid(content["annotations"]):
            boxes[id_].append(box)
        arrays = {id_: np.array(x, np.float64).reshape(-1, 4) for id_, x in boxes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"{file} is no instances file of COCO: {why}") from error
    wanted, rule = _listed(listed), file.name + (f", {listed.name}" if listed else "")
    if wanted is not None:
        _check_listed(wanted, {Path(name).stem for name in names.values()}, file)
        names = {id_: name for id_, name in names.items() if Path(name).stem in wanted}
    at = _images_of(file, next(iter(names.values()), ""))
    return [Item(name, at / name, np.rint(arrays[id_])) for id_, name in names.items()], rule


def _solid(annotations: list[dict[str, Any]]) -> Iterator[tuple[Any, list[float]]]:
    """The image and the sides of each object that is no crowd."""
    for annotation in annotations:
        if not annotation.get("iscrowd"):
            left, top, width, height = map(float, annotation["bbox"])
            yield annotation["image_id"], [left, top, left + width, top + height]


def _images_of(file: Path, name: str) -> Path:
    """Where the images of instances_SPLIT.json lie: SPLIT/, images/SPLIT/, images/ or the folder itself."""
    root, split = file.parent.parent, file.stem.removeprefix("instances_")
    places = [root / split, root / "images" / split, root / "images", root, file.parent]
    return next((place for place in places if os.path.isfile(place / name)), places[0])
