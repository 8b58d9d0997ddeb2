"""Checkpoints that survive a kill at any point and load at any number of ranks and any ZeRO stage.

A checkpoint is some safetensors files and one manifest. Every rank writes the fragments of the flat fp32 shards that it
owns; rank 0 also writes the small tensors that all ranks share. The manifest, which has sizes and checksums of all
files, comes last: what has a manifest is complete. Loading copies the parts of fragments that a rank owns now, so
neither the number of ranks nor the ZeRO stage has to be the same. Nothing is ever unpickled.
"""

from fastdino.training.checkpoint.manifest import FORMAT, MANIFEST, CheckpointError, Manifest, NewerFormatError
from fastdino.training.checkpoint.reading import load, newest, read_manifest
from fastdino.training.checkpoint.saves import Saves
from fastdino.training.checkpoint.saving import About
from fastdino.training.checkpoint.storage import Folder, Store, at

__all__ = [
    "FORMAT",
    "MANIFEST",
    "About",
    "CheckpointError",
    "Folder",
    "Manifest",
    "NewerFormatError",
    "Saves",
    "Store",
    "at",
    "load",
    "newest",
    "read_manifest",
]
