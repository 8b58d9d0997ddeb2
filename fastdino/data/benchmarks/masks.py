"""Images whose pixels have a class: a folder of masks, PASCAL VOC, ADE20K and rendered shapes."""

import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastdino.config import ConfigError, DataConfig
from fastdino.data.benchmarks import voc
from fastdino.data.benchmarks.ade20k import NUM_CLASSES, ade20k_classes, ade20k_pairs, find_ade20k
from fastdino.data.benchmarks.class_folders import BANK_SEED, NUM_SHAPES, TEST_SEED, TEST_STRIDE
from fastdino.data.draws import sample
from fastdino.data.sources.decode import BadImage, file_bytes, image_endings
from fastdino.data.sources.folder import FileSource, FolderSource, check_folder, scan, split_folders
from fastdino.data.sources.names import Names, printable
from fastdino.data.sources.shapes import ShapesSource, check_shows_shapes
from fastdino.data.sources.source import Room

log = logging.getLogger(__name__)

VOID = 255  # of a pixel that is of no class
ENDINGS = frozenset((b".png", b".bmp", b".gif", b".tif", b".tiff"))  # of masks: what keeps every value
SUFFIX = b"_mask"  # that the stem of a mask may have after its image's
LAYOUTS = (
    "images/ and masks/ with equal stems, masks beside their images (a.jpg and a.png, or a.png and a_mask.png), each "
    "also below train/ and val/; JPEGImages/ and SegmentationClass/ of VOC; images/training/ and annotations/training/ "
    "of ADE20K"
)
"""How masks may lie, for a message about what does not."""

Pair = tuple[bytes, bytes]  # paths of an image and of its mask


class Masked(Protocol):
    """A source of images whose pixels have a class."""

    @property
    def classes(self) -> list[str]:
        """Names of the values of masks, from 0."""

    def __len__(self) -> int: ...

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """As of a source."""

    def mask(self, index: int) -> np.ndarray:
        """uint8 (height, width) of the image: the class of each pixel, or VOID. Raises BadImage."""

    def name(self, index: int) -> str:
        """What to call the image."""

    def fingerprint(self) -> str:
        """As of a source."""


class MaskedSets(NamedTuple):
    """Images to learn from and images that are judged, of the same classes."""

    train: Masked
    test: Masked
    rule: str


class MaskedFiles(FileSource):
    """Images and masks that are files.

    Args:
        root: what their paths are relative to.
        pairs: of images and masks.
        config: how images are decoded.
        values: (256,) int16, what the values of masks mean: a class, VOID, or -1: they must not occur.
        classes: names of the classes.
    """

    def __init__(
        self, root: Path, pairs: Sequence[Pair], config: DataConfig, values: np.ndarray, classes: list[str]
    ) -> None:
        images, masks = zip(*pairs, strict=True)
        super().__init__(os.fsencode(root), list(images), np.full(len(pairs), -1, np.int32), config)
        self._masks, self._values, self.classes, self.labels = Names(masks), values, classes, []

    def mask(self, index: int) -> np.ndarray:
        """uint8 (height, width): the class of each pixel, or VOID. Raises BadImage."""
        name = printable(self._masks[index])
        found = read_mask(Path(os.fsdecode(os.path.join(self.folder, self._masks[index]))), name)
        classes = self._values[found]
        if (classes < 0).any():
            raise BadImage(
                name, f"it holds the value {found[classes < 0][0]}, and classes count to {len(self.classes)}"
            )
        return classes.astype(np.uint8)


class ShapeMasks:
    """Rendered shapes: an object's pixels are of its class, one more than its label, all others background."""

    def __init__(self, source: ShapesSource) -> None:
        self.source, self.classes = source, ["background", *source.labels]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, room: Room | None = None) -> tuple[np.ndarray, int]:
        """As of the source."""
        return self.source.read(index)

    def mask(self, index: int) -> np.ndarray:
        """uint8 (height, width): 0 and the class of the object."""
        return np.where(self.source.mask(index), 1 + self.source.label(index), 0).astype(np.uint8)

    def name(self, index: int) -> str:
        """As of the source."""
        return self.source.name(index)

    def fingerprint(self) -> str:
        """As of the source."""
        return self.source.fingerprint()


