"""TokenCut: patches are a graph, and the cheapest cut through it tells an object from the rest."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.eval.objects.boxes import component

TAU = 0.2  # cosine above which two patches are joined
EPSILON = 1e-5  # weight between those that are not, so that the graph is connected


def token_cut(keys: Tensor, tau: float = TAU) -> np.ndarray:
    """The patches of one object.

    An edge weighs 1 where the cosine of two keys is above ``tau``, else 1e-5. The eigenvector of the second smallest
    eigenvalue of (D - W) v = l D v, with D the degrees, is split at its mean. The object is the connected part with
    the largest entry by magnitude, on that entry's side. Where all patches are alike, it is all of them.

    Args:
        keys: (rows, columns, D) of the last block, not normalised.
        tau: between -1 and 1.

    Returns (rows, columns) bool. Source: Wang et al. 2022, section 3.2; without their bilateral solver.
    """
    x = F.normalize(keys.flatten(0, 1).float(), dim=1)
    alike = x @ x.T > tau
    if alike.all():
        return np.ones(keys.shape[:2], bool)
    vector = second_eigenvector(torch.where(alike, 1.0, EPSILON).double())
    side, seed = vector > vector.mean(), int(vector.abs().argmax())
    return component((side == side[seed]).view(keys.shape[:2]).cpu().numpy(), seed)


def second_eigenvector(weights: Tensor) -> Tensor:
    """(N,) v of the second smallest l in (D - W) v = l D v, up to its scale; of symmetric (N, N) weights in fp64.

    With v = D^-1/2 z it is the ordinary problem of I - D^-1/2 W D^-1/2. On a CPU scipy computes the one vector.
    """
    root = weights.sum(dim=1).rsqrt()
    matrix = torch.eye(len(weights), dtype=weights.dtype, device=weights.device) - root[:, None] * weights * root
    if matrix.is_cuda:
        return torch.linalg.eigh(matrix)[1][:, 1] * root
    from scipy.linalg import eigh

    return torch.from_numpy(eigh(matrix.numpy(), subset_by_index=[1, 1])[1][:, 0]) * root
