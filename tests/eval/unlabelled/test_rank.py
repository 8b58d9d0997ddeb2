"""RankMe, LiDAR and alpha-ReQ against answers worked out by hand."""

import math

import pytest
import torch

from fastdino.eval.unlabelled.rank import alpha_req, lidar, rankme, spectrum


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (torch.eye(8), 8.0),
        (torch.eye(8).repeat(5, 1), 8.0),
        (torch.ones(40, 8), 1.0),
        (torch.zeros(40, 8), 1.0),
        (torch.outer(torch.arange(1.0, 41), torch.arange(8.0)), 1.0),
        (torch.eye(8) * torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), 4.0),
        (torch.diag(torch.tensor([3.0, 1.0])), 4 / 3**0.75),  # shares 3/4 and 1/4
        (torch.diag(torch.tensor([3.0, 1.0]))[:, [1, 0]], 1.754765),
    ],
)
def test_rankme(features: torch.Tensor, expected: float) -> None:
    assert rankme(features) == pytest.approx(expected, rel=1e-6)
    assert rankme(7 * features) == pytest.approx(expected, rel=1e-6), "whatever their length"
    assert rankme(features.half()) == pytest.approx(expected, rel=1e-6), "computed in fp64"


def test_rankme_is_not_centered() -> None:
    """A mean that all features share is a direction, and the largest."""
    features = torch.cat([torch.eye(4), -torch.eye(4)])  # four directions alike
    assert rankme(features) == pytest.approx(4.0)
    assert rankme(features + 10) < 2


def test_lidar() -> None:
    """Two images on a line; images apart along three axes, of which the views blur the third three times as much."""
    line = torch.tensor([[[0.0, 0.0], [0.2, 0.2]], [[1.0, 1.0], [1.2, 1.2]]])
    assert lidar(line) == pytest.approx(1.0)
    images = torch.cat([torch.eye(3), -torch.eye(3)])
    views = images[:, None] + 0.5 * images  # each image is seen along every axis: Sw is diag(0.1, 0.1, 0.1)
    assert lidar(views) == pytest.approx(3.0)
    blurred = images[:, None] + 0.5 * images * torch.tensor([1.0, 1.0, 3.0])  # diag(0.1, 0.1, 0.9)
    shares = torch.tensor([9.0, 9.0, 1.0]) / 19
    assert lidar(blurred, ridge=0.0) == pytest.approx(float(torch.special.entr(shares).sum().exp()))
    assert rankme(blurred.flatten(0, 1)) > 2.9, "RankMe takes the blur for more"


def test_the_ridge_keeps_the_scatter_whole() -> None:
    """Views that are all alike leave no scatter, and images that are all alike nothing to tell apart."""
    alike = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[:, None].expand(4, 5, 2)
    assert lidar(alike) == pytest.approx(2.0)
    assert lidar(torch.ones(4, 5, 2)) == 1.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req(alpha: float) -> None:
    """Rows +-sqrt(value) along each of ten axes, about a mean that is not a direction of theirs."""
    wanted = torch.arange(1, 11).double() ** -alpha
    rows = torch.diag(wanted.sqrt())
    features = torch.cat([rows, -rows]) * 10**0.5 + 5
    assert spectrum(features).tolist() == pytest.approx(wanted.tolist())
    assert alpha_req(spectrum(features)) == pytest.approx(alpha)


def test_alpha_req_looks_at_places_3_to_6_of_ten() -> None:
    values = torch.tensor([1000.0, 999, 3**-1.0, 4**-1.0, 5**-1.0, 6**-1.0, 1e-9, 1e-9, 0, 0], dtype=torch.float64)
    assert alpha_req(values) == pytest.approx(1.0)
    assert alpha_req(torch.cat([values[:5], torch.zeros(5)])) == pytest.approx(1.0), "zeros are left out"


def test_a_spectrum_of_nothing() -> None:
    """Features that are all equal have no covariance, whatever rounding leaves of it."""
    features = torch.full((300, 20), 0.1) * torch.arange(1, 21)
    assert not spectrum(features).any()
    assert math.isnan(alpha_req(spectrum(features)))
