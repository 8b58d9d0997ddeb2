"""Views become features: a Vision Transformer that runs views of several sizes as one packed sequence.

Parameter names are those of timm and DINO v1, so weights move between the three. Shapes below: V views of a size,
B images of C channels, N patches of a view, D width, H heads.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdino.config import ConfigError, ModelConfig
from fastdino.data.batch import Masks
from fastdino.model.attention import check_choice
from fastdino.model.block import (
    NORM_EPS,
    ROPE_NORM_EPS,
    Block,
    Linear,
    PatchEmbed,
    Shape,
)
from fastdino.model.initialise import Rule, constant, initialise, of_layers, table, trunc_normal
from fastdino.model.packing import Drop, Packing, Reading, is_packed, packing_of
from fastdino.model.positions import (
    Grid,
    Rotation,
    resample_positions,
    resampling,
    rope_angles,
    rotation,
    sincos_positions,
)

SIZES = {
    "nano": Shape(96, 4, 4, 384),
    "tiny": Shape(192, 12, 3, 768),
    "small": Shape(384, 12, 6, 1536),
    "base": Shape(768, 12, 12, 3072),
    "large": Shape(1024, 24, 16, 4096),
    "huge": Shape(1280, 32, 16, 5120),
    "giant": Shape(1408, 40, 16, 6144),
    "small_plus": Shape(384, 12, 6, 1536, swiglu=True),
    "large_swiglu": Shape(1024, 24, 16, 2736, swiglu=True),
    "huge_plus": Shape(1280, 32, 20, 5120, swiglu=True),
    "giant2": Shape(1536, 40, 24, 4096, swiglu=True),
    "7b": Shape(4096, 40, 32, 8192, swiglu=True),
}

FP8_WIDTH = 1024  # from which a product in fp8 saves more than the rounding of its factors costs
Drops = tuple[Drop, Drop]  # of the branches of a block


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021) as in DINO: CLS token, pre-norm, no dropout but drop path.

    Args:
        size: a name in SIZES, or a shape.
        image_size: pixels, one side or (height, width), of the grid that ``pos_embed`` holds; views of any other
            size get interpolated positions.
        channels: C, of the views.
        mask_token: it has one, for the patches that are hidden from it.
        seed: of its first values.
        options: settings of :class:`fastdino.config.ModelConfig`, ``drop_path`` 0 by default; ``arch`` and
            ``weights`` are not read.
    """

    def __init__(
        self,
        size: str | Shape = "small",
        *,
        image_size: int | tuple[int, int] = 224,
        channels: int = 3,
        mask_token: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        model = ModelConfig(**{"drop_path": 0.0, **options})
        check_choice(model.attention)
        shape = SIZES[size] if isinstance(size, str) else size
        width, depth, rope = shape.width, shape.depth, model.pos_embed == "rope"
        self.num_features, self.head_width, self.patch_size = width, width // shape.num_heads, model.patch_size
        self.channels = channels
        self.num_prefix = 1 + (model.registers or 0)  # tokens of a sequence before its patches: CLS, registers
        self.interpolation, self.rope_scale = model.interpolation, model.rope_scale
        self.grid = self._grid(*((image_size, image_size) if isinstance(image_size, int) else image_size))
        self.starts = model.pos_embed, model.init
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = None if rope else nn.Parameter(torch.empty(1, 1 + math.prod(self.grid), width))
        self.register_tokens = nn.Parameter(torch.empty(1, model.registers, width)) if model.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, width)) if mask_token else None
        self.patch_embed = PatchEmbed(model.patch_size, width, channels)
        self.blocks = nn.ModuleList(
            Block(shape, model.attention, layer_scale=model.layer_scale, rope=rope) for _ in range(depth)
        )
        self.set_drop_path(model.drop_path, model.drop_path_rule)
        self.packed = model.packed
        self.norm = nn.LayerNorm(width, eps=ROPE_NORM_EPS if rope else NORM_EPS)
        initialise(self, seed)

    def initial(self) -> dict[str, Rule]:
        """How its parameters start."""
        pos_embed, init = self.starts
        tokens = dict.fromkeys(("cls_token", "pos_embed", "register_tokens"), trunc_normal(0.02))
        tokens["mask_token"] = constant(0.0)
        if pos_embed == "sincos":
            tokens["pos_embed"] = table(lambda: sincos_positions(self.grid, self.num_features))
        return of_layers(self, init) | {name: x for name, x in tokens.items() if getattr(self, name) is not None}

    @property
    def implementation(self) -> str:
        """What runs attention, for a line of the log."""
        return f"attention by {cast(Block, self.blocks[0]).attn.implementation()}"

    @property
    def published(self) -> nn.Module:
        """The module whose state dict has the published names: this one."""
        return self

    def regions(self) -> list[tuple[nn.Module, str]]:
        """The blocks, and what makes their input."""
        first = cast(Block, self.blocks[0])
        first.attn.implementation()  # is found by trying: now, rather than while a compiler traces
        start = [(self, "embed")] if self.pos_embed is not None else [(self, "embed"), (self, "turns")]
        return [*start, *((block, "forward") for block in self.blocks)]

    def units(self, device: torch.device) -> list[nn.Module]:
        """The blocks, where a forward pass on ``device`` calls each once."""
        return [*self.blocks] if is_packed(self.packed, device) else []

    def set_checkpointing(self, how: str) -> None:
        """What blocks compute again in the backward pass, see :class:`fastdino.config.EngineConfig`."""
        for block in self.blocks:
            cast(Block, block).checkpointing = how

    def set_drop_path(self, rate: float, rule: str = "linear") -> None:
        """Probabilities of dropping branches in training, see :class:`fastdino.config.ModelConfig`."""
        self.subsets = rule == "uniform"  # dropped branches are not computed
        for i, block in enumerate(self.blocks):
            cast(Block, block).drop_path = rate if self.subsets else rate * i / max(len(self.blocks) - 1, 1)

    def use_fp8(self) -> None:
        """The blocks' linear layers compute in fp8. Raises ConfigError for a network that is too narrow for it."""
        if self.num_features < FP8_WIDTH:
            raise ConfigError(
                f"engine.fp8=True needs a model.arch of width {FP8_WIDTH} or more, such as vit_large; this one has "
                f"{self.num_features}, where it would lose accuracy and no time: leave it out"
            )
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                layer.fp8 = True

    def keep_grid_of(self, positions: Tensor) -> None:
        """Makes room for ``positions`` (1, 1 + N, D) of another square grid, whose views get interpolated positions."""
        assert self.pos_embed is not None
        side = math.isqrt(positions.shape[1] - 1)
        self.grid = (side, side)
        new = self.pos_embed.new_empty(positions.shape)
        self.pos_embed = nn.Parameter(new, requires_grad=self.pos_embed.requires_grad)

    def forward(self, x: Tensor | dict[str, Tensor], masks: Masks | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens after the final norm: CLS of every view, and the patches that are asked for.

        Args:
            x: (V_i, B, C, h_i, w_i) normalised views by name, or square ones in patches, (V_i, B, N_i, C p^2); or
                (B, C, h, w) images alone, as timm's models take them.
            masks: which patches of the first group of views are hidden, and which are read.

        Returns (sum of V_i, B, D), views in the order given, and (M, D), M = 0 without masks; of images alone (B, D).

        The tokens of every view are packed into one sequence, so each linear layer runs once; or, where ``packed`` says
        so, those of each size.
        """
        groups = [x.unsqueeze(0)] if isinstance(x, Tensor) else list(x.values())
        passes = [groups] if is_packed(self.packed, groups[0].device) else [[group] for group in groups]
        first, patches = self._pass(passes[0], masks)
        cls = first if len(passes) == 1 else torch.cat([first, *(self._pass(part, None)[0] for part in passes[1:])])
        return cls[0] if isinstance(x, Tensor) else (cls, patches)

    def _pass(self, groups: list[Tensor], masks: Masks | None) -> tuple[Tensor, Tensor]:
        """CLS tokens and patches of groups in one sequence.

        The last block computes what is read alone: queries of the groups of which patches are read and of CLS tokens,
        the rest for such rows.
        """
        tokens, last = self._all_but_last_block(groups, masks)
        tokens = self.norm(self.blocks[-1](tokens, *last)).squeeze(0)
        cls, patches = tokens, tokens[:0]
        if masks is not None:
            cls, patches = tokens.split([last[0].num_sequences, len(masks.rows)])
        return cls.view(-1, groups[0].shape[1], self.num_features), patches

    def patch_tokens(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, rows, columns, D), the patches after the final norm."""
        tokens, last = self._all_but_last_block([x.unsqueeze(0)], whole=True)
        tokens = self.norm(self.blocks[-1](tokens, *last)).view(*last[0].lengths[0], -1)
        return tokens[:, self.num_prefix :].unflatten(1, self._grid(*x.shape[-2:]))

    def intermediate_layers(self, x: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """(B, C, h, w) -> of each of the last ``n`` blocks, all of them if there are fewer, the last one last: CLS
        tokens (B, D) and patches (B, N, D) after the final norm, as DINO's get_intermediate_layers has them."""
        tokens, packing, turns = self._start([x.unsqueeze(0)], None)
        layers = []
        for left, block in zip(range(len(self.blocks), 0, -1), self.blocks, strict=True):
            tokens = block(tokens, packing, turns, None, (None, None))
            if left <= n:
                layers.append(self.norm(tokens).view(*packing.lengths[0], -1))
        return [(layer[:, 0], layer[:, self.num_prefix :]) for layer in layers]

    def attention_maps(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, H, N) fp32: how much the CLS token attends to each patch in the last block.

        A head's row sums to 1 minus what the CLS token keeps for itself and gives to registers.
        """
        tokens, (packing, turns, *_) = self._all_but_last_block([x.unsqueeze(0)])
        last = self.blocks[-1]
        assert isinstance(last, Block)
        weights = last.attn.cls_weights(last.norm1(tokens).view(*packing.lengths[0], -1), turns)
        return weights[:, :, self.num_prefix :]

    def last_keys(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, rows, columns, D): keys of the patches in the last block, all heads one after the other.

        They are as the layer makes them, before a rotation: what a patch shows, without where it lies. Source: LOST
        (Simeoni et al. 2021), whose features they are.
        """
        tokens, (packing, *_) = self._all_but_last_block([x.unsqueeze(0)])
        last = self.blocks[-1]
        assert isinstance(last, Block)
        _, keys, _ = last.attn.qkv(last.norm1(tokens)).unbind(-3)
        keys = keys.flatten(2).view(*packing.lengths[0], -1)
        return keys[:, self.num_prefix :].unflatten(1, self._grid(*x.shape[-2:]))

    def _all_but_last_block(
        self, groups: list[Tensor], masks: Masks | None = None, whole: bool = False
    ) -> tuple[Tensor, tuple[Packing, Rotation | None, Reading | None, Drops]]:
        """Views as :meth:`forward` takes them -> (1, tokens, D), and what else the last block is given; ``whole``: it
        computes every token."""
        tokens, packing, turns = self._start(groups, None if masks is None else masks.hidden)
        reading = None if whole else packing.reading(None if masks is None else masks.rows, self.num_prefix)
        *drops, last = self._draw(packing, reading, tokens.dtype)
        for block, dropped in zip(self.blocks[:-1], drops, strict=True):
            tokens = block(tokens, packing, turns, None, dropped)
        return tokens, (packing, turns, reading, last)

    def _start(self, groups: list[Tensor], hidden: Tensor | None) -> tuple[Tensor, Packing, Rotation | None]:
        """What the first block is given."""
        rows = [views.flatten(0, 1) for views in groups]
        grids = [self._grid_of(x) for x in rows]
        device, dtype = rows[0].device, self.cls_token.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        counts = [self.num_prefix + math.prod(grid) for grid in grids]
        packing = packing_of(tuple((len(x), count) for x, count in zip(rows, counts, strict=True)), device)
        turns, matrices = None, None
        if self.pos_embed is None:
            angles = [rope_angles(grid, self.head_width, device, exact) for grid in grids]
            turns = self.turns(angles, self._stretch(len(rows), device, exact), [len(x) for x in rows])
        else:
            matrices = [
                None if grid == self.grid else resampling(self.grid, grid, self.interpolation, device, exact)
                for grid in grids
            ]
        return self.embed(rows, hidden, matrices), packing, turns

    def _draw(self, packing: Packing, reading: Reading | None, dtype: torch.dtype) -> list[Drops]:
        """What each block drops. The last has factors under either rule, for it computes what is read alone."""
        rates = [cast(Block, block).drop_path for block in self.blocks]
        if not self.training or not any(rates):
            return [(None, None)] * len(rates)
        if self.subsets:
            branches: Iterator[Drop] = iter(packing.draw_subsets(rates[0], 2 * (len(rates) - 1)))
            factors = packing.draw_factors(rates[-1:], dtype)
        else:
            factors = packing.draw_factors(rates, dtype)
            branches = iter(packing.per_token(factors[:-1]).flatten(0, 1))
        attn, mlp = packing.per_token(factors[-1], reading)
        return [*zip(branches, branches, strict=True), (attn, mlp)]

    def embed(self, rows: list[Tensor], hidden: Tensor | None, matrices: list[Tensor | None] | None) -> Tensor:
        """Packed tokens of all groups, (1, tokens, D); of each sequence CLS, registers, patches.

        Args:
            rows: (R, C, h, w), or patches, per group.
            hidden: (R, N) of the first group.
            matrices: per group, what resamples the positions, which are added to all but registers; None where the grid
                is their own.
        """
        prefix: Tensor = self.cls_token
        positions = None
        if self.pos_embed is not None:
            of_cls, positions = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
            prefix = prefix + of_cls
        if self.register_tokens is not None:
            prefix = torch.cat([prefix, self.register_tokens], dim=1)
        packed = []
        for i, x in enumerate(rows):
            patches = self.patch_embed(x)
            if hidden is not None and i == 0:
                assert self.mask_token is not None, "patches are hidden from a backbone without a mask token"
                seen = tuple(patches.shape[:2])
                assert hidden.shape == seen, f"a mask of {tuple(hidden.shape)}, {seen} patches"
                patches = torch.where(hidden.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
            if positions is not None and matrices is not None:
                matrix = matrices[i]
                patches = patches + (positions if matrix is None else resample_positions(positions, matrix))
            packed.append(torch.cat([prefix.expand(len(x), -1, -1), patches], dim=1).flatten(0, 1))
        return torch.cat(packed).unsqueeze(0)

    def turns(self, angles: list[Tensor], stretch: Tensor | None, sequences: list[int]) -> Rotation:
        """The rotation of packed tokens from their patches' (N, d / 2) angles per group, times a factor of each."""
        stretched = angles if stretch is None else [x * by for x, by in zip(angles, stretch, strict=True)]
        return rotation(stretched, sequences, self.num_prefix)

    def _stretch(self, groups: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """(groups,) random factors of both axes of all views of a size in training."""
        if not self.training or self.rope_scale == 1:
            return None
        most = math.log(self.rope_scale)
        return torch.empty(groups, device=device, dtype=dtype).uniform_(-most, most).exp()

    def _grid_of(self, x: Tensor) -> Grid:
        """Of (R, C, h, w), or of square views in patches, (R, N, C p^2)."""
        return self._grid(*x.shape[-2:]) if x.dim() == 4 else (math.isqrt(x.shape[1]),) * 2

    def _grid(self, height: int, width: int) -> Grid:
        """Patches per column and row. Raises ConfigError when patches do not tile the image."""
        p = self.patch_size
        if height % p or width % p or not height or not width:
            raise ConfigError(
                f"an image of {height}x{width} pixels does not divide into patches of {p}: resize or crop"
            )
        return height // p, width // p
