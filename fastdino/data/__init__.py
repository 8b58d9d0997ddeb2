"""An image becomes views."""

from fastdino.data.batch import Batch, Masks
from fastdino.data.loader import BadData, TrainBatches, labelled_batches, train_batches
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.folder import FolderSource, split_folders
from fastdino.data.sources.opening import open_source
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.sources.source import Source
from fastdino.data.views import normalize
from fastdino.data.workers import WorkerDied

__all__ = [
    "BadData",
    "BadImage",
    "Batch",
    "FolderSource",
    "Masks",
    "ShapesSource",
    "Source",
    "TrainBatches",
    "WorkerDied",
    "labelled_batches",
    "normalize",
    "open_source",
    "split_folders",
    "train_batches",
]
