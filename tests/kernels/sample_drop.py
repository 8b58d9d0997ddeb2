"""What the tests of gather_layer_norm and scatter_add_scaled share: packed groups, of which some sequences are kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.layers import _sample_drop, gather_layer_norm, scatter_add_scaled
from fastdino_kernels.testing import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Shape = tuple[tuple[tuple[int, int, int], ...], int]  # (sequences, kept, tokens of each) per group, and D
# With small_tiles: several programs per sequence and tiles per program, ragged in tokens and D, then a group that is
# kept whole in another order; one of many, more kept than are searched together, single tokens; one group, whole tiles;
# one token of one feature, of which LayerNorm has a test of its own.
SHAPES: list[Shape] = [
    (((4, 2, 19), (3, 3, 5)), 48),
    (((9, 1, 8), (11, 7, 3), (3, 2, 1)), 33),
    (((3, 2, 8),), 64),
    (((2, 1, 1),), 1),
]
OWN_BLOCKS: list[Shape] = [
    (((3, 2, 37), (2, 1, 5)), 384), (((2, 1, 17),), 1000), (((2, 1, 2),), 3000), (((2, 1, 2),), 4100),
]  # fmt: skip
REAL: list[Shape] = [
    (((128, 89, 197), (512, 358, 37)), 1024),
    (((128, 89, 201),), 768),
    (((24, 16, 261), (96, 67, 53)), 1536),
]


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"BLOCK_ROWS": 2, "BLOCK_D": 64, "num_warps": 2}
    config = {"each": {**block, "TOKENS": 4}, "sum": {**block, "TOKENS": 8}}
    for module in (_sample_drop, gather_layer_norm, scatter_add_scaled):
        monkeypatch.setattr(module, "launch_config", lambda width: config)
    for module in (gather_layer_norm, scatter_add_scaled):
        monkeypatch.setattr(module, "search_block", lambda rows: 4)


class Inputs:
    """Tokens of a dtype, of unequal means and deviations; vectors of theirs or another; rows in no order."""

    def __init__(self, shape: Shape, dtype: torch.dtype, vectors: torch.dtype | None = None) -> None:
        groups, D = shape
        generator = torch.Generator().manual_seed(D + sum(map(sum, groups)))

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.lengths = tuple((sequences, tokens) for sequences, _, tokens in groups)
        self.rows = [torch.randperm(n, generator=generator)[:kept] for n, kept, _ in groups]
        all_tokens, kept_tokens = sum(n * N for n, _, N in groups), sum(kept * N for _, kept, N in groups)
        x = random(all_tokens, 1) + random(all_tokens, D) * random(all_tokens, 1).exp()
        self.x, self.grad = x.to(dtype), random(all_tokens, D).to(dtype)
        self.branch, self.grad_y = random(kept_tokens, D).to(dtype), random(kept_tokens, D).to(dtype)
        self.weight, self.bias, self.layer_scale = (random(D).to(vectors or dtype) for _ in range(3))

    def sequences(self) -> Iterator[tuple[slice, slice | None, float]]:
        """Of each sequence: its tokens among all, its tokens among the kept ones if it is kept, its group's n / M."""
        first = first_kept = 0
        for (n, tokens), rows in zip(self.lengths, self.rows, strict=True):
            for b in range(n):
                start = first_kept + tokens * rows.tolist().index(b) if b in rows else None
                kept = None if start is None else slice(start, start + tokens)
                yield slice(first + b * tokens, first + (b + 1) * tokens), kept, n / len(rows)
            first, first_kept = first + n * tokens, first_kept + len(rows) * tokens

    def to(self, *where: Any) -> "Inputs":
        moved = object.__new__(Inputs)
        vars(moved).update(vars(self))
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(*where))
        if not isinstance(where[0], torch.dtype):
            moved.rows = [rows.to(*where) for rows in self.rows]
        return moved


def strided_inputs() -> tuple[Inputs, Inputs]:
    """The same numbers, contiguous and not: every other feature of wider tokens, transposed gradients, rows apart."""
    groups = ((5, 3, 9), (4, 1, 2))
    wide, dense, strided = (Inputs((groups, D), torch.float32) for D in (60, 30, 30))
    for name, value in vars(wide).items():
        if isinstance(value, Tensor):
            view = value[..., ::2]
            setattr(dense, name, view.contiguous())
            setattr(strided, name, view.mT.contiguous().mT if "grad" in name else view)
    dense.rows = wide.rows
    strided.rows = [torch.stack([rows, rows], 1)[:, 0] for rows in wide.rows]
    return dense, strided


def check(results: Callable[..., list[Tensor]], kernel: Any, reference: Any, inputs: Inputs) -> None:
    """Judges a kernel's results; the truth is taken on the CPU."""
    exact = results(reference, inputs.to(torch.float64))
    plain = results(reference, inputs)
    fused = results(kernel, inputs.to(DEVICE))
    for got, ref, want in zip(fused, plain, exact, strict=True):
        assert got.dtype == ref.dtype
        assert_no_worse(got.cpu(), ref, want)


X, LENGTHS, ROWS, VECTOR = (
    torch.zeros(14, 8),
    ((4, 3), (2, 1)),
    [torch.tensor([2, 0]), torch.tensor([1])],
    torch.zeros(8),
)
# What both refuse: x, lengths, rows, and what they say.
REFUSED: dict[str, tuple[Tensor, Any, Any, str]] = {
    "images": (X.view(2, 7, 8), LENGTHS, ROWS, r"x \(tokens, D\), not empty, .*; got \(2, 7, 8\)"),
    "nothing": (X[:, :0], LENGTHS, ROWS, r"not empty, .*; got \(14, 0\)"),
    "integers": (X.int(), LENGTHS, ROWS, "floating-point x"),
    "tokens of no group": (X[:13], LENGTHS, ROWS, r"groups .* \(\(4, 3\), \(2, 1\)\); got \(13, 8\)"),
    "a group of nothing": (X, ((14, 1), (0, 3)), ROWS, r"groups .* \(\(14, 1\), \(0, 3\)\)"),
    "no group": (X[:0], (), [], r"not empty, of groups"),
    "rows of another number of groups": (X, LENGTHS, ROWS[:1], "rows of 2 groups; got 1"),
    "int32 rows": (X, LENGTHS, [ROWS[0].int(), ROWS[1]], "int64 indices of a group's 4 sequences"),
    "rows of rows": (X, LENGTHS, [ROWS[0], ROWS[1][None]], r"got \(1, 1\) torch.int64"),
    "more rows than sequences": (X, LENGTHS, [ROWS[0], torch.arange(3)], r"a group's 2 sequences .*; got \(3,\)"),
    "no row": (X, LENGTHS, [ROWS[0], ROWS[1][:0]], r"at least one; got \(0,\)"),
    "rows elsewhere": (X, LENGTHS, [ROWS[0].to("meta"), ROWS[1]], "on meta"),
}