def read_mask(path: Path, name: str) -> np.ndarray:
    """uint8 (height, width): the values of a mask, of a palette its indices. Raises BadImage that calls it ``name``."""
    data = file_bytes(path, name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            values, has_alpha = np.asarray(image), image.mode in ("LA", "PA", "RGBA")
    except Exception as error:
        raise BadImage(name, f"{type(error).__name__}: {error}") from error
    if values.ndim == 3:
        colours = values[..., :-1] if has_alpha else values
        values = colours[..., 0]
        if (colours != values[..., None]).any():
            raise BadImage(name, "a mask in colour: store one with a palette, or gray, whose values are the classes")
    if values.dtype.kind not in "biu" or values.min() < 0 or values.max() > 255:
        raise BadImage(name, f"its values are not from 0 to 255 ({values.dtype} up to {values.max()})")
    return values.astype(np.uint8)


def open_classes(root: str, data: DataConfig, num_images: int | None = None, seed: int = 0) -> MaskedSets:
    """Images to learn from and images that are judged, whose pixels have classes, checked so that work begins.

    Args:
        root: the word shapes, or a folder of one of LAYOUTS. VOC and ADE20K are judged on their own lists; of another
            folder, train/ and val/ (or test/) are the two sets; without them every fifth image is judged.
        data: how images are opened.
        num_images: at most so many of each set, drawn.
        seed: of the draw.

    The values of a folder's masks are its classes, in their order, and 255 is of no class. Where there are no values
    but 0 and 255, 255 is the object.

    Raises ConfigError for an unknown layout, an image without a mask, a mask that cannot be read or is of another size
    than its image, masks of less than two classes, and a class of the second set that the first lacks.
    """
    if root == "shapes":
        check_shows_shapes(data)
        count = min(num_images or NUM_SHAPES, NUM_SHAPES)
        train, test = (ShapeMasks(ShapesSource(count, data.image_size, x)) for x in (BANK_SEED, TEST_SEED))
        return MaskedSets(train, test, "rendered shapes of two seeds")
    folder = _existing(root)
    if at := voc.find_voc(folder):
        drawn = [_drawn(voc.voc_pairs(at, x, "SegmentationClass"), num_images, seed) for x in ("train", "val")]
        return _known(at, drawn, data, np.arange(len(voc.CLASSES)), list(voc.CLASSES), "VOC's lists train and val")
    if at := find_ade20k(folder):
        drawn = [_drawn(ade20k_pairs(at, x), num_images, seed) for x in ("training", "validation")]
        values = np.array([VOID, *range(NUM_CLASSES)])
        return _known(at, drawn, data, values, ade20k_classes(at), "ADE20K's training and validation")
    return _by_values(folder, data, num_images, seed)


def open_objects(root: str, data: DataConfig, num_images: int, seed: int = 0) -> Masked | None:
    """Images whose masks tell objects: 0 is none, VOID not known, any other value an object of the image.

    Args:
        root: the word shapes, or a folder of one of LAYOUTS but ADE20K's. Of one with splits: val/ or test/.
        data: how images are opened.
        num_images: at most so many, drawn.
        seed: of the draw.

    None where the folder holds no masks. Raises ConfigError as :func:`open_classes` does.
    """
    if root == "shapes":
        check_shows_shapes(data)
        return ShapeMasks(ShapesSource(min(num_images, NUM_SHAPES), data.image_size, TEST_SEED))
    folder = Path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        return None
    names = [str(value) for value in range(256)]
    if at := voc.find_voc(folder):
        masks = "SegmentationObject" if (at / "SegmentationObject").is_dir() else "SegmentationClass"
        drawn = _drawn(voc.voc_pairs(at, "val", masks), num_images, seed)
        _check_sizes(at, drawn)
        return MaskedFiles(at, drawn, data, np.arange(256, dtype=np.int16), names)
    if find_ade20k(folder):
        raise ConfigError(
            f"{root} holds ADE20K, whose masks tell what every pixel of a scene is, not which are objects"
        )
    if not _has_masks(folder, data):
        return None
    drawn = _drawn(_sets(folder, data)[1], num_images, seed)
    values = np.arange(256, dtype=np.int16)
    if np.flatnonzero(_count(folder, drawn)).tolist() in ([VOID], [0, VOID]):
        values[VOID] = 1
    return MaskedFiles(folder, drawn, data, values, names)


def images_alone(root: Path, data: DataConfig) -> FileSource | None:
    """The images of a folder of one of LAYOUTS, without its masks; None of another folder. Raises ConfigError."""
    at = voc.find_voc(root) or find_ade20k(root)
    if at is not None:
        return FolderSource(at / ("JPEGImages" if voc.find_voc(root) else "images"), data)
    if not os.path.isdir(root) or not _has_masks(root, data):
        return None
    train, test, _ = _sets(root, data)
    return MaskedFiles(root, train + test, data, np.arange(256, dtype=np.int16), [])


def _by_values(root: Path, data: DataConfig, num_images: int | None, seed: int) -> MaskedSets:
    """Of a folder of masks, whose values say which classes there are."""
    train, test, rule = _strided(*_sets(root, data))
    if not train or not test:
        raise ConfigError(f"{root} ({rule}) needs an image to learn from and one to judge, each with a mask")
    drawn = [_drawn(pairs, num_images, seed) for pairs in (train, test)]
    counts = [_count(root, pairs) for pairs in drawn]
    seen = np.flatnonzero(sum(counts)).tolist()
    ids = seen if seen == [0, VOID] else [value for value in seen if value != VOID]
    if len(ids) < 2:
        raise ConfigError(f"the masks of {root} hold the value {seen[0]} and no other class: there is nothing to tell")
    if unseen := [str(value) for value in ids if not counts[0][value]]:
        raise ConfigError(
            f"masks of {root} that are judged hold the classes {', '.join(unseen[:4])}, which none to learn from holds "
            f"({rule}): give more images, or move some"
        )
    values = np.full(256, VOID, np.int16)
    values[ids] = range(len(ids))
    learned, judged = (MaskedFiles(root, pairs, data, values, [str(i) for i in ids]) for pairs in drawn)
    return MaskedSets(learned, judged, rule)


def _existing(root: str) -> Path:
    check_folder(os.fsencode(os.path.expanduser(root)))
    return Path(os.path.expanduser(root))


def _drawn(pairs: list[Pair], num_images: int | None, seed: int) -> list[Pair]:
    return pairs if num_images is None else [pairs[i] for i in sample(seed, num_images, len(pairs))]


def _known(
    folder: Path, drawn: list[list[Pair]], data: DataConfig, meaning: np.ndarray, classes: list[str], rule: str
) -> MaskedSets:
    """Of a data set that states its classes; ``meaning`` of the first values, and 255 is of no class."""
    values = np.full(256, -1, np.int16)
    values[: len(meaning)], values[VOID] = meaning, VOID
    for pairs in drawn:
        _check_sizes(folder, pairs)
    train, test = (MaskedFiles(folder, pairs, data, values, classes) for pairs in drawn)
    return MaskedSets(train, test, rule)


# ------------------------------------------------------------------------------------------ a folder's images and masks


def _sets(root: Path, data: DataConfig) -> tuple[list[Pair], list[Pair], str]:
    """Pairs to learn from, pairs to judge, and the rule. Without a split all are to judge. Raises ConfigError."""
    for below in (".", "images"):
        splits = split_folders(root / below)
        judged = splits.get("val") or splits.get("test")
        if "train" not in splits or not judged:
            continue
        names, rule = (splits["train"].name, judged.name), f"{splits['train'].name}/ and {judged.name}/"
        if below == "images" and os.path.isdir(root / "masks"):
            pairs = _pairs(root, data)
            train, test = ([x for x in pairs if x[0].startswith(os.fsencode(f"images/{name}/"))] for name in names)
            return train, test, rule
        if below == ".":
            train, test = ([_below(name, x) for x in _pairs(root / name, data)] for name in names)
            return train, test, rule
    return [], _pairs(root, data), "all images"


def _strided(train: list[Pair], test: list[Pair], rule: str) -> tuple[list[Pair], list[Pair], str]:
    """The same, or without a split every fifth to judge."""
    if train:
        return train, test, rule
    rest = [pair for i, pair in enumerate(test) if i % TEST_STRIDE]
    return rest, test[::TEST_STRIDE], f"every {TEST_STRIDE}th image is judged by the others"


def _below(folder: str, pair: Pair) -> Pair:
    image, mask = (os.path.join(os.fsencode(folder), path) for path in pair)
    return image, mask


def _has_masks(root: Path, data: DataConfig) -> bool:
    """Whether there are masks/, or every image has a file beside it that is called as a mask is."""
    for folder in (root, *split_folders(root).values()):
        if all(os.path.isdir(folder / name) for name in ("images", "masks")):
            return True
        images, masks = _beside(folder, data)
        covered = sum(_stem(image) in masks for image in images)
        if 0 < covered == len(images):
            return True
        if covered:
            log.warning("%s: %d of %d images have a mask beside them: none is judged", folder, covered, len(images))
    return False


def _pairs(root: Path, data: DataConfig) -> list[Pair]:
    """Every image below ``root`` with its mask. Raises ConfigError for an unknown layout and images without masks."""
    if all(os.path.isdir(root / name) for name in ("images", "masks")):
        images = [b"images/" + x for x in _files(root / "images", image_endings(data.takes_arrays))]
        masks = {b"images/" + _stem(x): b"masks/" + x for x in _files(root / "masks", ENDINGS)}
    else:
        images, masks = _beside(root, data)
    if not images or not masks:
        found = ", ".join(sorted(printable(x.name) + "/" * os.path.isdir(x) for x in root.iterdir())[:5])
        raise ConfigError(
            f"{root} holds no images with masks. Found in it: {found or 'nothing'}. Looked for {LAYOUTS}. Masks are "
            f"files that keep every value: {' '.join(sorted(map(os.fsdecode, ENDINGS)))}, so no JPEG"
        )
    if bare := [image for image in images if _stem(image) not in masks]:
        shown = ", ".join(map(printable, bare[:3])) + (", ..." if len(bare) > 3 else "")
        raise ConfigError(f"in {root} {len(bare)} of {len(images)} images have no mask: {shown}")
    return [(image, masks[_stem(image)]) for image in images]


def _beside(root: Path, data: DataConfig) -> tuple[list[bytes], dict[bytes, bytes]]:
    """Images below ``root``, and by their stems the masks among them: called a_mask.png, or a.png beside another a."""
    files = _files(root, image_endings(data.takes_arrays) | ENDINGS)
    count = Counter(os.path.splitext(path)[0] for path in files)
    masks = {}
    for path in files:
        stem, ending = os.path.splitext(path)
        suffixed = ending.lower() in ENDINGS and stem.endswith(SUFFIX)
        if suffixed or (ending.lower() == b".png" and count[stem] > 1):
            masks[_stem(path)] = path
    taken = {*masks.values()}
    return [path for path in files if path not in taken], masks


def _stem(path: bytes) -> bytes:
    return os.path.splitext(path)[0].removesuffix(SUFFIX)


def _files(folder: Path, endings: frozenset[bytes]) -> list[bytes]:
    return list(scan(os.fsencode(folder), endings, Counter()))


# ------------------------------------------------------------------------------------------------ what is in the masks


def _count(folder: Path, pairs: list[Pair]) -> np.ndarray:
    """(256,) pixels by value over all masks. Raises ConfigError for one that cannot be read or is of another size."""
    total = np.zeros(256, np.int64)
    for image, mask in tqdm(pairs, desc="masks", unit="mask", leave=False, disable=None):
        try:
            values = read_mask(folder / os.fsdecode(mask), printable(mask))
        except BadImage as error:
            raise ConfigError(f"{error}: mend it, or delete it with its image") from error
        _check_size(folder, image, mask, values.shape)
        total += np.bincount(values.ravel(), minlength=256)
    return total


def _check_sizes(folder: Path, pairs: list[Pair]) -> None:
    """Raises ConfigError for a mask that is not there or of another size than its image, by the files' headers."""
    for image, mask in tqdm(pairs, desc="masks", unit="mask", leave=False, disable=None):
        try:
            with Image.open(folder / os.fsdecode(mask)) as opened:
                shape = opened.height, opened.width
        except Exception as error:
            raise ConfigError(f"cannot read the mask {printable(mask)} of {folder}: {error}") from error
        _check_size(folder, image, mask, shape)


def _check_size(folder: Path, image: bytes, mask: bytes, shape: tuple[int, ...]) -> None:
    try:
        with Image.open(folder / os.fsdecode(image)) as opened:
            found = opened.height, opened.width
    except Exception:
        return  # said when it is decoded
    if found != shape:
        sizes = " and the mask ".join(f"{width} x {height}" for height, width in (found, shape))
        raise ConfigError(
            f"in {folder} {printable(image)} is {sizes} pixels ({printable(mask)}): a mask has the size of its image"
        )
