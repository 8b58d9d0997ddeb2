"""The order of images: a permutation, pure, dealt alike however a global batch is split."""

from itertools import islice

import numpy as np
import pytest

from fastdino.config import ConfigError
from fastdino.data.sampler import Plan, epoch_order


def test_an_epoch_is_a_permutation_and_pure():
    order = epoch_order(3, 1, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    epoch_order.cache_clear()
    assert np.array_equal(order, epoch_order(3, 1, 1000))
    for other in [(3, 2), (4, 1), (1, 3)]:
        assert not np.array_equal(order, epoch_order(*other, 1000))


def test_the_order_is_uniform():
    """Each image lands in each tenth of the epoch equally often, and neighbours do not stay together."""
    counts = np.zeros((10, 10))
    neighbours = 0
    for epoch in range(400):
        order = epoch_order(0, epoch, 10)
        counts[np.arange(10), order] += 1
        neighbours += (np.diff(order) == 1).sum()
    assert ((counts - 40) ** 2 / 40).sum() < 81 + 4 * (2 * 81) ** 0.5
    assert neighbours / 400 == pytest.approx(0.9, abs=0.15)


def test_the_order_never_changes():
    """A run resumed with a later version has to see the same images: this order is for good."""
    assert epoch_order(0, 0, 12).tolist() == [5, 3, 7, 8, 11, 2, 4, 1, 10, 0, 6, 9]


@pytest.mark.parametrize(("world_size", "local_batch", "accumulate"), [(1, 12, 1), (2, 3, 2), (4, 3, 1), (1, 1, 12)])
def test_a_step_trains_on_the_same_images_however_it_is_split(world_size, local_batch, accumulate):
    split = Plan(num_images=100, local_batch=local_batch, world_size=world_size, accumulate=accumulate, seed=7)
    whole = Plan(num_images=100, local_batch=12, seed=7)
    assert split.global_batch == whole.global_batch == 12
    for step in (0, 3, 7, 8, 17):
        parts = [split.micro_batch(step, micro, rank) for micro in range(accumulate) for rank in range(world_size)]
        assert all(len(part) == local_batch for part in parts)
        together = [key for part in parts for key in part]
        assert sorted(together) == sorted(whole.micro_batch(step, 0, 0))
        assert len(set(together)) == 12


def test_micro_batches_are_dealt_to_the_ranks_in_turn():
    """Positions [step * 12 + micro * 6 + rank * 3, + 3) of the epoch's order: what a checkpoint relies on."""
    plan = Plan(num_images=100, local_batch=3, world_size=2, accumulate=2, seed=7)
    order = epoch_order(7, 0, 100)
    for step, micro, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (5, 1, 1)]:
        start = step * 12 + micro * 6 + rank * 3
        assert [index for _, index in plan.micro_batch(step, micro, rank)] == order[start : start + 3].tolist()


def test_an_epoch_visits_each_image_once_and_drops_the_rest():
    plan = Plan(num_images=50, local_batch=4, world_size=3)
    assert plan.steps_per_epoch == 4
    for epoch in (0, 2):
        steps = range(4 * epoch, 4 * epoch + 4)
        keys = [key for step in steps for rank in range(3) for key in plan.micro_batch(step, 0, rank)]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == len(keys) == 48
        assert [i for _, i in keys] == epoch_order(0, epoch, 50)[:48].tolist()


def test_starting_late_continues_exactly():
    plan = Plan(num_images=50, local_batch=4, world_size=2, accumulate=2)
    from_start = list(islice(plan.micro_batches(1, 0), 20))
    for step in (1, 2, 3, 7):
        assert list(islice(plan.micro_batches(1, step), 20 - 2 * step)) == from_start[2 * step :]


def test_too_few_images_for_a_global_batch():
    with pytest.raises(ConfigError) as error:
        Plan(num_images=100, local_batch=16, world_size=8, accumulate=2)
    for part in ["100 images", "256", "run.local_batch=16", "8 ranks", "engine.accumulate=2", "lower"]:
        assert part in str(error.value)
    assert Plan(num_images=256, local_batch=16, world_size=8, accumulate=2).steps_per_epoch == 1


def test_the_order_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 1
