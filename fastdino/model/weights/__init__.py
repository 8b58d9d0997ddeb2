"""Weights in and out of files, in the dialects of timm, Hugging Face and the repositories of DINO."""

from fastdino.model.weights.exports import Format, export_backbone
from fastdino.model.weights.files import (
    form_of,
    is_weights_folder,
    load_backbone,
    load_head,
    read_metadata,
    settled,
)
from fastdino.model.weights.form import Form, WeightsError

__all__ = [
    "Form",
    "Format",
    "WeightsError",
    "export_backbone",
    "form_of",
    "is_weights_folder",
    "load_backbone",
    "load_head",
    "read_metadata",
    "settled",
]
