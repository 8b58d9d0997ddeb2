"""A batch moves whole."""

import torch

from fastdino.data import Batch, Masks


def test_a_batch_moves_with_its_masks():
    masks = Masks(torch.zeros(4, 9, dtype=torch.bool), torch.arange(6), torch.ones(6))
    batch = Batch({"global": torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8)}, masks, ["a.jpg"])
    moved = batch.to(torch.device("meta"))
    assert [x.device.type for x in (moved.views["global"], *moved.masks)] == ["meta"] * 4
    assert [x.dtype for x in moved.masks] == [torch.bool, torch.int64, torch.float32]
    assert moved.bad == ["a.jpg"]
    assert Batch(batch.views).to(torch.device("meta")).masks is None


def test_masks_that_hide_nothing_move_too():
    masks = Masks(None, torch.arange(6), torch.ones(6))
    moved = Batch({}, masks).to(torch.device("meta")).masks
    assert moved.hidden is None
    assert moved.rows.device.type == moved.weight.device.type == "meta"
