"""Segmentation by a linear head: batch normalisation and one linear layer on the tokens of frozen patches.

Source: BNHead of DINOv2, whose logits are enlarged to the image before they are compared; the rates are ours.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdino.data.benchmarks.masks import VOID, Masked
from fastdino.data.views.evaluation import nearest
from fastdino.eval.dense.tokens import Read, shown

KEPT_BYTES = 2**31  # of tokens that are kept between epochs; more are made again in each


class Recipe(NamedTuple):
    """How a head is trained: AdamW, its rate falling to 0 in a line."""

    steps: int
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch: int = 16


class Head(nn.Module):
    """Scores of C classes."""

    def __init__(self, width: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, num_classes)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, rows, columns, D) -> (B, rows, columns, C) fp32."""
        return self.linear(self.norm(tokens.float().flatten(0, 2))).view(*tokens.shape[:3], -1)


def enlarged(scores: Tensor, height: int, width: int) -> Tensor:
    """(B, rows, columns, C) -> (B, C, height, width), bilinear."""
    return F.interpolate(scores.movedim(-1, 1), (height, width), mode="bilinear", align_corners=False)


def pixel_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that are not VOID, 0 without any.

    Args:
        scores: (B, rows, columns, C) of patches.
        masks: uint8 (B, s, s).
    """
    logits = enlarged(scores, *masks.shape[1:])
    total = F.cross_entropy(logits, masks.long(), ignore_index=VOID, reduction="sum")
    return total / (masks != VOID).sum().clamp(min=1)


def fit_head(read: Read, source: Masked, size: int, recipe: Recipe, seed: int = 0) -> Head:
    """A head that learned from the whole images of ``source``, in a new order in every epoch, without augmentation.

    Args:
        read: gives the tokens of images.
        source: images with masks.
        size: side to which both are squeezed.
        recipe: how it is trained.
        seed: of its first weights and of the orders.
    """
    batches = _epochs(read, source, size, recipe.batch, seed)
    tokens, masks = next(batches)
    head = Head(tokens.shape[-1], len(source.classes), seed).to(tokens.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.steps, power=1.0)
    for step in tqdm(range(recipe.steps), desc="linear head", unit="step", leave=False, disable=None):
        optimizer.zero_grad()
        pixel_loss(head(tokens), masks).backward()
        optimizer.step()
        schedule.step()
        if step + 1 < recipe.steps:
            tokens, masks = next(batches)
    return head.eval().requires_grad_(False)


def _epochs(read: Read, source: Masked, size: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (b, rows, columns, D) and masks (b, s, s) of batch after batch, without end; every image once an epoch."""
    draws, images = torch.Generator().manual_seed(seed), _reader(read, source, size, batch)
    batch = min(batch, len(source))
    while True:
        order = torch.randperm(len(source), generator=draws)
        yield from images(order[: len(order) // batch * batch].tolist())


def _reader(
    read: Read, source: Masked, size: int, batch: int
) -> Callable[[list[int]], Iterator[tuple[Tensor, Tensor]]]:
    """Reads images in any order: from memory where the tokens of all fit into KEPT_BYTES, in half precision."""

    def stream(places: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for images in shown(source, size, batch, places, masks=True):
            tokens = read(images.pixels)
            masks = [torch.from_numpy(nearest(mask, size, size)) for mask in images.masks]
            yield tokens, torch.stack(masks).to(tokens.device)

    one, _ = next(stream([0]))
    if 2 * one.numel() * len(source) > KEPT_BYTES:
        return stream
    kept = [(tokens.half(), masks) for tokens, masks in stream(list(range(len(source))))]
    tokens, masks = (torch.cat(parts) for parts in zip(*kept, strict=True))

    def recall(places: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.tensor(places, device=tokens.device).split(batch):
            yield tokens[part], masks[part]

    return recall
