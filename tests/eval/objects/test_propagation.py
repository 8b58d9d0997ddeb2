"""Label propagation: by hand, and against the published formula with all patches of all frames in one matrix."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastdino.eval.objects.propagation import follow, hard_labels, propagate


def formula(target, sources, labels, radius: int, k: int, temperature: float):
    """One dense affinity of all patches of all frames with those of the target, as eval_video_segmentation.py."""
    (rows, columns, _), frames = target.shape, len(sources)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    near = ((place[:, None] - place).abs() <= radius).all(-1)  # (N, N)
    affinity = (sources.flatten(1, 2) @ target.flatten(0, 1).T / temperature).exp() * near  # (T, N sources, N)
    affinity = affinity.flatten(0, 1)
    least = affinity.topk(min(k, len(affinity)), dim=0).values[-1]
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(0)
    assert affinity.shape == (frames * rows * columns, rows * columns)
    return (labels.flatten(0, 2).T @ affinity).T.view(rows, columns, -1)


def test_labels_follow_their_features() -> None:
    """One-hot features; the target is a permutation of the source, and so are its labels."""
    torch.manual_seed(0)
    features, order = torch.eye(12), torch.randperm(12)
    labels = F.one_hot(torch.arange(12) % 5, 5).float()
    target, source = features[order].view(3, 4, 12), features.view(1, 3, 4, 12)
    found = propagate(target, source, labels.view(1, 3, 4, 5), radius=4, k=1)
    assert torch.equal(found.flatten(0, 1), labels[order])
    stay = propagate(target, source, labels.view(1, 3, 4, 5), radius=0, k=1)
    assert torch.equal(stay.flatten(0, 1), labels)  # each patch sees its own place alone


def test_weights_of_two_frames() -> None:
    """Cosines 1 and 0 at a temperature of 0.1: weights 1 / (1 + e^-10) and the rest."""
    target = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    sources = torch.eye(2).view(2, 1, 1, 2)
    found = propagate(target, sources, torch.eye(2).view(2, 1, 1, 2))
    assert found.flatten().tolist() == pytest.approx([0.9999546, 0.0000454], abs=1e-7)
    assert found[0, 0, 1].item() == pytest.approx(1 / (1 + math.exp(10)), rel=1e-3)


def test_ties_with_the_last_count() -> None:
    """Three sources of the same cosine and k of 2: a third each. One that is better: alone with k of 1."""
    target = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    sources = torch.tensor([0.6, 0.8]).expand(3, 1, 1, 2)
    labels = torch.eye(3).view(3, 1, 1, 3)
    assert propagate(target, sources, labels, k=2).flatten().tolist() == pytest.approx([1 / 3] * 3)
    better = torch.cat([sources[:2], target.unsqueeze(0)])
    assert propagate(target, better, labels, k=1).flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize(("radius", "k"), [(1, 5), (2, 3), (9, 5), (0, 5), (1, 100)])
def test_against_the_published_formula(radius: int, k: int) -> None:
    """The best are taken over all frames together, and a window moves over the edges."""
    torch.manual_seed(radius)
    features = F.normalize(torch.randn(5, 4, 6, 8).double(), dim=-1)
    features[2, 1, 2] = features[1, 1, 3]  # a tie over two frames
    labels = torch.rand(4, 4, 6, 3).double()
    found = propagate(features[4], features[:4], labels, radius=radius, k=k, temperature=0.1)
    torch.testing.assert_close(found, formula(features[4], features[:4], labels, radius, k, 0.1))


def test_the_first_frame_and_those_before() -> None:
    """Frame 5 is told by frame 0 and by 3 and 4; frame 1 by frame 0 alone."""
    torch.manual_seed(0)
    features = torch.randn(6, 3, 3, 4).double()
    first = F.one_hot(torch.arange(9).view(3, 3) % 2, 2).double()
    found = list(follow(iter(features), first, context=2, radius=1))
    assert len(found) == 5
    x, known = F.normalize(features, dim=-1), [first, *found]
    for frame, seen in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 3, 4])):
        labels = torch.stack([known[i] for i in seen])
        torch.testing.assert_close(known[frame], propagate(x[frame], x[seen], labels, radius=1))


def test_hard_labels() -> None:
    """A small object's values, below the background's, are stretched; a label that is nowhere wins nowhere."""
    soft = torch.zeros(2, 2, 3)
    soft[..., 0] = torch.tensor([[0.6, 1.0], [1.0, 1.0]])
    soft[0, 0, 1] = 0.4
    found = hard_labels(soft, (4, 4))
    assert found[0, 0] == 1
    assert found[-1].tolist() == [0, 0, 0, 0]
    assert not hard_labels(F.one_hot(torch.zeros(2, 2, dtype=torch.int64), 3).float(), (4, 4)).any()
