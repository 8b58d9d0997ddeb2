"""Which patches of the global views are hidden: a pure function of (seed, epoch, images), their number constant."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdino.config import ConfigError, ViewsConfig
from fastdino.data.batch import Masks
from fastdino.data.draws import Purpose, stream

STRATUM = 8  # images that share the range of ratios evenly; fewer where a micro batch is no multiple of it
_TRIES = 10  # to place a rectangle
_MIN_AREA = 4  # of a rectangle, in patches
_LOG_ASPECT = math.log(0.3)  # of the flattest; the slimmest is its mirror image


def sample_masks(seed: int, epoch: int, indices: Sequence[int], config: ViewsConfig, grid: tuple[int, int]) -> Tensor:
    """Draws the hidden patches of a micro batch: bool (2, B, N), True where hidden, for views of ``grid`` patches.

    Consecutive images, gcd(B, STRATUM) of them, are a stratum. Its draw is a function of (seed, epoch, its first index)
    alone. So a global batch has the same masks however it is split into micro batches of a multiple of STRATUM images.

    A share config.mask_share of a stratum's views is masked, each by the ratio of its own equal part of
    config.mask_ratio: at the part's middle, moved by a jitter that the part on the other side of the range takes with
    the other sign. Ratios are uniform over the range, and the number of hidden patches is the same for every draw.
    """
    size = math.gcd(len(indices), STRATUM)
    middles, reach = _counts(size, config, math.prod(grid))
    masks = np.zeros((2, len(indices), *grid), dtype=bool)
    for start in range(0, len(indices), size):
        draws = stream(Purpose.MASKS, seed, epoch, indices[start])
        views = np.argsort([next(draws) for _ in range(2 * size)], kind="stable")  # the first of them are masked
        jitter = [math.floor(next(draws) * (2 * reach + 1)) - reach for _ in range(len(middles) // 2)]
        balanced = [*jitter, *[0] * (len(middles) % 2), *(-x for x in reversed(jitter))]
        for view, middle, moved in zip(views.tolist(), middles, balanced, strict=False):
            _hide(masks[view // size, start + view % size], middle + moved, draws)
    return torch.from_numpy(masks.reshape(2, len(indices), -1))


def masks_of(hidden: Tensor) -> Masks:
    """The Masks of hidden patches, bool (2, B, N) on the CPU. The weights divide by the views that hide none too."""
    hidden = hidden.flatten(0, 1)  # (2B, N)
    view, patch = hidden.nonzero(as_tuple=True)
    weight = 1 / (len(hidden) * hidden.sum(dim=1).double())  # (2B,), infinite where no row takes it
    return Masks(hidden, view * hidden.shape[1] + patch, weight[view].float())


def check_masks(local_batch: int, config: ViewsConfig, grid: tuple[int, int]) -> None:
    """Raises ConfigError when a micro batch of ``local_batch`` images would hide no patch."""
    size = math.gcd(local_batch, STRATUM)
    middles, _ = _counts(size, config, math.prod(grid))
    if not middles:
        more = "" if size == STRATUM else f", or make run.local_batch={local_batch} a multiple of {STRATUM}"
        raise ConfigError(
            f"views.mask_share={config.mask_share} masks none of the {2 * size} views of {size} images: raise it{more}"
        )
    if not any(middles):
        raise ConfigError(
            f"views.mask_ratio={config.mask_ratio} hides none of the {grid[0]} x {grid[1]} patches of a global view: "
            "raise it, or use larger views or smaller patches"
        )


def num_hidden(local_batch: int, config: ViewsConfig, grid: tuple[int, int]) -> int:
    """M, the hidden patches of a micro batch of ``local_batch`` images: the same number in every one."""
    size = math.gcd(local_batch, STRATUM)
    return local_batch // size * sum(_counts(size, config, math.prod(grid))[0])


def _counts(size: int, config: ViewsConfig, num_patches: int) -> tuple[list[int], int]:
    """Hidden patches of each masked view of a stratum of ``size`` images, and how far a jitter moves them."""
    low, high = config.mask_ratio
    parts = round(2 * size * config.mask_share)
    middles = [int(num_patches * (low + (high - low) * (part + 0.5) / parts)) for part in range(parts)]
    return middles, math.floor(num_patches * (high - low) / (2 * parts)) if parts else 0


def _hide(mask: np.ndarray, count: int, draws: Iterator[float]) -> None:
    """Hides ``count`` patches of an empty mask, bool (rows, columns): rectangles, then as many single ones as lack.

    The rectangles are those of BEiT (Bao et al. 2021, algorithm 1) with DINOv2's limits: up to 10 tries for each, an
    area of at least 4 patches and at most what lacks or half the view, an aspect log-uniform in [0.3, 1 / 0.3], both
    sides below the view's.
    """
    rows, columns = mask.shape
    left = count
    while left:
        limit = min(left, mask.size / 2)
        for _ in range(_TRIES):
            area = _MIN_AREA + (limit - _MIN_AREA) * next(draws)
            aspect = math.exp(_LOG_ASPECT * (1 - 2 * next(draws)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < rows and width < columns:
                top = math.floor(next(draws) * (rows - height + 1))
                start = math.floor(next(draws) * (columns - width + 1))
                box = mask[top : top + height, start : start + width]
                added = height * width - int(np.count_nonzero(box))
                if 0 < added <= limit:
                    box[:] = True
                    left -= added
                    break
        else:
            break
    seen = np.flatnonzero(~mask).tolist()
    for _ in range(left):
        mask.flat[seen.pop(math.floor(next(draws) * len(seen)))] = True
