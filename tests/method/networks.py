"""Networks with the interface of fastdino.model.Network, small enough to follow, and the batches that they see."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.data import Batch, Masks
from fastdino.data.masks import masks_of
from fastdino.model import Outputs

B, D, P, K, N = 3, 4, 5, 7, 4


class Tiny(nn.Module):
    """Pixels of patches of 4 x 4 through two linear layers; CLS is the mean of its patches.

    Args:
        seed: of its weights.
        patch_prototypes: K' of a head of the patches' own; None: they share the other.
    """

    def __init__(self, seed: int, patch_prototypes: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.mlp, self.prototypes = nn.Linear(3, D), nn.Linear(D, P), nn.Linear(P, K, bias=False)
        self.mask_token = nn.Parameter(torch.randn(3))
        self.own = patch_prototypes is not None
        self.patch_mlp = nn.Linear(D, P) if self.own else self.mlp
        self.patch_prototypes = nn.Linear(P, patch_prototypes or K, bias=False) if self.own else self.prototypes

    def forward(self, views: dict[str, Tensor], masks: Masks | None = None) -> Outputs:
        pixels = {name: F.avg_pool2d(group.flatten(0, 1), 4).flatten(2).mT for name, group in views.items()}
        if masks is not None and masks.hidden is not None:
            pixels["global"] = torch.where(masks.hidden[..., None], self.mask_token, pixels["global"])
        tokens = [self.backbone(x) for x in pixels.values()]  # (V * B, N, D)
        cls = torch.cat([x.mean(1) for x in tokens]).unflatten(0, (-1, next(iter(views.values())).shape[1]))
        rows = masks.rows if masks is not None else torch.zeros(0, dtype=torch.int64)
        patches = tokens[0].flatten(0, 1)[rows]
        points, patch_points = F.normalize(self.mlp(cls), dim=-1), F.normalize(self.patch_mlp(patches), dim=-1)
        return Outputs(cls, patches, points, patch_points, self.prototypes.weight * 3, self.patch_prototypes.weight * 3)


class Given(nn.Module):
    """A teacher whose outputs are given: (T, B, D) features and (T, B, K) logits, of patches (M, D) and (M, K')."""

    def __init__(
        self, cls: Tensor, logits: Tensor, patches: Tensor | None = None, patch_logits: Tensor | None = None
    ) -> None:
        super().__init__()
        patches = cls.new_zeros(0, cls.shape[-1]) if patches is None else patches
        patch_logits = logits.new_zeros(0, logits.shape[-1]) if patch_logits is None else patch_logits
        prototypes = torch.eye(logits.shape[-1]), torch.eye(patch_logits.shape[-1])
        self.outputs = Outputs(cls, patches, logits, patch_logits, *prototypes)

    def forward(self, views: dict[str, Tensor], masks: Masks | None = None) -> Outputs:
        return self.outputs


def batch(seed: int, images: int = B, hidden: Tensor | None = None) -> Batch:
    """Two global views of 2 x 2 patches and three local ones of one; ``hidden`` (2B, 4)."""
    torch.manual_seed(seed)
    views = {"global": torch.randn(2, images, 3, 8, 8) * 8, "local": torch.randn(3, images, 3, 4, 4) * 8}
    return Batch(views, None if hidden is None else masks_of(hidden.unflatten(0, (2, images))))


def some_hidden(seed: int = 0) -> Tensor:
    """(2B, N): of the six views one hides nothing, the others one to three patches."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(2 * B, N, dtype=torch.bool)
    for view, count in enumerate((1, 3, 0, 2, 3, 1)):
        hidden[view, torch.randperm(N, generator=generator)[:count]] = True
    return hidden
