"""Views become features: a Vision Transformer that runs views of several sizes as one packed sequence.

Parameter names are those of timm and DINO v1, so weights move between the three. Shapes below: V views of a size,
B images, N patches of a view, D width, H heads.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.model.attention import Lengths, attention, check_choice, implementation


class Shape(NamedTuple):
    """The widths that a name such as "small" stands for."""

    width: int
    depth: int
    num_heads: int
    hidden: int  # of the MLP


SIZES = {
    "nano": Shape(96, 4, 4, 384),
    "tiny": Shape(192, 12, 3, 768),
    "small": Shape(384, 12, 6, 1536),
    "base": Shape(768, 12, 12, 3072),
    "large": Shape(1024, 24, 16, 4096),
    "huge": Shape(1280, 32, 16, 5120),
    "giant": Shape(1408, 40, 16, 6144),
}


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie. The tensors depend on shapes alone and are kept between steps."""

    lengths: Lengths
    sequence: Tensor  # (tokens,) the sequence that each token belongs to
    cls: Tensor  # (sequences,) the token that is each sequence's CLS

    @property
    def cls_lengths(self) -> Lengths:
        """The lengths when only the CLS tokens are left."""
        return tuple((sequences, 1) for sequences, _ in self.lengths)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021) as in DINO v1: CLS token, pre-norm, no dropout but drop path.

    Args:
        size: a name in SIZES.
        patch_size: side of a patch in pixels.
        image_size: pixels, one side or (height, width), of the grid that ``pos_embed`` holds; views of any other
            size get interpolated positions.
        drop_path: probability of dropping a residual branch of the last block for one view; linear over depth.
        attention: "auto" | "xformers" | "sdpa".
        pos_embed: "learned" starts position embeddings from noise, "sincos" from sines and cosines; both learn.
        init: "trunc_normal" (std 0.02) or "xavier" for the linear layers.
    """

    def __init__(
        self,
        size: str = "small",
        *,
        patch_size: int = 16,
        image_size: int | tuple[int, int] = 224,
        drop_path: float = 0.0,
        attention: str = "auto",
        pos_embed: str = "learned",
        init: str = "trunc_normal",
    ) -> None:
        super().__init__()
        check_choice(attention)
        shape = SIZES[size]
        self.num_features, self.patch_size = shape.width, patch_size
        self.grid = self._grid(*((image_size, image_size) if isinstance(image_size, int) else image_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), shape.width))
        self.patch_embed = PatchEmbed(patch_size, shape.width)
        drop_paths = [drop_path * i / max(shape.depth - 1, 1) for i in range(shape.depth)]
        self.blocks = nn.ModuleList(Block(shape, rate, attention) for rate in drop_paths)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if pos_embed == "sincos":
            self.pos_embed.data.copy_(sincos_positions(self.grid, shape.width))
        init_linears(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) normalised images -> (B, D), the CLS token after the final norm."""
        return self.forward_groups([x.unsqueeze(0)])[0]

    def forward_groups(self, groups: list[Tensor]) -> Tensor:
        """All views of all sizes at once: (V_i, B, 3, h_i, w_i) per size -> (sum of V_i, B, D), views in order.

        The tokens of every view are packed into one sequence, so each linear layer runs once. The last block
        computes queries, projection and MLP for CLS tokens alone: no other row of its output is read.
        """
        batch = groups[0].shape[1]
        x, packing = _pack([self._tokens(views.flatten(0, 1)) for views in groups])
        for block in self.blocks[:-1]:
            x = block(x, packing)
        x = self.blocks[-1](x, packing, cls_only=True)
        return self.norm(x).view(-1, batch, self.num_features)

    def patch_tokens(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, N, D), the patch tokens after the final norm, row by row of the grid."""
        x, packing = _pack([self._tokens(x)])
        for block in self.blocks:
            x = block(x, packing)
        return self.norm(x).view(*packing.lengths[0], -1)[:, 1:]

    def attention_maps(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, H, N) fp32: how much the CLS token attends to each patch in the last block.

        A head's row sums to 1 minus what the CLS token keeps for itself.
        """
        x, packing = _pack([self._tokens(x)])
        for block in self.blocks[:-1]:
            x = block(x, packing)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.cls_weights(last.norm1(x).view(*packing.lengths[0], -1))[:, :, 1:]

    def _tokens(self, x: Tensor) -> Tensor:
        """(R, 3, h, w) -> (R, 1 + N, D): CLS and patches, positions added."""
        positions = self._positions(self._grid(*x.shape[-2:]))
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, self.patch_embed(x) + positions[:, 1:]], dim=1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, 1 + N, D) position embeddings for a grid of patches."""
        if grid == self.grid:
            return self.pos_embed
        return resample_positions(self.pos_embed, self.grid, grid)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per column and row. Raises ConfigError when patches do not tile the image."""
        p = self.patch_size
        if height % p or width % p or not height or not width:
            raise ConfigError(
                f"an image of {height}x{width} pixels does not divide into patches of {p}: resize or crop"
            )
        return height // p, width // p


