"""Labels spread from frames where they are known to the next: patches that look alike and lie near have the same."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def propagate(
    target: Tensor, sources: Tensor, labels: Tensor, *, radius: int = 12, k: int = 5, temperature: float = 0.1
) -> Tensor:
    """Soft labels of a frame's patches from those of other frames.

    A patch takes the mean label of the source patches at most ``radius`` rows and columns away, weighted by
    exp(cosine / temperature), of those whose cosine is among the ``k`` largest over all source frames together; ties
    with the last of them count.

    Args:
        target: (rows, columns, D) L2-normalised features.
        sources: (T, rows, columns, D) of T other frames.
        labels: (T, rows, columns, C) of those.

    Returns (rows, columns, C). A row of patches is compared with the rows near it alone, so that no matrix of all
    patches with all patches is made. Source: eval_video_segmentation.py of DINO v1.
    """
    rows, columns = target.shape[:2]
    at = torch.arange(columns, device=target.device)
    far = (at[:, None] - at).abs() > radius  # (columns, source columns)
    sources, labels = (x.transpose(0, 1).contiguous() for x in (sources, labels))  # rows of all frames side by side
    spread = []
    for row in range(rows):
        near = slice(max(0, row - radius), row + radius + 1)
        cosine = target[row] @ sources[near].flatten(0, 2).T  # (columns, source rows and frames and columns)
        cosine = cosine.unflatten(1, (-1, columns)).masked_fill(far[:, None], -torch.inf).flatten(1)
        best = cosine.topk(min(k, cosine.shape[1]), dim=1).values
        weight = torch.where(cosine >= best[:, -1:], cosine - best[:, :1], -torch.inf).div(temperature).exp()
        spread.append(weight / weight.sum(dim=1, keepdim=True) @ labels[near].flatten(0, 2))
    return torch.stack(spread)


def follow(
    frames: Iterable[Tensor], first: Tensor, context: int = 7, radius: int = 12, k: int = 5, temperature: float = 0.1
) -> Iterator[Tensor]:
    """Soft labels of every frame but the first, each from the first and from up to ``context`` frames before it.

    Args:
        frames: (rows, columns, D) features of each frame, of any length.
        first: (rows, columns, C) labels of the first.

    Yields (rows, columns, C) as frames come: only those that are still needed are kept.
    """
    known: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    start: tuple[Tensor, Tensor] | None = None
    for features in frames:
        x = F.normalize(features, dim=-1)
        if start is None:
            start = x, first
            continue
        sources, labels = (torch.stack(of) for of in zip(start, *known, strict=True))
        found = propagate(x, sources, labels, radius=radius, k=k, temperature=temperature)
        known.append((x, found))
        yield found


def hard_labels(soft: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows, columns, C) -> (height, width) int64, the label with the largest value at each pixel.

    Enlarged bilinearly, then each label stretched to [0, 1] over the frame where it occurs, so that a small object is
    not outvoted by the background.
    """
    large = F.interpolate(soft.movedim(-1, 0).unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    stretched = (large - low) / (high - low).clamp(min=torch.finfo(large.dtype).tiny)
    return torch.where(high > 0, stretched, large).argmax(dim=0)
