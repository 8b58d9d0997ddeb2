"""The layers of a vision transformer, on packed sequences: attention, MLP, residual branches with drop path.

Every parameter is read by the module that owns it, in its forward, which is what lets an engine partition them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdino.model.attention import attention, implementation
from fastdino.model.initialise import Rule, constant, uniform
from fastdino.model.packing import Drop, Packing, Reading, Subset
from fastdino.model.positions import Rotation
from fastdino_kernels import fp8_linear, gather_layer_norm, scatter_add_scaled


class Shape(NamedTuple):
    """The widths that a name such as "small" stands for."""

    width: int
    depth: int
    num_heads: int
    hidden: int  # of the MLP
    swiglu: bool = False  # the MLP is gated


NORM_EPS, ROPE_NORM_EPS = 1e-6, 1e-5  # of every norm; DINOv3's for a network with rotary positions


class PatchEmbed(nn.Module):
    """A linear map of each patch's pixels, of C channels."""

    def __init__(self, patch_size: int, width: int, channels: int) -> None:
        super().__init__()
        self.proj = PatchProjection(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, h, w), or patches (R, N, C p^2) -> (R, N, D) in the weights' dtype, row by row of the grid."""
        return self.proj(x)


class PatchProjection(nn.Conv2d):
    """A convolution by its parameters' names and shapes. Patches do not overlap, so it is one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, h, w), or patches (R, N, C p^2) -> (R, N, D)."""
        p, channels, x = self.kernel_size[0], self.in_channels, x.to(self.weight.dtype)
        if x.dim() == 4:
            rows, columns = x.shape[-2] // p, x.shape[-1] // p
            x = x.reshape(-1, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
            x = x.reshape(-1, rows * columns, channels * p * p)
        return F.linear(x, self.weight.flatten(1), self.bias)

    def initial(self) -> dict[str, Rule]:
        """How its parameters start: as torch's convolutions do."""
        return dict.fromkeys(("weight", "bias"), uniform(1 / math.sqrt(self.weight[0].numel())))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), each branch dropped for some sequences in training.

    What is dropped is drawn outside, so that the same input gives the same output and all blocks are one to a compiler.

    Attributes:
        drop_path: probability of dropping a branch, for who draws.
        checkpointing: what is computed again for the gradient. "selective": the norms and the MLP's hidden layer, not
            the products behind them, for recomputation ends with the last tensor that is missing; "full": all of it.
            In here, so that both passes of what is compiled, or is not, are of one kind.

    Args:
        shape: widths.
        attention: "auto" | "triton" | "varlen" | "xformers" | "sdpa".
        layer_scale: start of a factor per channel on each branch; 0: none.
        rope: it is given rotary positions. Then keys have no bias.
    """

    def __init__(self, shape: Shape, attention: str, *, layer_scale: float = 0.0, rope: bool = False) -> None:
        super().__init__()
        eps = ROPE_NORM_EPS if rope else NORM_EPS
        self.drop_path, self.checkpointing = 0.0, "none"
        self.norm1 = Norm(shape.width, eps=eps)
        self.attn = Attention(shape, attention, rope)
        self.ls1 = LayerScale(shape.width, layer_scale)
        self.norm2 = Norm(shape.width, eps=eps)
        self.mlp = SwiGlu(shape) if shape.swiglu else Mlp(shape)
        self.ls2 = LayerScale(shape.width, layer_scale)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        rotation: Rotation | None = None,
        reading: Reading | None = None,
        drops: tuple[Drop, Drop] = (None, None),
    ) -> Tensor:
        """(1, tokens, D) -> (1, tokens, D); with ``reading`` those rows of the same result, (1, read, D).

        ``drops`` are the branches'; a subset takes no reading.
        """

        def whole(x: Tensor) -> Tensor:
            return self._feed(self._attend(x, packing, rotation, reading, drops[0]), drops[1])

        return self._remade("full", whole, x)

    def _feed(self, x: Tensor, drop: Drop) -> Tensor:
        """x + MLP(norm(x))."""
        kept = drop if isinstance(drop, Subset) else None
        branch = self._remade("selective", lambda x: self.mlp(self.norm2(x, kept)), x)
        if isinstance(drop, Subset):
            return self.ls2(branch, x, drop)
        return _add(x, self.ls2(branch), drop)

    def _attend(
        self, x: Tensor, packing: Packing, rotation: Rotation | None, reading: Reading | None, drop: Drop
    ) -> Tensor:
        """x + attention(norm(x)), of what is read."""
        if isinstance(drop, Subset):
            turns = None if rotation is None else rotation.take(drop.tokens())
            qkv = self._remade("selective", lambda x: self.attn.qkv(self.norm1(x, drop)), x)
            return self.ls1(self.attn(qkv, drop.packing, turns), x, drop)
        asking = None if reading is None else reading.asking
        qkv = self._remade("selective", lambda x: self.attn.qkv(self.norm1(x), asking), x)
        branch = self.attn(qkv, packing, rotation, reading)
        if reading is not None:
            x = x.index_select(1, reading.rows)
        return _add(x, self.ls1(branch), drop)

    def _remade(self, how: str, work: Callable[[Tensor], Any], x: Tensor) -> Any:
        """What ``work`` makes of x, its inside made again in the backward pass if that is ``how`` it is asked for."""
        if self.checkpointing == how and torch.is_grad_enabled():
            return checkpoint(work, x, use_reentrant=False, preserve_rng_state=False)
        return work(x)


def _add(x: Tensor, branch: Tensor, factors: Tensor | None) -> Tensor:
    """The residual sum, each row of the branch times its factor."""
    return x + branch if factors is None else torch.addcmul(x, branch, factors)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a packed batch."""

    def __init__(self, shape: Shape, choice: str, rope: bool) -> None:
        super().__init__()
        self.num_heads, self.choice = shape.num_heads, choice
        self.qkv = Qkv(shape.width, shape.num_heads, key_bias=not rope)
        self.proj = Linear(shape.width, shape.width)

    def forward(
        self,
        qkv: Tensor | tuple[Tensor, Tensor, Tensor],
        packing: Packing,
        rotation: Rotation | None = None,
        reading: Reading | None = None,
    ) -> Tensor:
        """What ``self.qkv`` made of (1, tokens, D) -> (1, tokens, D); with ``reading`` those rows, (1, read, D)."""
        queries, starts = packing.lengths, packing.starts
        if reading is not None:
            queries, starts = reading.queries, reading.starts
        if rotation is not None:
            q, k, v = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
            qkv = (rotation if reading is None else rotation.take(reading.asking)).turn(q), rotation.turn(k), v
        x = attention(
            qkv, queries=queries, keys=packing.lengths, starts=(starts, packing.starts), choice=self.choice
        ).flatten(2)
        if reading is not None and reading.answers is not None:
            x = x.index_select(1, reading.answers)
        return self.proj(x)

    def implementation(self) -> str:
        """What runs it, on the weights' device and in their dtype."""
        weight = self.proj.weight  # which may be elsewhere but for its device and dtype
        return implementation(self.choice, weight.device, weight.dtype, self.proj.in_features // self.num_heads)

    def cls_weights(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """(R, tokens, D) -> (R, H, tokens) fp32, the softmax row of the CLS token, written out.

        ``rotation`` is of the R * tokens; it leaves the CLS token's query as it is.
        """
        q, k, _ = self.qkv(x, torch.zeros(1, dtype=torch.long, device=x.device))
        if rotation is not None:
            k = rotation.turn(k.flatten(0, 1).unsqueeze(0)).view_as(k)
        scores = torch.einsum("rqhd,rnhd->rhn", q.float(), k.float())
        return (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)


class Linear(nn.Linear):
    """A linear layer of a block, in fp8 where that is asked for. Whoever has it says how it starts."""

    fp8 = False

    def reset_parameters(self) -> None:
        """Nothing: no noise is drawn twice."""

    def forward(self, x: Tensor) -> Tensor:
        """(.., K) -> (.., N)."""
        return self.product(x, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same by this weight and bias, or rows of them."""
        return fp8_linear(x, weight, bias) if self.fp8 else F.linear(x, weight, bias)


class Qkv(Linear):
    """Queries, keys and values in one matrix: rows q, k, v; within each, head by head.

    Without ``key_bias`` the keys' third of the bias is there by name and shape, and never acts: a rotation, unlike the
    softmax, does not cancel it, and networks with rotary positions are made without.
    """

    def __init__(self, width: int, num_heads: int, key_bias: bool = True) -> None:
        super().__init__(width, 3 * width)
        self.num_heads, self.key_bias = num_heads, key_bias

    def forward(  # type: ignore[override]
        self, x: Tensor, asking: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(.., N, D) -> (.., N, 3, H, d); with tokens ``asking`` q of these alone, k, v, each (.., tokens, H, d)."""
        bias: Tensor = self.bias
        if not self.key_bias:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        if asking is None:
            return self._heads(self.product(x, self.weight, bias))
        rows = [self.in_features, 2 * self.in_features]
        (of_q, of_kv), (bias_q, bias_kv) = self.weight.split(rows), bias.split(rows)
        q = self._heads(self.product(x.index_select(-2, asking), of_q, bias_q)).squeeze(-3)
        return q, *self._heads(self.product(x, of_kv, bias_kv)).unbind(-3)  # type: ignore[return-value]

    def _heads(self, x: Tensor) -> Tensor:
        """(.., n D) -> (.., n, H, d)."""
        return x.unflatten(-1, (-1, self.num_heads, self.in_features // self.num_heads))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = Linear(shape.width, shape.hidden)
        self.fc2 = Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(.., D) -> (.., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """A linear layer gated by another one's SiLU, and a third: w3(silu(x1) * x2), x1 and x2 the halves of w12's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w12 = Linear(shape.width, 2 * shape.hidden)
        self.w3 = Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(.., D) -> (.., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Norm(nn.LayerNorm):
    """LayerNorm, of every token or of the sequences that a branch runs on."""

    def forward(self, x: Tensor, kept: Subset | None = None) -> Tensor:
        """(1, tokens, D) -> (1, tokens, D), of the ``kept`` sequences alone if that is given."""
        if kept is None:
            return super().forward(x)
        y = gather_layer_norm(x.squeeze(0), kept.whole.lengths, kept.rows, self.weight, self.bias, eps=self.eps)
        return y.unsqueeze(0)


class LayerScale(nn.Module):
    """A learned factor per channel of a branch (CaiT, Touvron et al. 2021); 1 where ``start`` is 0."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.empty(width)) if start else None

    def initial(self) -> dict[str, Rule]:
        """How its parameters start."""
        return {"gamma": constant(self.start)} if self.start else {}

    def forward(self, branch: Tensor, x: Tensor | None = None, kept: Subset | None = None) -> Tensor:
        """(.., D) -> (.., D); with the ``kept`` sequences that the branch ran on, its sum with the residual ``x``."""
        if x is not None and kept is not None:
            rows = (kept.whole.lengths, kept.rows)
            return scatter_add_scaled(x.squeeze(0), *rows, branch.squeeze(0), self.gamma).unsqueeze(0)
        return branch if self.gamma is None else branch * self.gamma
