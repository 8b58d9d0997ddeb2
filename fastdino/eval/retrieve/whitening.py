"""Features in which every direction counts the same."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdino.eval.features import EvaluationError

log = logging.getLogger(__name__)

CLAMP = 1e-5  # of the largest eigenvalue: a direction in which nothing varies is not blown up without end


@dataclass(frozen=True)
class Whitening:
    """Subtracts a mean, turns to the principal components and divides each by its deviation."""

    mean: Tensor
    """(D,) fp64."""
    components: Tensor
    """(D, D) fp64: a column per component, the largest first, divided by its deviation."""

    @classmethod
    def fit(cls, features: Tensor, centered: bool = True) -> "Whitening":
        """Learns from (n, D) features of any images. Their covariance becomes the identity, in fp64.

        Args:
            features: not normalised.
            centered: the components are those of the covariance, else of the second moment about 0, which DINO v1's
                eval_copy_detection.py takes; the mean is subtracted either way.

        Eigenvalues below CLAMP of the largest are taken for that. Raises EvaluationError for fewer than 2 images, or
        where all are the same.
        """
        x = features.double()
        if len(x) < 2:
            raise EvaluationError(f"whitening learns from 2 images or more, and there is {len(x)}: name another folder")
        if len(x) <= x.shape[1]:
            log.warning("whitening learns %d directions from %d images: give it more of them", x.shape[1], len(x))
        mean = x.mean(0)
        if centered:
            x = x - mean
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        if not values[0] > 0:
            raise EvaluationError("whitening learns from images that differ, and these have the same features")
        return cls(mean, vectors * values.clamp(min=CLAMP * values[0].item()).rsqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """(m, D) -> the same in fp32, whitened and not normalised."""
        return ((features.double() - self.mean) @ self.components).float()
