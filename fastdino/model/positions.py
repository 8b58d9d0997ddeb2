"""Where a patch lies: position embeddings, how they start and fit another grid, and rotary positions."""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches
ROPE_BASE = 100.0  # towards which the periods of rotary positions go


def resample_positions(positions: Tensor, matrix: Tensor) -> Tensor:
    """(1, patches, D) position embeddings -> (1, new patches, D) of another grid, by :func:`resampling`'s matrix."""
    with torch.autocast(positions.device.type, enabled=False):
        return (matrix @ positions.to(matrix.dtype)).to(positions.dtype)


@functools.lru_cache(maxsize=64)
def resampling(grid: Grid, new_grid: Grid, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new patches, patches) matrix of bicubic interpolation between grids, which is linear: resampled unit grids.

    A matrix product has a deterministic backward on a GPU, which bicubic interpolation lacks.

    Args:
        grid: of the patches there are.
        new_grid: wanted.
        rule: "offset": by the scale factor (new + 0.1) / old, as in vision_transformer.py of DINO v1, where the 0.1
            keeps the output from being a row short. It shifts the samples a little, and the weights of DINO v1 and of
            DINOv2 without registers are used with it. "antialias": to the new size, antialiased where that is smaller,
            as those of DINOv2 with registers are.
        device: of the result.
        dtype: of the result, fp32 or wider.
    """
    with torch.inference_mode(False):  # kept between calls, so it must not be an inference tensor
        units = torch.eye(math.prod(grid), device=device, dtype=dtype).view(1, -1, *grid)
        if rule == "antialias":
            resampled = F.interpolate(units, size=new_grid, mode="bicubic", antialias=True)
        else:
            scale = ((new_grid[0] + 0.1) / grid[0], (new_grid[1] + 0.1) / grid[1])
            resampled = F.interpolate(units, scale_factor=scale, mode="bicubic")
        return resampled.flatten(2)[0].T.contiguous()


def sincos_positions(grid: Grid, width: int) -> Tensor:
    """(1, 1 + rows * columns, width) fixed sine-cosine positions, zero for CLS (MoCo v3, Chen et al. 2021)."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(patches, (0, 0, 1, 0)).float().unsqueeze(0)


class Rotation(NamedTuple):
    """Rotary positions of packed tokens (RoPE): by what angles the channels of a head are turned."""

    cos: Tensor
    """(tokens, 1, d) in fp32 or wider; 1 for what lies nowhere, CLS and registers."""
    sin: Tensor
    """(tokens, 1, d), 0 for CLS and registers."""

    def turn(self, x: Tensor) -> Tensor:
        """(1, tokens, H, d) queries or keys, channel j turned with channel j + d / 2; in the dtype of ``x``."""
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([-second, first], dim=-1) * self.sin).to(x.dtype)

    def take(self, tokens: Tensor) -> "Rotation":
        """Of some of the tokens."""
        return Rotation(self.cos.index_select(0, tokens), self.sin.index_select(0, tokens))


def rotation(angles: list[Tensor], sequences: list[int], num_prefix: int) -> Rotation:
    """Of a packed batch whose sequences have ``num_prefix`` tokens before their patches.

    Args:
        angles: (N, d / 2) of the patches, per group.
        sequences: of each group.
    """

    def packed(tables: list[Tensor], prefix: float) -> Tensor:
        whole = [F.pad(table.repeat(1, 2), (0, 0, num_prefix, 0), value=prefix) for table in tables]
        return torch.cat([x.repeat(n, 1) for x, n in zip(whole, sequences, strict=True)]).unsqueeze(1)

    return Rotation(packed([x.cos() for x in angles], 1.0), packed([x.sin() for x in angles], 0.0))


@functools.lru_cache(maxsize=64)
def rope_angles(grid: Grid, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows * columns, d / 2) angles of axial rotary positions for heads of ``width`` d: those of rows, then columns.

    A patch's center lies in [-1, 1] along each side. Coordinate x turns by 2 pi x / period, the d / 4 periods going
    from 1 towards 100 geometrically (DINOv3, Simeoni et al. 2025).
    """
    assert width % 4 == 0, f"heads of {width} do not divide into two axes of pairs"
    with torch.inference_mode(False):
        periods = rope_periods(width, device, dtype)
        axes = [(torch.arange(n, device=device, dtype=dtype) + 0.5) / n * 2 - 1 for n in grid]
        row, column = torch.meshgrid(*axes, indexing="ij")
        angles = [2 * math.pi * axis.reshape(-1, 1) / periods for axis in (row, column)]
        return torch.cat(angles, dim=1)


def rope_periods(width: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(d / 4) periods of heads of ``width`` d: from 1 towards 100, geometrically."""
    return ROPE_BASE ** (torch.arange(width // 4, device=device, dtype=dtype) * 4 / width)
