"""Segmentation in context: a patch is what the patches nearest to it are, of images whose classes are known.

Source: Balazevic et al. 2023 (Hummingbird), by the settings of its public re-implementation, open-hummingbird-eval.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.data.benchmarks.masks import Masked
from fastdino.data.views.evaluation import nearest
from fastdino.eval.dense.tokens import Read, shown

_AT_ONCE = 2**26  # similarities that are held


class Examples(NamedTuple):
    """Patches whose classes are known."""

    tokens: Tensor  # (M, D) fp32, L2-normalised
    classes: Tensor  # (M, C) fp32: shares of the patch's pixels, which sum to 1


def class_shares(masks: Tensor, patch: int, num_classes: int) -> Tensor:
    """uint8 (B, s, s) -> (B, rows, columns, C) fp32: which share of a patch's pixels is of each class.

    VOID pixels are not counted; of a patch that has no others all shares are 0.
    """
    rows, columns = masks.shape[1] // patch, masks.shape[2] // patch
    patches = masks.unflatten(2, (columns, patch)).unflatten(1, (rows, patch)).transpose(2, 3).flatten(0, 2).flatten(1)
    values = patches.long().clamp(max=num_classes)  # VOID is the last
    places = torch.arange(len(values), device=masks.device).unsqueeze(1) * (num_classes + 1) + values
    counts = places.flatten().bincount(minlength=len(values) * (num_classes + 1)).view(len(masks), rows, columns, -1)
    judged = counts[..., :num_classes].float()
    return judged / judged.sum(dim=-1, keepdim=True).clamp(min=1)


def collect(read: Read, source: Masked, size: int, patch: int, *, batch: int, most: int, seed: int = 0) -> Examples:
    """The patches of a source's images, or as many of each as ``most`` allows, drawn.

    Args:
        read: gives the tokens of images.
        source: images with masks.
        size: side to which both are squeezed.
        patch: side of a patch.
        batch: images at once.
        most: examples in all.
        seed: of the draw.
    """
    draws = torch.Generator().manual_seed(seed)
    tokens, classes = [], []
    for images in shown(source, size, batch, masks=True):
        found = F.normalize(read(images.pixels).float(), dim=-1).flatten(1, 2)
        masks = torch.stack([torch.from_numpy(nearest(mask, size, size)) for mask in images.masks])
        shares = class_shares(masks, patch, len(source.classes)).flatten(1, 2)
        for index, row, share in zip(images.indices, found, shares, strict=True):
            count = most * (index + 1) // len(source) - most * index // len(source)
            order = torch.randperm(len(row), generator=draws)
            chosen = order[share[order].sum(-1) > 0][:count]
            tokens.append(row[chosen.to(row.device)])
            classes.append(share[chosen].to(row.device))
    return Examples(torch.cat(tokens), torch.cat(classes))


def in_context(tokens: Tensor, examples: Examples, neighbours: int = 30, temperature: float = 0.02) -> Tensor:
    """(.., D) tokens -> (.., C) fp32: the mean class of the nearest examples, by softmax(cosine / temperature)."""
    queries = F.normalize(tokens.float(), dim=-1).flatten(0, -2)
    count = min(neighbours, len(examples.tokens))
    width = max(len(examples.tokens), count * examples.classes.shape[1])
    found = []
    for part in queries.split(max(1, _AT_ONCE // width)):
        cosine, index = (part @ examples.tokens.T).topk(count)
        weight = (cosine / temperature).softmax(dim=-1)
        found.append(torch.einsum("nk,nkc->nc", weight, examples.classes[index]))
    return torch.cat(found).view(*tokens.shape[:-1], -1)
