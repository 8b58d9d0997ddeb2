"""Position embeddings: how they start, and how they fit another grid of patches."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings of another grid by DINO v1's bicubic interpolation.

    Args:
        positions: (1, 1 + rows * columns, D); the first is the CLS token's and stays.
        grid: rows and columns of ``positions``.
        new_grid: rows and columns wanted.

    The scale factor is (new + 0.1) / old as in vision_transformer.py of DINO v1, where the 0.1 keeps the output from
    being a row short; it shifts the samples a little and released weights are used with it.
    """
    dtype = torch.promote_types(positions.dtype, torch.float32)
    with torch.autocast(positions.device.type, enabled=False):
        matrix = _resampling(grid, new_grid, positions.device, dtype)
        patches = matrix @ positions[:, 1:].to(dtype)
    return torch.cat([positions[:, :1], patches.to(positions.dtype)], dim=1)


@functools.lru_cache(maxsize=64)
def _resampling(grid: tuple[int, int], new_grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new patches, old patches) matrix of the interpolation, which is linear: its columns are resampled unit grids.

    A matrix product has a deterministic backward on a GPU, which bicubic interpolation lacks.
    """
    with torch.inference_mode(False):  # kept between calls, so it must not be an inference tensor
        units = torch.eye(math.prod(grid), device=device, dtype=dtype).view(1, -1, *grid)
        scale = ((new_grid[0] + 0.1) / grid[0], (new_grid[1] + 0.1) / grid[1])
        resampled = F.interpolate(units, scale_factor=scale, mode="bicubic")
        return resampled.flatten(2)[0].T.contiguous()


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """(1, 1 + rows * columns, width) fixed sine-cosine positions, zero for CLS (MoCo v3, Chen et al. 2021)."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(patches, (0, 0, 1, 0)).float().unsqueeze(0)
