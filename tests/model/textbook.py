"""A vision transformer written out: no packing, no pruning, every token of every block. What ours is held to."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.model import ViT

Weights = dict[str, Tensor]


def nano(size: Any = "nano", **options: Any) -> ViT:
    """A float64 ViT of 8 x 8 patches whose positions and biases are no longer near zero, nor its factors near one."""
    torch.manual_seed(0)
    vit = ViT(size, **{"patch_size": 8, "image_size": 48, **options}).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit


def views(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {str(i): torch.randn(shape, dtype=torch.float64) for i, shape in enumerate(shapes)}


def literal(
    vit: ViT, x: Tensor, hidden: Tensor | None = None, factors: Tensor | None = None, stretch: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Tokens after the final norm (R, prefix + N, D), last attention (R, H, tokens, tokens).

    ``x`` (R, 3, h, w); ``hidden`` (R, N) bool; ``factors`` (2 * depth, R) of each image's residual branches, 1 unless
    given; ``stretch`` multiplies rotary coordinates.
    """
    if factors is None:
        factors = torch.ones(2 * len(vit.blocks), len(x), dtype=x.dtype)
    factors = factors[:, :, None, None]
    w = dict(vit.named_parameters())
    grid = (x.shape[-2] // vit.patch_size, x.shape[-1] // vit.patch_size)
    rope, eps = "pos_embed" not in w, 1e-5 if "pos_embed" not in w else 1e-6
    y = _tokens(vit, w, x, hidden, grid)
    prefix = y.shape[1] - grid[0] * grid[1]
    heads, width = vit.blocks[0].attn.num_heads, vit.num_features
    weights = torch.empty(0)
    for i in range(len(vit.blocks)):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        z = F.layer_norm(y, (width,), b["norm1.weight"], b["norm1.bias"], eps)
        weight, bias = b["attn.qkv.weight"].split(width), b["attn.qkv.bias"].split(width)
        q, k, v = (
            (z @ a.T + (0 if rope and j == 1 else c)).unflatten(-1, (heads, -1)).transpose(1, 2)
            for j, (a, c) in enumerate(zip(weight, bias, strict=True))
        )
        if rope:
            q, k = _turned(q, grid, prefix, stretch), _turned(k, grid, prefix, stretch)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(dim=-1)
        z = (weights @ v).transpose(1, 2).flatten(2)
        y = y + factors[2 * i] * b.get("ls1.gamma", 1) * (z @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        z = F.layer_norm(y, (width,), b["norm2.weight"], b["norm2.bias"], eps)
        y = y + factors[2 * i + 1] * b.get("ls2.gamma", 1) * _mlp(b, z)
    return F.layer_norm(y, (width,), w["norm.weight"], w["norm.bias"], eps), weights


def _tokens(vit: ViT, w: Weights, x: Tensor, hidden: Tensor | None, grid: tuple[int, int]) -> Tensor:
    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=vit.patch_size)
    patches = patches.flatten(2).transpose(1, 2).clone()
    if hidden is not None:
        patches[hidden] = w["mask_token"][0]
    tokens = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches], dim=1)
    if "pos_embed" in w:
        positions = w["pos_embed"]
        if grid != vit.grid:
            old = positions[:, 1:].unflatten(1, vit.grid).permute(0, 3, 1, 2)
            if vit.interpolation == "offset":
                scale = ((grid[0] + 0.1) / vit.grid[0], (grid[1] + 0.1) / vit.grid[1])
                new = F.interpolate(old, scale_factor=scale, mode="bicubic")
            else:
                new = F.interpolate(old, size=grid, mode="bicubic", antialias=True)
            positions = torch.cat([positions[:, :1], new.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        tokens = tokens + positions
    if "register_tokens" in w:
        registers = w["register_tokens"].expand(len(x), -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
    return tokens


def _turned(x: Tensor, grid: tuple[int, int], prefix: int, stretch: float) -> Tensor:
    """(R, H, tokens, d): channels j and j + d/2 are a complex number, turned by the angle of its patch and pair."""
    d = x.shape[-1]
    angles = torch.zeros(x.shape[2], d // 2, dtype=x.dtype)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for j in range(d // 4):
                period = 100 ** (2 * j / (d / 2))
                patch = prefix + row * grid[1] + column
                angles[patch, j] = stretch * 2 * math.pi * (2 * (row + 0.5) / grid[0] - 1) / period
                angles[patch, d // 4 + j] = stretch * 2 * math.pi * (2 * (column + 0.5) / grid[1] - 1) / period
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _mlp(b: Weights, z: Tensor) -> Tensor:
    if "mlp.w3.weight" in b:
        gate, value = (z @ b["mlp.w12.weight"].T + b["mlp.w12.bias"]).split(b["mlp.w3.weight"].shape[1], dim=-1)
        return (gate / (1 + torch.exp(-gate)) * value) @ b["mlp.w3.weight"].T + b["mlp.w3.bias"]
    z = F.gelu(z @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
    return z @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
