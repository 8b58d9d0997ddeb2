"""An image becomes 2 global and L local views, in two halves: drawing the random numbers, and applying them."""

from fastdino.data.views.evaluation import center_view, normalize
from fastdino.data.views.fast import Write, implementation
from fastdino.data.views.params import Column, groups, new_views, sample_params, sample_params_of_many
from fastdino.data.views.reference import apply

__all__ = [
    "Column",
    "Write",
    "apply",
    "center_view",
    "groups",
    "implementation",
    "new_views",
    "normalize",
    "sample_params",
    "sample_params_of_many",
]
