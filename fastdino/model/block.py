"""The layers of a vision transformer, on packed sequences: attention, MLP, residual branches with drop path.

Every parameter is read by the module that owns it, in its forward, which is what lets an engine partition them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.attention import attention, implementation
from fastdino.model.packing import Packing


class Shape(NamedTuple):
    """The widths that a name such as "small" stands for."""

    width: int
    depth: int
    num_heads: int
    hidden: int  # of the MLP


class PatchEmbed(nn.Module):
    """A linear map of each patch's pixels."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(R, 3, h, w) -> (R, N, D) in the weights' dtype, row by row of the grid."""
        return self.proj(x)


class PatchProjection(nn.Conv2d):
    """A convolution by its parameters' names and shapes. Patches do not overlap, so it is one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """(R, 3, h, w) -> (R, N, D)."""
        p = self.kernel_size[0]
        rows, columns = x.shape[-2] // p, x.shape[-1] // p
        x = x.to(self.weight.dtype).reshape(-1, 3, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.reshape(-1, rows * columns, 3 * p * p), self.weight.flatten(1), self.bias)


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
        if cls_only:
            x, packing = packing.take_first(x), packing.first_tokens()
        x = self._add(x, branch, packing)
        return self._add(x, self.mlp(self.norm2(x)), packing)

    def _add(self, x: Tensor, branch: Tensor, packing: Packing) -> Tensor:
        """Residual sum with drop path: a sequence keeps its branch with probability 1 - p, then divided by 1 - p."""
        if not self.training or not self.drop_path:
            return x + branch
        keep = 1 - self.drop_path
        kept = torch.empty(packing.num_sequences, 1, device=x.device, dtype=x.dtype).bernoulli_(keep)
        return torch.addcmul(x, branch, packing.per_token(kept), value=1 / keep)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a packed batch."""

    def __init__(self, shape: Shape, choice: str) -> None:
        super().__init__()
        self.num_heads, self.choice = shape.num_heads, choice
        self.qkv = Qkv(shape.width, shape.num_heads)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, packing: Packing, cls_only: bool = False) -> Tensor:
        """(1, tokens, D) -> (1, tokens, D); with ``cls_only`` (1, sequences, D), the CLS tokens' rows."""
        queries = packing
        if cls_only:
            (q,), (k, v), queries = self.qkv(packing.take_first(x), "q"), self.qkv(x, "kv"), packing.first_tokens()
        else:
            q, k, v = self.qkv(x)
        x = attention(q, k, v, queries=queries.lengths, keys=packing.lengths, choice=self.choice)
        return self.proj(x.flatten(2))

    def implementation(self) -> str:
        """What runs it, on the weights' device and in their dtype."""
        weight = self.proj.weight
        return implementation(self.choice, weight.device, weight.dtype, weight.shape[1] // self.num_heads)

    def cls_weights(self, x: Tensor) -> Tensor:
        """(R, tokens, D) -> (R, H, tokens) fp32, the softmax row of the CLS token, written out."""
        (q,), (k,) = self.qkv(x[:, :1], "q"), self.qkv(x, "k")
        scores = torch.einsum("rqhd,rnhd->rhn", q.float(), k.float())
        return (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)


class Qkv(nn.Linear):
    """Queries, keys and values in one matrix: rows q, k, v; within each, head by head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, 3 * width)
        self.num_heads = num_heads

    def forward(self, x: Tensor, wanted: str = "qkv") -> tuple[Tensor, ...]:  # type: ignore[override]
        """(.., D) -> those of q, k and v that are ``wanted``, neighbours of "qkv", each (.., H, d)."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if wanted != "qkv":
            first = "qkv".index(wanted) * self.in_features
            rows = slice(first, first + len(wanted) * self.in_features)
            weight, bias = weight[rows], bias[rows]
        return F.linear(x, weight, bias).unflatten(-1, (len(wanted), self.num_heads, -1)).unbind(-3)


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
