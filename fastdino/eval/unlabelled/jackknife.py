"""Intervals of figures that are no sum over images: a spectrum's, a clustering's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdino.eval.intervals import Score

GROUPS, T = 10, 2.262157  # of Student's t with 9 degrees of freedom, 95 % within


def jackknife(figure: Callable[[Tensor], float], n: int, value: float | None = None) -> Score:
    """A figure of n images with the interval that leaving out a tenth of them at a time gives.

    The figures of drawn images, some of them twice, would not do: a spectrum has fewer directions then, and clusters
    agree too well.

    Args:
        figure: of the images at these places, (m,) int64.
        n: images. Of fewer than ten the interval is not a number.
        value: of all images, where there is a better way to it.

    Source: Shao and Wu 1989, the delete-d jackknife, by random groups.
    """
    value = figure(torch.arange(n)) if value is None else value
    kind = f"jackknife, n={n}"
    if n < GROUPS:
        return Score(value, math.nan, math.nan, kind)
    group = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % GROUPS
    others = torch.tensor([figure((group != left_out).nonzero().flatten()) for left_out in range(GROUPS)])
    half = T * math.sqrt((GROUPS - 1) * float(others.double().var(correction=0)))
    return Score(value, value - half, value + half, kind)