class PatchEmbed(nn.Module):
    """A linear map of each patch's pixels. ``proj`` is a convolution in name and shape only."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(R, 3, h, w) -> (R, N, D) in the weight's dtype; one matrix product, faster than the convolution."""
        p = self.proj.kernel_size[0]
        rows, columns = x.shape[-2] // p, x.shape[-1] // p
        x = x.to(self.proj.weight.dtype).reshape(-1, 3, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.reshape(-1, rows * columns, 3 * p * p), self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), each branch dropped per sequence in training."""

    def __init__(self, shape: Shape, drop_path: float, attention: str) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape, attention)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, packing: Packing, cls_only: bool = False) -> Tensor:
        """(1, tokens, D) -> (1, tokens, D); with ``cls_only`` the CLS rows of the same result, (1, sequences, D)."""
        branch = self.attn(self.norm1(x), packing, cls_only)
        x = x.index_select(1, packing.cls) if cls_only else x
        x = self._add(x, branch, packing, cls_only)
        return self._add(x, self.mlp(self.norm2(x)), packing, cls_only)

    def _add(self, x: Tensor, branch: Tensor, packing: Packing, cls_only: bool) -> Tensor:
        """Residual sum with drop path: a sequence keeps its branch with probability 1 - p, then divided by 1 - p."""
        if not self.training or not self.drop_path:
            return x + branch
        keep = 1 - self.drop_path
        kept = torch.empty(len(packing.cls), 1, device=x.device, dtype=x.dtype).bernoulli_(keep)
        return torch.addcmul(x, branch, kept if cls_only else kept[packing.sequence], value=1 / keep)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a packed batch."""

    def __init__(self, shape: Shape, choice: str) -> None:
        super().__init__()
        self.num_heads, self.choice = shape.num_heads, choice
        self.qkv = nn.Linear(shape.width, 3 * shape.width)  # rows: q, k, v; within each, head by head
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, packing: Packing, cls_only: bool = False) -> Tensor:
        """(1, tokens, D) -> (1, tokens, D); with ``cls_only`` (1, sequences, D), the CLS tokens' rows."""
        if cls_only:
            q, (k, v) = self._split(x.index_select(1, packing.cls), 0, 1)[0], self._split(x, 1, 3)
        else:
            q, k, v = self._split(x, 0, 3)
        queries = packing.cls_lengths if cls_only else packing.lengths
        x = attention(q, k, v, queries=queries, keys=packing.lengths, choice=self.choice)
        return self.proj(x.flatten(2))

    def implementation(self) -> str:
        """What runs it, on the weights' device and in their dtype."""
        weight = self.qkv.weight
        return implementation(self.choice, weight.device, weight.dtype, weight.shape[1] // self.num_heads)

    def cls_weights(self, x: Tensor) -> Tensor:
        """(R, 1 + N, D) -> (R, H, 1 + N) fp32, the softmax row of the CLS token, written out."""
        q, k = self._split(x[:, :1], 0, 1)[0], self._split(x, 1, 2)[0]
        scores = torch.einsum("rqhd,rnhd->rhn", q.float(), k.float())
        return (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def _split(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """(.., D) -> those of q, k, v with first <= index < last, each (.., H, d)."""
        if (first, last) == (0, 3):
            y = self.qkv(x)
        else:
            rows = slice(first * x.shape[-1], last * x.shape[-1])
            y = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return y.unflatten(-1, (last - first, self.num_heads, -1)).unbind(-3)


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(.., D) -> (.., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


def init_linears(module: nn.Module, init: str) -> None:
    """Starts every nn.Linear in ``module``: trunc_normal(std 0.02) or Xavier-uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight) if init == "xavier" else nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


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


def _pack(groups: list[Tensor]) -> tuple[Tensor, Packing]:
    """(sequences, tokens, D) per group -> (1, all tokens, D) and where each sequence lies in it."""
    lengths = tuple((x.shape[0], x.shape[1]) for x in groups)
    packed = torch.cat([x.flatten(0, 1) for x in groups]).unsqueeze(0)
    return packed, _packing(lengths, packed.device)


@functools.lru_cache(maxsize=64)
def _packing(lengths: Lengths, device: torch.device) -> Packing:
    with torch.inference_mode(False):  # kept between calls, so they must not be inference tensors
        sequence, cls, first_sequence, first_token = [], [], 0, 0
        for sequences, tokens in lengths:
            index = torch.arange(sequences, device=device)
            sequence.append((first_sequence + index).unsqueeze(1).expand(-1, tokens).flatten())
            cls.append(first_token + tokens * index)
            first_sequence, first_token = first_sequence + sequences, first_token + sequences * tokens
        return Packing(lengths, torch.cat(sequence), torch.cat(cls))
