"""An image becomes views."""

from fastdino.data.loader import BadData, Batch, TrainBatches, WorkerDied, labelled_batches, train_batches
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.shapes import ShapesSource
from fastdino.data.sources.source import FolderSource, Source, open_source
from fastdino.data.views import normalize

__all__ = [
    "BadData",
    "BadImage",
    "Batch",
    "FolderSource",
    "ShapesSource",
    "Source",
    "TrainBatches",
    "WorkerDied",
    "labelled_batches",
    "normalize",
    "open_source",
    "train_batches",
]
