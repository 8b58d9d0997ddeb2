"""Views become features: a Vision Transformer that runs views of several sizes as one packed sequence.

Parameter names are those of timm and DINO v1, so weights move between the three. Shapes below: V views of a size,
B images, N patches of a view, D width, H heads.
"""

import math

import torch
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.model.attention import check_choice
from fastdino.model.block import Attention, Block, PatchEmbed, Shape, init_linears
from fastdino.model.packing import pack
from fastdino.model.positions import resample_positions, sincos_positions

SIZES = {
    "nano": Shape(96, 4, 4, 384),
    "tiny": Shape(192, 12, 3, 768),
    "small": Shape(384, 12, 6, 1536),
    "base": Shape(768, 12, 12, 3072),
    "large": Shape(1024, 24, 16, 4096),
    "huge": Shape(1280, 32, 16, 5120),
    "giant": Shape(1408, 40, 16, 6144),
}


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

    num_prefix = 1  # tokens of a sequence before its patches: CLS

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

    @property
    def implementation(self) -> str:
        """What runs attention, for a line of the log."""
        return f"attention by {next(m.implementation() for m in self.modules() if isinstance(m, Attention))}"

    @property
    def published(self) -> nn.Module:
        """The module whose state dict has the published names: this one."""
        return self

    def fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with position embeddings of another square grid resampled for this one."""
        positions = state.get("pos_embed")
        patches = 0 if positions is None else positions.shape[1] - 1
        side = math.isqrt(patches)
        if positions is None or patches == math.prod(self.grid) or side * side != patches:
            return state
        return {**state, "pos_embed": resample_positions(positions, (side, side), self.grid)}

    def forward(self, x: Tensor | dict[str, Tensor]) -> Tensor:
        """The CLS tokens after the final norm.

        Args:
            x: (V_i, B, 3, h_i, w_i) normalised views by name -> (sum of V_i, B, D), views in the order given; or
                (B, 3, h, w) images alone -> (B, D), as timm's models take them.

        The tokens of every view are packed into one sequence, so each linear layer runs once. The last block
        computes queries, projection and MLP for CLS tokens alone: no other row of its output is read.
        """
        groups = [x.unsqueeze(0)] if isinstance(x, Tensor) else list(x.values())
        tokens, packing = pack([self._tokens(views.flatten(0, 1)) for views in groups])
        for block in self.blocks[:-1]:
            tokens = block(tokens, packing)
        tokens = self.blocks[-1](tokens, packing, cls_only=True)
        features = self.norm(tokens).view(-1, groups[0].shape[1], self.num_features)
        return features[0] if isinstance(x, Tensor) else features

    def attention_maps(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, H, N) fp32: how much the CLS token attends to each patch in the last block.

        A head's row sums to 1 minus what the CLS token keeps for itself.
        """
        tokens, packing = pack([self._tokens(x)])
        for block in self.blocks[:-1]:
            tokens = block(tokens, packing)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        weights = last.attn.cls_weights(last.norm1(tokens).view(*packing.lengths[0], -1))
        return weights[:, :, self.num_prefix :]

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
