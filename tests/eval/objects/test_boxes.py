"""Boxes, LOST and TokenCut on answers worked out by hand."""

import numpy as np
import pytest
import torch

from fastdino.eval.objects.boxes import box_around, component, enlarged, ious, is_hit, largest_component
from fastdino.eval.objects.lost import degrees, lost
from fastdino.eval.objects.token_cut import second_eigenvector, token_cut


def test_corloc_by_hand() -> None:
    box = np.array([0, 0, 10, 10])
    third, half = np.array([5, 0, 15, 10]), np.array([0, 0, 10, 20])
    far, empty = np.array([20, 20, 30, 30]), np.array([5, 5, 5, 9])
    found = ious(box, np.stack([third, half, far, empty, box]))
    assert found == pytest.approx([1 / 3, 1 / 2, 0, 0, 1])
    assert not is_hit(box, third[None])
    assert is_hit(box, half[None])
    assert is_hit(box, np.stack([far, third, half]))  # any of them


def test_boxes_of_masks() -> None:
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3] = mask[3, 5] = True
    assert box_around(mask).tolist() == [3, 2, 6, 4]
    assert box_around(np.ones((6, 8), bool)).tolist() == [0, 0, 8, 6]
    assert component(mask, 2 * 8 + 3).sum() == 2
    assert np.argwhere(component(mask, 3 * 8 + 5)).tolist() == [[3, 5]]
    assert np.argwhere(largest_component(mask)).tolist() == [[2, 3], [3, 3]]
    mask[4, 4] = True  # by a corner alone: another part
    assert component(mask, 2 * 8 + 3).sum() == 2
    assert np.argwhere(largest_component(np.eye(3, dtype=bool))).tolist() == [[0, 0]]


def test_patches_beyond_the_image_are_cut() -> None:
    """An image of 10 x 13 pixels has 2 x 2 patches of 8, padded to the right and below."""
    large = enlarged(np.array([[False, False], [False, True]]), 8, 10, 13)
    assert large.shape == (10, 13)
    assert box_around(large).tolist() == [8, 8, 13, 10]


def test_lost_by_hand() -> None:
    """8 patches, 2 unlike the rest: they are alike one another only, so the seed is the first of them."""
    keys = torch.tensor([1.0, 1, 1, 1, -1, -1, 1, 1]).view(2, 4, 1) * torch.tensor([1.0, 0.0])
    keys = torch.where(keys < 0, torch.tensor([-0.1, 1.0]), keys)  # (-0.1, 1): negative with (1, 0)
    x = keys.flatten(0, 1)
    assert degrees(x @ x.T).tolist() == [5, 5, 5, 5, 1, 1, 5, 5]
    found = lost(keys)
    assert np.argwhere(found).tolist() == [[1, 0], [1, 1]]
    assert box_around(enlarged(found, 16, 30, 60)).tolist() == [0, 16, 32, 30]


def test_lost_joins_patches_of_low_degree_alone() -> None:
    """Patch 0 is the seed. Patches 1 and 2 are like it; 3 is like 2 alone, so it is in where 2 votes, and 2 votes only
    among enough of the lowest. Patch 6 is like the seed and lies apart."""
    alike = torch.full((8, 8), -1.0)
    for a, b in ((0, 1), (0, 2), (1, 2), (2, 3), (0, 6)):
        alike[a, b] = alike[b, a] = 1.0
    for a in (3, 4, 5, 7):
        for b in (3, 4, 5, 7):
            alike[a, b] = 1.0
    alike[3, 2] = alike[2, 3] = 5.0
    alike += 20 * torch.eye(8)  # products of keys: positive definite
    keys = torch.linalg.cholesky(alike.double()).view(1, 8, 8)
    assert degrees(alike).tolist() == [3, 2, 3, 4, 3, 3, 1, 3]
    assert np.flatnonzero(lost(keys)).tolist() == [6]  # with 6 for its seed: 0 is like it, but lies apart
    assert np.flatnonzero(lost(keys[:, :6])).tolist() == [0, 1, 2, 3]  # without it: degrees 2 2 3 3 2 2
    assert np.flatnonzero(lost(keys[:, :6], lowest=1)).tolist() == [0, 1, 2]  # what is like the seed itself


def test_lost_of_nothing() -> None:
    assert lost(torch.zeros(2, 3, 4)).sum() == 1
    assert lost(torch.ones(1, 1, 4)).all()


def test_token_cut_by_hand() -> None:
    """Of two cliques of 3 and 5, the object is the 3: their entries are larger, for both sides weigh the same."""
    keys = torch.eye(2)[[0, 0, 0, 1, 1, 1, 1, 1]].view(2, 4, 2)
    assert np.flatnonzero(token_cut(keys)).tolist() == [0, 1, 2]
    assert np.flatnonzero(token_cut(keys.flip(0, 1))).tolist() == [5, 6, 7]
    assert np.flatnonzero(token_cut(0.1 * keys)).tolist() == [0, 1, 2]  # the length of keys says nothing
    apart = torch.eye(2)[[0, 1, 0, 1, 1, 1, 1, 0]].view(2, 4, 2)  # the 3 do not touch
    assert token_cut(apart).sum() == 1


def test_tau_is_a_cosine() -> None:
    """Two groups of a cosine of 0.5: one above 0.2, two above 0.6."""
    pair = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    keys = pair[[0, 0, 0, 1, 1, 1, 1, 1]].view(1, 8, 2)
    assert token_cut(keys).all()
    assert np.flatnonzero(token_cut(keys, tau=0.6)).tolist() == [0, 1, 2]
    assert token_cut(torch.ones(1, 1, 3)).all()  # one patch


def test_the_eigenvector_solves_the_generalised_problem() -> None:
    torch.manual_seed(0)
    weights = torch.rand(20, 20).double()
    weights = weights + weights.T
    vector, degree = second_eigenvector(weights), weights.sum(1)
    moved = degree * vector - weights @ vector
    value = (moved @ vector) / (degree * vector @ vector)
    torch.testing.assert_close(moved, value * degree * vector)
    every = torch.linalg.eigvals(torch.diag(1 / degree) @ (torch.diag(degree) - weights)).real.sort().values
    torch.testing.assert_close(value, every[1])
