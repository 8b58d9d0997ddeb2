"""Backbones as ONNX graphs, for programs without torch."""

import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.files import whole_file
from fastdino.model.block import Block
from fastdino.model.positions import Rotation, resample_positions, resampling, rope_angles, rotation
from fastdino.model.vit import ViT

if TYPE_CHECKING:
    from fastdino.model.network import Backbone

LARGEST = 2**31 - 2**20  # bytes of weights that one file of protobuf holds, with its graph


def export_onnx(backbone: "Backbone", path: Path, size: int, metadata: Mapping[str, str]) -> str:
    """Writes a graph of ``image`` (B, C, size, size) fp32 -> ``features`` (B, D), for any B, whole or not at all.

    Args:
        backbone: in evaluation mode, fp32 on the CPU.
        path: the file.
        size: side in pixels of the images, normalised as in training.
        metadata: texts to write beside the graph.

    Returns the Python expression that loads it. Raises ConfigError when nothing can be written there, for weights that
    one file does not hold, and where the packages of the extra "onnx" are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}: pip install 'fastdino[onnx]'")
    held = sum(p.numel() * p.element_size() for p in backbone.parameters())
    if held > LARGEST:
        raise ConfigError(
            f"a file of ONNX holds 2 GB and this backbone has {held / 1e9:.1f} GB: use --format timm, and timm's ONNX "
            "exporter with external data"
        )
    images = torch.zeros(2, backbone.channels, size, size)
    graph = _Dense(backbone, size) if isinstance(backbone, ViT) else backbone
    quiet = logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")
    levels = [log.level for log in quiet]
    with whole_file(path) as partial, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for log in quiet:
            log.setLevel(logging.ERROR)
        try:
            batch = torch.export.Dim("batch", min=1)
            program = torch.onnx.export(
                graph, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
                input_names=["image"], output_names=["features"],
            )  # fmt: skip
            assert program is not None
            program.model.metadata_props.update(metadata)
            program.save(str(partial), external_data=False)
        finally:
            for log, level in zip(quiet, levels, strict=True):
                log.setLevel(level)
    return f"onnxruntime.InferenceSession({str(path)!r})"


class _Dense(nn.Module):
    """A ViT of images of one size, a row of tokens each: the lengths of packed ones are no part of a graph."""

    def __init__(self, vit: ViT, size: int) -> None:
        super().__init__()
        self.vit = vit
        grid, cpu = (size // vit.patch_size, size // vit.patch_size), torch.device("cpu")
        prefix: Tensor = vit.cls_token
        positions, turns = torch.zeros(()), Rotation(torch.ones(()), torch.zeros(()))
        if vit.pos_embed is None:
            turns = rotation([rope_angles(grid, vit.head_width, cpu, torch.float32)], [1], vit.num_prefix)
        else:
            of_cls, positions = vit.pos_embed.split([1, vit.pos_embed.shape[1] - 1], dim=1)
            prefix = prefix + of_cls
            if grid != vit.grid:
                matrix = resampling(vit.grid, grid, vit.interpolation, cpu, torch.float32)
                positions = resample_positions(positions, matrix)
        if vit.register_tokens is not None:
            prefix = torch.cat([prefix, vit.register_tokens], dim=1)
        tables = {"prefix": prefix, "positions": positions, "cos": turns.cos, "sin": turns.sin}
        for name, table in tables.items():
            self.register_buffer(name, table.detach().clone())

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, D)."""
        patches = self.vit.patch_embed(image) + self.positions
        x = torch.cat([self.prefix.expand(image.shape[0], -1, -1), patches], dim=1)  # type: ignore[operator]
        turns = Rotation(self.cos, self.sin)  # type: ignore[arg-type]
        for module in self.vit.blocks:
            block = cast(Block, module)
            q, k, v = block.attn.qkv(block.norm1(x)).unbind(-3)
            if self.vit.pos_embed is None:
                q, k = turns.turn(q), turns.turn(k)
            heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + block.ls1(block.attn.proj(heads.transpose(1, 2).flatten(2)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.vit.norm(x[:, 0])
