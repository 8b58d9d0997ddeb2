"""Two labelled sets for an evaluation: a bank that votes and images that are judged."""

from pathlib import Path

from fastdino.config import ConfigError
from fastdino.data.sources.folder import FolderSource
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.sources.source import Source
from fastdino.data.sources.subset import Subset

BANK_SEED, TEST_SEED = 2**31 + 101, 2**31 + 102  # of shapes that are rendered for nothing else
NUM_SHAPES = 1000  # in each of the two sets
TEST_STRIDE = 5  # of a folder without a split, every fifth image is judged


def bank_and_test(root: str, image_size: int) -> tuple[Source, Source]:
    """Bank and test images of ``root``.

    Args:
        root: the word shapes, or a folder of class folders. Its subfolders train/ and val/ are the two sets if it has
            both; otherwise every fifth image is judged by the rest.
        image_size: side in pixels at which shapes are rendered.

    Raises ConfigError for a folder without class folders: k-NN needs labels.
    """
    if root == "shapes":
        return ShapesSource(NUM_SHAPES, image_size, BANK_SEED), ShapesSource(NUM_SHAPES, image_size, TEST_SEED)
    folders = Path(root) / "train", Path(root) / "val"
    if all(folder.is_dir() for folder in folders):
        bank, test = (FolderSource(folder) for folder in folders)
        return _labelled(bank, root), _labelled(test, root)
    whole = _labelled(FolderSource(root), root)
    test_indices = range(0, len(whole), TEST_STRIDE)
    bank_indices = [index for index in range(len(whole)) if index % TEST_STRIDE]
    return Subset(whole, bank_indices), Subset(whole, test_indices)


def _labelled(source: FolderSource, root: str) -> FolderSource:
    if len(source.labels) < 2:
        raise ConfigError(f"k-NN needs labels: {root} has to hold a folder per class, it holds {len(source.labels)}")
    return source
