"""What the tests of gather_layer_norm and scatter_add_scaled share: tokens, of which some images are kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.layers import _sample_drop, gather_layer_norm, scatter_add_scaled
from fastdino_kernels.testing import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, M, N, D) with small_tiles: several programs per image and tiles per program, ragged in N and D; all images kept,
# in another order; one of many; more kept than are searched together; one token of one feature.
SHAPES = [(4, 2, 19, 48), (3, 3, 5, 64), (9, 1, 8, 20), (11, 7, 3, 33), (2, 1, 1, 1)]
OWN_BLOCKS = [(3, 2, 37, 384), (2, 1, 17, 1000), (2, 1, 2, 3000), (2, 1, 2, 4100)]
REAL = [(128, 89, 201, 768), (512, 358, 37, 384), (24, 16, 261, 1536)]
Shape = tuple[int, int, int, int]


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"BLOCK_ROWS": 2, "BLOCK_D": 64, "num_warps": 2}
    config = {"each": {**block, "TOKENS": 4}, "sum": {**block, "TOKENS": 8}}
    for module in (_sample_drop, gather_layer_norm, scatter_add_scaled):
        monkeypatch.setattr(module, "launch_config", lambda width: config)
    for module in (gather_layer_norm, scatter_add_scaled):
        monkeypatch.setattr(module, "search_block", lambda num_rows: 4)


class Inputs:
    """Tokens of a dtype, of unequal means and deviations; vectors of theirs or another; rows in no order."""

    def __init__(self, shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None = None) -> None:
        B, M, N, D = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = random(B, N, 1) + random(B, N, D) * random(B, N, 1).exp()
        self.x, self.grad = x.to(dtype), random(B, N, D).to(dtype)
        self.branch, self.grad_y = random(M, N, D).to(dtype), random(M, N, D).to(dtype)
        self.weight, self.bias, self.layer_scale = (random(D).to(vectors or dtype) for _ in range(3))
        self.rows = torch.randperm(B, generator=generator)[:M]

    def to(self, *where: Any) -> "Inputs":
        moved = object.__new__(Inputs)
        for name, tensor in vars(self).items():
            is_rows = name == "rows" and isinstance(where[0], torch.dtype)
            setattr(moved, name, tensor if is_rows else tensor.to(*where))
        return moved


def strided_inputs() -> tuple[Inputs, Inputs]:
    """The same numbers, contiguous and not: tokens of a wider tensor, transposed gradients, every other feature."""
    wide = Inputs((5, 3, 9, 60), torch.float32)
    dense, strided = Inputs((5, 3, 9, 30), torch.float32), Inputs((5, 3, 9, 30), torch.float32)
    for name, tensor in vars(wide).items():
        view = tensor if name == "rows" else tensor[..., ::2]
        setattr(dense, name, view.contiguous())
        setattr(strided, name, view.mT.contiguous().mT if tensor.dim() == 3 else view)
    strided.rows = torch.stack([wide.rows, wide.rows], 1)[:, 0]
    return dense, strided


def check(results: Callable[..., list[Tensor]], kernel: Any, reference: Any, inputs: Inputs, **kwargs: Any) -> None:
    """Judges a kernel's results; the truth is taken on the CPU."""
    exact = results(reference, inputs.to(torch.float64))
    plain = results(reference, inputs)
    fused = results(kernel, inputs.to(DEVICE), **kwargs)
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert got.dtype == ref.dtype
        assert_no_worse(got.cpu(), ref, want)
