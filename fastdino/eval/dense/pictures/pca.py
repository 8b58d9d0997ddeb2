"""Principal components of the tokens of patches as red, green and blue."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Batches = Callable[[], Iterable[Tensor]]  # (B, rows, columns, D) again at each call
_SAMPLE = 2**20  # patches of which percentiles are taken


class Components(NamedTuple):
    """Three directions."""

    mean: Tensor  # (D,) fp64
    directions: Tensor  # (D, 3) fp64, the one of largest variance first
    explained: float  # share of the variance along them

    def __call__(self, tokens: Tensor) -> Tensor:
        """(.., D) -> (.., 3) fp64."""
        return (tokens.double() - self.mean) @ self.directions


def components(tokens: Iterable[Tensor]) -> Components:
    """Of tokens (n, D), part by part: sums of them are kept, and no token. The largest weight of each is positive.

    Raises ValueError where there is no token.
    """
    count, origin = 0, None
    total = product = torch.zeros((), dtype=torch.float64)
    for part in tokens:
        x = part.double()
        if len(x) and origin is None:
            origin = x[0]  # so that large means cancel nothing
        x = x if origin is None else x - origin
        count, total, product = count + len(x), total + x.sum(0), product + x.T @ x
    if origin is None:
        raise ValueError("no tokens to find components of")
    mean = total / count
    variances, directions = torch.linalg.eigh(product / count - torch.outer(mean, mean))  # the last is the largest
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    explained = variances[-3:].sum() / variances.sum().clamp(min=1e-300)
    return Components(origin + mean, directions * largest.sign(), explained.item())


def foreground(found: Components, batches: Batches) -> Components:
    """The same with its first direction turned so that the patches along the images' borders are below 0 on average."""
    total = 0.0
    for tokens in batches():
        value = found(tokens)[..., 0]
        rim = torch.ones_like(value, dtype=torch.bool)
        rim[:, 1:-1, 1:-1] = False
        total += value[rim].sum().item()
    directions = found.directions.clone()
    directions[:, 0] *= -1 if total > 0 else 1
    return found._replace(directions=directions)


def scale(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(.., 3) -> the same in [0, 1]: from ``low`` (3,) to ``high`` (3,)."""
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def percentiles(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3) -> the 2nd and 98th percentile of each component, (3,), over at most _SAMPLE rows."""
    some = values[:: max(1, -(-len(values) // _SAMPLE))]
    return some.quantile(0.02, dim=0), some.quantile(0.98, dim=0)


def colors(tokens: Tensor) -> Tensor:
    """(n, rows, columns, D) -> the same with 3 for D, fp64 in [0, 1]: red, green and blue by principal components.

    Each component from its 2nd to its 98th percentile, the sign of its largest weight positive.
    """
    found = components([tokens.flatten(0, 2)])
    values = found(tokens)
    return scale(values, *percentiles(values.flatten(0, 2)))
