"""Masks: as DINOv2's generator draws them, their number constant, the same however a global batch is split."""

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdino.config import Config, ConfigError, LossConfig, ViewsConfig
from fastdino.data import BadImage, ShapesSource
from fastdino.data.draws import Purpose, stream, uniform
from fastdino.data.masks import check_masks, masks_of, sample_masks
from fastdino.data.sampler import Plan
from tests.data.batches import make_config, start, take

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures/dinov2_masks.json").read_text())


def draw(num_images: int, side: int = 14, epoch: int = 0, first: int = 0, seed: int = 0, **settings) -> Tensor:
    """(2, B, N) of images in order."""
    indices = range(first, first + num_images)
    return sample_masks(seed, epoch, indices, ViewsConfig(**settings), (side, side))


def with_masks(**options) -> Config:
    base = make_config(**options)
    return Config(**{**vars(base), "loss": LossConfig(patch_weight=1.0)})


# ------------------------------------------------------------------------------------------ as the official generator


def components(mask: np.ndarray) -> int:
    """Pieces of hidden patches that touch by a side."""
    left, count = {*zip(*mask.nonzero(), strict=True)}, 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            row, column = front.pop()
            near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= near
            front += near
    return count


@pytest.mark.parametrize("official", FIXTURE["generator"], ids=lambda g: f"{g['want']} of {g['side']}x{g['side']}")
def test_shapes_are_those_of_dinov2(official):
    """At a given count: how often a patch is hidden by its distance from the edge, and in how many pieces."""
    side, count = official["side"], official["want"]
    ratio = (count + 0.5) / side**2
    masks = draw(4096, side, mask_share=1.0, mask_ratio=(ratio, ratio)).reshape(-1, side, side).numpy()
    assert (masks.sum((1, 2)) == count).all(), "exact; the official ones lack up to 8"
    line = np.minimum(np.arange(side), np.arange(side)[::-1])
    ring = np.minimum(line[:, None], line)
    for distance, share in official["marginal_by_ring_from_edge"].items():
        assert masks.mean(0)[ring == int(distance)].mean() == pytest.approx(share, abs=0.02)
    pieces = np.mean([components(mask) for mask in masks[::10]])
    assert pieces == pytest.approx(official["mean_components"], abs=0.2)


@pytest.mark.parametrize("official", FIXTURE["collation"], ids=lambda c: f"{c['B']} of {c['side']}x{c['side']}")
def test_as_many_patches_and_views_as_dinov2_hides(official):
    """Theirs varies by 4 or so; middles of parts are as many within 2 %, where their buffer has 1 to 3 % more."""
    masks = draw(official["B"], official["side"])
    assert int(masks.any(-1).sum()) == official["masked_images"]
    assert int(masks.sum()) == pytest.approx(official["total_mean"], rel=0.02)
    assert int(masks.sum()) < official["upperbound"]


def test_ratios_are_uniform_over_the_range():
    shares = draw(4096).float().mean(-1)
    masked = shares[shares > 0].sort().values
    assert len(masked) == 4096
    assert masked[0] >= 0.1 - 1 / 196
    assert masked[-1] <= 0.5
    wanted = torch.linspace(0.1, 0.5, 4096) - 0.5 / 196  # whole patches, rounded down
    torch.testing.assert_close(masked, wanted, atol=0.01, rtol=0)


# ------------------------------------------------------------------------------------------------- a constant number


def number(size: int, num_patches: int, share: float, low: float, high: float) -> int:
    """Hidden patches of a stratum, by the formula."""
    parts = round(2 * size * share)
    return sum(int(num_patches * (low + (high - low) * (j + 0.5) / parts)) for j in range(parts))


