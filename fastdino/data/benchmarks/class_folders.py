"""Two labelled sets for an evaluation: a bank that votes and images that are judged."""

from pathlib import Path
from typing import NamedTuple

from fastdino.config import ConfigError, DataConfig
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.folder import SPLITS, split_folders
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.shapes import ShapesSource, check_shows_shapes
from fastdino.data.sources.source import Source

BANK_SEED, TEST_SEED = 2**31 + 101, 2**31 + 102  # of shapes that are rendered for nothing else
NUM_SHAPES = 1000  # in each of the two sets
TEST_STRIDE = 5  # of a folder without a split, every fifth image is judged


class Sets(NamedTuple):
    """Labelled images of the same classes, and the rule by which they were told apart."""

    bank: Source
    test: Source
    rule: str


def bank_and_test(root: str, data: DataConfig, judged: str = "") -> Sets:
    """Bank and test images of ``root``, checked so that an evaluation of them begins.

    Args:
        root: the word shapes, or a folder of class folders, or shards and the like. Its subfolders train/ and val/
            (valid/, validation/), or train/ and test/ (testing/), in any case, are the two sets; without them every
            fifth image is judged by the rest. The name of a split is never taken for that of a class.
        data: how images are opened: as those that the weights were trained on.
        judged: the test images, if they are elsewhere; then all of ``root`` is the bank.

    Raises ConfigError for a split without its other half, for sets without labels or with different classes, and for
    a set of which no image can be read.
    """
    if root == "shapes":
        check_shows_shapes(data)
        bank, test = (ShapesSource(NUM_SHAPES, data.image_size, seed) for seed in (BANK_SEED, TEST_SEED))
        return Sets(bank, test, "rendered shapes of two seeds")
    if judged:
        sets = Sets(open_part(root, data), open_part(judged, data), f"{root} is the bank, {judged} is judged")
        _check(sets, root)
        return sets
    folders = split_folders(root)
    other = folders.get("val") or folders.get("test")
    if "train" in folders and other:
        sets = _pair(folders["train"], other, data)
    elif folders:
        raise ConfigError(_unpaired(root, list(folders.values())))
    else:
        sets = _strided(open_part(root, data))
    _check(sets, root)
    return sets


def _pair(train: Path, judged: Path, data: DataConfig) -> Sets:
    rule = f"{train.name}/ is the bank, {judged.name}/ is judged"
    return Sets(open_part(train, data), open_part(judged, data), rule)


def _strided(whole: Source) -> Sets:
    test = range(0, len(whole), TEST_STRIDE)
    bank = [index for index in range(len(whole)) if index % TEST_STRIDE]
    return Sets(Subset(whole, bank), Subset(whole, test), f"every {TEST_STRIDE}th image is judged by the others")


def _unpaired(root: str, folders: list[Path]) -> str:
    found = ", ".join(f"{folder.name}/" for folder in folders)
    return (
        f"{root} holds {found}: train/ is taken together with val/ or test/, and none of these names for a class. "
        f"Give the folder that holds the classes, such as {folders[0]}, or rename a class that is called so"
    )


def _check(sets: Sets, root: str) -> None:
    """Everything that an evaluation would refuse, at the cost of one image of each set."""
    if len(sets.bank.labels) < 2:
        held = f"only {sets.bank.labels[0]!r}" if sets.bank.labels else "none"
        raise ConfigError(f"labels are needed: {root} has to hold a folder per class, of two or more, and holds {held}")
    if SPLITS.keys() >= {label.lower() for label in sets.bank.labels}:
        raise ConfigError(
            f"{root} holds {_some(sets.bank.labels)} where folders of classes should be: give the one with these"
        )
    if differ := sorted(set(sets.bank.labels) ^ set(sets.test.labels)):
        raise ConfigError(f"bank and test images of {root} must be of the same classes; one lacks {_some(differ)}")
    both = sets.bank, sets.test
    if astray := [source.name(i) for source in both for i in range(len(source)) if source.label(i) < 0]:
        raise ConfigError(
            f"in no class folder of {root}: {_some(astray)} ({len(astray)} in all). Move them into one or take them out"
        )
    for source in both:
        _check_readable(source, root)
    if len({sets.bank.label(index) for index in range(len(sets.bank))}) < 2:
        raise ConfigError(f"the bank of {root} has images of one class only: 2 or more are needed")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _check_readable(source: Source, root: str) -> None:
    for index in range(len(source)):
        try:
            source.read(index)
            return
        except BadImage as error:
            last = error
    raise ConfigError(f"none of {len(source)} images of {root} can be read. The last: {last}")
