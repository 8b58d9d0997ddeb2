"""What the references share to be fast on a CPU: chunks that stay in its cache, and no subnormal numbers."""

import math

import torch
from torch import Tensor

CHUNK_ELEMENTS = 5 * 2**16  # 1.25 MiB in fp32: the temporaries of a chunk together, which stay close to a core


def chunks(length: int, width: int, start: int = 0) -> list[slice]:
    """range(start, start + length) in slices of one size, each with CHUNK_ELEMENTS at most; none if it is empty.

    ``width``: elements of all temporaries for one of the range; a slice holds at least one.
    """
    most = max(1, CHUNK_ELEMENTS // max(1, width))
    step = max(1, -(-length // max(1, -(-length // most))))
    return [slice(i, min(i + step, start + length)) for i in range(start, start + length, step)]


def lowest_exponent(dtype: torch.dtype) -> float:
    """-58 (-472 in fp64): what exponents are raised to where a sum of exponentials is about 1.

    e^-58 next to 1 is far below the rounding error of fp32, as is e^-472 in fp64. But beyond e^-87 (e^-708) numbers are
    subnormal, and whatever touches them takes a CPU many times as long.
    """
    return math.log(torch.finfo(dtype).tiny) * 2 / 3


def without_subnormals_(x: Tensor, dim: int = -1) -> Tensor:
    """Raises ``x`` to :func:`lowest_exponent` below its maximum over ``dim``, before a softmax or a log-sum-exp."""
    return x.clamp_(min=x.amax(dim, keepdim=True).add_(lowest_exponent(x.dtype)))