def test_the_number_at_real_shapes():
    """Calculated by hand: parts' middles of 196 and 256 patches, 8 strata."""
    assert int(draw(64, 14).sum()) == 3736
    assert int(draw(64, 16).sum()) == 4888


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 6, 7, 8, 12, 40])
@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.5), (0.3, 0.3), (0.02, 0.97)])
def test_the_number_is_constant(num_images, share, low, high):
    """In every stratum, also where a micro batch is no multiple of 8: its images then share the range among fewer."""
    size = math.gcd(num_images, 8)
    want = number(size, 36, share, low, high)
    for epoch in range(12):
        masks = draw(num_images, 6, epoch, mask_share=share, mask_ratio=(low, high))
        strata = masks.unflatten(1, (-1, size))
        assert strata.sum((0, 2, 3)).tolist() == [want] * (num_images // size)
        assert (strata.any(-1).sum((0, 2)) <= round(2 * size * share)).all()


def test_ratios_vary_though_their_sum_does_not():
    counts = [sorted(draw(8, epoch=epoch).sum(-1).flatten().tolist())[8:] for epoch in range(100)]
    assert len({tuple(x) for x in counts}) > 90
    middles = [24, 34, 44, 53, 63, 73, 83, 93]
    for mirror in range(4):
        assert {x[mirror] + x[-1 - mirror] for x in counts} == {middles[mirror] + middles[-1 - mirror]}


def test_one_hundred_batches_have_one_shape():
    config = with_masks(local_batch=12)
    batches = take(100, config, ShapesSource(30, 8))
    shapes = {tuple(x.shape for x in batch.masks) for batch in batches}
    assert shapes == {((24, 16), (3 * number(4, 16, 0.5, 0.1, 0.5),), (3 * number(4, 16, 0.5, 0.1, 0.5),))}


# --------------------------------------------------------------------------------------------------------- pure draws


def test_a_draw_depends_on_its_address_alone():
    masks = draw(8)
    assert torch.equal(masks, draw(8))
    for other in (draw(8, epoch=1), draw(8, first=1), draw(8, seed=1)):
        assert not torch.equal(masks, other)


def test_views_of_an_image_draw_apart():
    """Of 16 views 8 are masked: both views of an image in 7 of 30 cases, and then by different masks."""
    one, other = draw(4096)
    both = one.any(-1) & other.any(-1)
    assert both.float().mean().item() == pytest.approx(7 / 30, abs=0.03)
    assert one.any(-1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (one[both] != other[both]).any(-1).all()
    ratios = torch.stack([one[both], other[both]]).float().mean(-1)
    assert abs(torch.corrcoef(ratios)[0, 1]) < 0.25, "of parts without one's own: slightly opposed"


def test_masks_never_change():
    """A run resumed with a later version has to see the same masks: these are for good."""
    masks = draw(8, 6, seed=3).reshape(16, 36)
    assert masks.sum(1).tolist() == [4, 11, 9, 13, 15, 0, 6, 17, 0, 0, 0, 0, 0, 8, 0, 0]
    assert masks[7].nonzero().flatten().tolist() == [2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17, 20, 21, 22, 23, 26]
    most = draw(8, 6, seed=3, mask_ratio=(0.9, 0.9)).reshape(16, 36)
    assert (~most[7]).nonzero().flatten().tolist() == [3, 5, 9, 35]


def test_a_stream_is_the_numbers_by_address_one_by_one():
    whole = uniform(Purpose.MASKS, 1, 2, 3, 1000)
    assert [*islice(stream(Purpose.MASKS, 1, 2, 3), 1000)] == whole.tolist()


# ---------------------------------------------------------------------------------------------------- rows and weights


def test_rows_and_weights_by_hand():
    hidden = torch.zeros(2, 3, 4, dtype=torch.bool)  # 3 images of 4 patches
    hidden[0, 1, [0, 3]] = True
    hidden[1, 0, 2] = True
    masks = masks_of(hidden)
    assert masks.rows.tolist() == [4, 7, 14]
    wanted = torch.tensor([1 / 12, 1 / 12, 1 / 6])  # 6 views, those without a mask among them
    assert torch.equal(masks.weight, wanted)
    assert torch.equal(masks.hidden, hidden.flatten(0, 1))
    assert [x.dtype for x in masks] == [torch.bool, torch.int64, torch.float32]


def test_rows_are_the_hidden_patches():
    masks = masks_of(draw(16))
    assert masks.hidden.shape == (32, 196)
    assert masks.hidden.flatten()[masks.rows].all()
    assert len(masks.rows.unique()) == len(masks.rows) == int(masks.hidden.sum())
    sums = torch.zeros(32).index_add_(0, masks.rows // 196, masks.weight)
    torch.testing.assert_close(sums, masks.hidden.any(1) / 32)


# ------------------------------------------------------------------------------------------------------ in the loader


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_masks_are_the_same_however_a_global_batch_is_split(world_size, accumulate):
    source = ShapesSource(70, 8)
    config = with_masks(local_batch=32 // world_size // accumulate, accumulate=accumulate)
    whole = take(3, with_masks(local_batch=32), source)
    by_rank = [take(3 * accumulate, config, source, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(3):
        parts = [by_rank[rank][step * accumulate + j].masks for j in range(accumulate) for rank in range(world_size)]
        hidden = torch.cat([part.hidden.unflatten(0, (2, -1)) for part in parts], dim=1)
        assert torch.equal(hidden.flatten(0, 1), whole[step].masks.hidden)
        assert {len(part.rows) for part in parts} == {len(whole[step].masks.rows) // len(parts)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_has_the_masks_of_its_images(shapes, num_workers):
    batches = start(with_masks(num_workers=num_workers), shapes)
    for step, batch in enumerate(islice(batches, 7)):
        keys = batches.plan.micro_batch(step, 0, 0)
        want = masks_of(sample_masks(3, keys[0][0], [index for _, index in keys], ViewsConfig(), (4, 4)))
        for found, wanted in zip(batch.masks, want, strict=True):
            assert torch.equal(found, wanted)
    batches.close()


def test_without_a_patch_loss_there_are_no_masks(shapes):
    assert next(start(make_config(), shapes)).masks is None


def test_a_replaced_image_keeps_its_mask(shapes, monkeypatch):
    """Also the first of its stratum, by which the others' masks are drawn."""
    config = with_masks()
    good = take(5, config, shapes)
    first = {Plan(num_images=22, local_batch=4, seed=3).micro_batch(step, 0, 0)[0][1] for step in range(5)}
    read = ShapesSource.read

    def damaged(self, index):
        if index in first:
            raise BadImage(str(index), "damaged")
        return read(self, index)

    monkeypatch.setattr(ShapesSource, "read", damaged)
    for ours, theirs in zip(take(5, config, shapes), good, strict=True):
        assert ours.bad
        assert torch.equal(ours.masks.hidden, theirs.masks.hidden)


# -------------------------------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mask_share": 0.0}, r"views.mask_share=0.0 must be in \(0, 1\].*loss.patch_weight at 0"),
        ({"mask_share": 1.1}, "views.mask_share=1.1"),
        ({"mask_ratio": (0.0, 0.5)}, r"views.mask_ratio=\(0.0, 0.5\) must be two numbers with 0 < low <= high < 1"),
        ({"mask_ratio": (0.5, 0.1)}, "views.mask_ratio"),
        ({"mask_ratio": (0.5, 1.0)}, "views.mask_ratio.*hidden whole"),
        ({"mask_ratio": (-0.1, 0.5)}, "views.mask_ratio"),
    ],
)
def test_settings_that_cannot_work(settings, says):
    with pytest.raises(ConfigError, match=says):
        ViewsConfig(**settings)


def test_masks_that_would_hide_nothing():
    check_masks(1, ViewsConfig(), (6, 6))
    with pytest.raises(ConfigError, match=r"views.mask_share=0.1 masks none of the 2 views of 1 images.*local_batch=3"):
        check_masks(3, ViewsConfig(mask_share=0.1), (6, 6))
    with pytest.raises(ConfigError, match=r"views.mask_ratio=\(0.01, 0.02\) hides none of the 6 x 6 patches"):
        check_masks(64, ViewsConfig(mask_ratio=(0.01, 0.02)), (6, 6))
    check_masks(64, ViewsConfig(mask_ratio=(0.01, 0.03)), (6, 6))


def test_a_run_whose_masks_would_hide_nothing_does_not_start(shapes):
    config = with_masks(local_batch=3)
    config = Config(**{**vars(config), "views": ViewsConfig(global_size=32, local_size=16, mask_share=0.1)})
    with pytest.raises(ConfigError, match=r"views\.mask_share"):
        start(config, shapes)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_grids_too_small_for_rectangles(side):
    masks = draw(8, side, mask_share=1.0, mask_ratio=(0.3, 0.9))
    assert int(masks.sum()) == number(8, side**2, 1.0, 0.3, 0.9)
