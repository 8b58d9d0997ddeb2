"""LOST: the patch that is like the fewest others lies on an object, and what is like it is the rest of the object."""

import numpy as np
from torch import Tensor

from fastdino.eval.objects.boxes import component

LOWEST = 100  # patches of the lowest degree among which the seed is joined


def lost(keys: Tensor, lowest: int = LOWEST) -> np.ndarray:
    """The patches of one object.

    Two patches are alike when the product of their keys is positive; a patch's degree counts those alike it. The seed
    is the patch of the lowest degree. The patches alike it, of the ``lowest`` ones by degree, vote: the object is the
    connected part with the seed where the sum of their products is positive.

    Args:
        keys: (rows, columns, D) of the last block, not normalised.
        lowest: patches that may join the seed.

    Returns (rows, columns) bool. Source: Simeoni et al. 2021, sections 3.2 and 3.3.
    """
    x = keys.flatten(0, 1).float()
    product = x @ x.T  # (N, N)
    order = degrees(product).argsort(stable=True)[:lowest]
    seed = order[0]
    voters = order[product[seed, order] > 0]
    object_ = product[voters].sum(dim=0) > 0
    object_[seed] = True  # also where its key is 0
    return component(object_.view(keys.shape[:2]).cpu().numpy(), int(seed))


def degrees(product: Tensor) -> Tensor:
    """(N, N) products of keys -> (N,): with how many others each patch's is positive."""
    alike = product > 0
    return alike.sum(dim=1) - alike.diagonal().int()
