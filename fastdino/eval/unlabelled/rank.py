"""How many directions the features use: RankMe, LiDAR and alpha-ReQ, which need no label."""

import torch
from torch import Tensor

FIRST = 3  # place in the spectrum, from 1, where alpha-ReQ's fit begins
LAST = 0.6  # and the share of D where it ends
RIDGE = 1e-4  # added to LiDAR's scatter within images
NOISE = 1e-12  # of the largest eigenvalue; what is below it is the rounding of a zero


def rankme(features: Tensor) -> float:
    """exp of the entropy of the singular values, divided by their sum, of (n, D) features: from 1 to min(n, D).

    It is n for n orthonormal rows and 1 for rows that are all alike. The features are not centered. Figures of one n
    alone compare: the paper takes 25,600 images, and below 10 D the count of images bounds the answer.

    Source: Garrido et al. 2023, RankMe, equation 1, whose 1e-7 beside each share only keeps the logarithm finite.
    """
    return _perplexity(torch.linalg.svdvals(features.double()))


def lidar(views: Tensor, ridge: float = RIDGE) -> float:
    """RankMe of what tells images apart and their views do not: from 1 to min(n - 1, D), of (n, q, D) features.

    q views of each of n images are a class. The eigenvalues of Sw^-1/2 Sb Sw^-1/2 stand in the place of the singular
    values, with Sb the covariance of the images' means, divided by n - 1, and Sw the scatter of the views about them,
    divided by n (q - 1), plus ``ridge`` times the identity.

    Source: Thilak et al. 2023, LiDAR, whose 1e-8 beside each share only keeps the logarithm finite. It takes 1,000
    images, 50 views of each and this ridge.
    """
    n, q, width = views.shape
    means = views.double().mean(dim=1)
    apart, within = means - means.mean(dim=0), (views - means[:, None]).flatten(0, 1)
    scatter = within.T @ within / (n * (q - 1)) + ridge * torch.eye(width, dtype=torch.float64, device=views.device)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), apart.T / (n - 1) ** 0.5, upper=False)
    return _perplexity(torch.linalg.svdvals(white).square())


def spectrum(features: Tensor) -> Tensor:
    """(D,) fp64 eigenvalues of the covariance of (n, D) features, the largest first; rounding errors are zeros."""
    centered = features.double() - features.double().mean(dim=0)
    values = torch.linalg.eigvalsh(centered.T @ centered / len(features)).flip(0)
    return values.where(values > NOISE * features.double().square().sum() / len(features), 0.0)


def alpha_req(values: Tensor) -> float:
    """By which power a :func:`spectrum` falls: alpha of eigenvalues that go as i ** -alpha; NaN without two of them.

    A line through (ln i, ln value) by least squares, i from 3 to 0.6 D, zeros left out. The paper finds features good
    with an alpha near 1. Above it few directions hold all of the variance, below it there is noise in all.

    Source: Agrawal et al. 2022, alpha-ReQ.
    """
    x, y = _line(values)
    if len(x) < 2:
        return float("nan")
    x = x - x.mean()
    return float(-(x @ y) / (x @ x))


def _line(values: Tensor) -> tuple[Tensor, Tensor]:
    """(ln i, ln value) of the places that alpha-ReQ fits."""
    places = torch.arange(FIRST, int(LAST * len(values)) + 1, device=values.device)
    fitted = values[places - 1]
    return places[fitted > 0].double().log(), fitted[fitted > 0].log()


def _perplexity(values: Tensor) -> float:
    """exp of the entropy of values >= 0 divided by their sum; 1 where all are zero."""
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())
