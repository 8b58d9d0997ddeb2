"""Features become points: an MLP and a normalised bottleneck, beside weight-normalised prototypes (DINO v1, 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import HeadConfig
from fastdino.model.initialise import Rule, constant, initialise, of_layers, uniform
from fastdino_kernels import prototype_weight


class Head(nn.Module):
    """MLP -> L2 normalisation -> cosine with each prototype, times that prototype's norm.

    With ``freeze_prototype_norm`` every logit is a cosine in [-1, 1]. BatchNorm layers, where asked for, average over
    all rows of a forward pass; the teacher's stay in training mode and keep their own running statistics, as in v1.

    Args:
        num_features: D, width of the features.
        config: widths and options.
        init: "trunc_normal" (std 0.02) or "xavier" for the MLP; the prototypes start as in v1 either way.
        seed: of its first values.
    """

    def __init__(self, num_features: int, config: HeadConfig, init: str = "trunc_normal", seed: int = 0) -> None:
        super().__init__()
        hidden = [config.hidden_dim] * (config.num_layers - 1)
        widths = [num_features, *hidden, config.bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(config.num_layers):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            if i < config.num_layers - 1:
                layers += [nn.BatchNorm1d(widths[i + 1])] if config.batch_norm else []
                layers.append(nn.GELU())
        self.mlp, self.width, self.init = nn.Sequential(*layers), config.bottleneck_dim, init
        self.last_layer = Prototypes(config.bottleneck_dim, config.num_prototypes, config.freeze_prototype_norm)
        initialise(self, seed)

    def initial(self) -> dict[str, Rule]:
        """How its parameters start."""
        return of_layers(self, self.init)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(.., D) features -> (.., P) points and (K, P) prototypes, whose products are the logits.

        Both are in the dtype of the weights. A point is L2-normalised, in fp32: a bf16 norm is off by up to 0.4 %.
        """
        return self.points(x), self.prototypes()

    def points(self, x: Tensor) -> Tensor:
        """(.., D) -> (.., P), the MLP's output at length 1. Of no rows it makes no points, and BatchNorm sees none."""
        return self.project(x) if x.numel() else x.new_empty((*x.shape[:-1], self.width))

    def project(self, x: Tensor) -> Tensor:
        """:meth:`points` of at least one row."""
        z = self.mlp(x.flatten(0, -2))
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)
        return z.to(x.dtype).unflatten(0, x.shape[:-1])

    def prototypes(self) -> Tensor:
        """(K, P), each of the length that the head gives it."""
        return self.last_layer()


class Prototypes(nn.Module):
    """K prototypes: directions ``v`` (K, P) and norms ``g`` (K, 1), that is weight normalisation written out."""

    def __init__(self, width: int, num_prototypes: int, freeze_norm: bool) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(num_prototypes, width))
        self.g = nn.Parameter(torch.empty(num_prototypes, 1), requires_grad=not freeze_norm)

    def initial(self) -> dict[str, Rule]:
        """How its parameters start; the directions as nn.Linear's weights, which v1 leaves as they are."""
        return {"v": uniform(self.v.shape[1] ** -0.5), "g": constant(1.0)}

    def forward(self) -> Tensor:
        """(K, P) in the dtype of ``v``: g * v / |v|."""
        return prototype_weight(self.v, self.g)
