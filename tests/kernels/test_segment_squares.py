"""The division of a flat tensor, and its sums of squares, against plain float64."""

import pytest
import torch

from fastdino_kernels.optim.segment_squares import BLOCK, make_segments, segment_squares, segment_squares_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Whole blocks, edges within and across blocks, segments of one and of no element, more than 1024 chunks, nothing.
LENGTHS = [(BLOCK, BLOCK), (3 * BLOCK + 5, 7, 0, 1, BLOCK - 13, 2 * BLOCK), (1,), (0, 5, 0), (64,) * 70, (0,), ()]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{sum(lengths)}")
def test_division(lengths: tuple[int, ...]) -> None:
    """Every element lies in one chunk, that of its segment, and no chunk crosses a block."""
    segments = make_segments(lengths, "cpu")
    owner = [segment for begin, end, segment in segments.chunks.tolist() for _ in range(begin, end)]
    assert owner == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert [begin for begin, _, _ in segments.chunks.tolist()] == sorted({b for b, _, _ in segments.chunks.tolist()})
    assert all(begin // BLOCK == (end - 1) // BLOCK for begin, end, _ in segments.chunks.tolist())
    for i, n in enumerate(lengths):
        rows = segments.chunks[segments.first_chunk[i] : segments.first_chunk[i + 1]]
        assert rows[:, 2].eq(i).all()
        assert (rows[:, 1] - rows[:, 0]).sum() == n


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{sum(lengths)}")
def test_squares(lengths: tuple[int, ...], dtype: torch.dtype, offset: int) -> None:
    flat = torch.full((sum(lengths) + offset + 9,), torch.nan, device=DEVICE, dtype=dtype)
    flat = flat[offset : offset + sum(lengths)].copy_(torch.randn(sum(lengths), device=DEVICE))
    segments = make_segments(lengths, DEVICE)
    got = segment_squares(flat, segments)
    exact = torch.stack([x.square().sum() for x in flat.double().split(lengths)]) if lengths else got.double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(segment_squares_reference(flat, segments).double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(segment_squares(flat.double(), segments), exact, rtol=1e-14, atol=0)


def test_more_chunks_than_one_block_of_sums() -> None:
    flat = torch.randn(1030 * BLOCK + 3, device=DEVICE)[3:]
    segments = make_segments((5, flat.numel() - 5), DEVICE)
    exact = torch.stack([x.square().sum() for x in flat.double().split(segments.lengths)])
    torch.testing.assert_close(segment_squares(flat, segments).double(), exact, rtol=2e-6, atol=0)


def test_a_nan_stays_in_its_segment() -> None:
    flat = torch.ones(300, device=DEVICE)
    flat[150], flat[299] = torch.nan, torch.inf
    squares = segment_squares(flat, make_segments((150, 1, 100, 49), DEVICE)).tolist()
    assert squares[0] == 150
    assert squares[1] != squares[1]
    assert squares[2:] == [100, torch.inf]


def test_refused() -> None:
    segments = make_segments((3, 4), "cpu")
    for flat in (torch.zeros(6), torch.zeros(7, 1), torch.zeros(14)[::2]):
        with pytest.raises(ValueError, match="divide 7 elements"):
            segment_squares(flat, segments)
    with pytest.raises(ValueError, match="on meta, its segments on cpu"):
        segment_squares(torch.zeros(7, device="meta"), segments)
    with pytest.raises(ValueError, match="not be negative, got -1"):
        make_segments((3, -1), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
def test_real_size_is_deterministic() -> None:
    lengths = [590_592, 768] * 150
    flat = torch.randn(sum(lengths), device=DEVICE)
    segments = make_segments(lengths, DEVICE)
    squares = segment_squares(flat, segments)
    torch.testing.assert_close(squares, segment_squares_reference(flat, segments), rtol=1e-5, atol=0)
    assert all(torch.equal(squares, segment_squares(flat, segments)) for _ in range(20))
