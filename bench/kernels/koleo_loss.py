"""koleo_loss, forward and backward: the class tokens of the global views, each within its view."""

from collections.abc import Callable

import torch
from lightly.loss import KoLeoLoss
from torch import Tensor

from bench.kernels.case import OURS, PLAIN, Bound, Case, Variant, generator, parse_shape
from fastdino_kernels import koleo_loss
from fastdino_kernels.losses.koleo_loss import koleo_loss_reference

# G, B, D
SHAPES = {"cuda": ["2,64,1024,bf16", "2,64,384", "2,1024,1024,bf16"], "cpu": ["2,64,384", "2,64,1024,bf16"]}


def cases(device: torch.device, shapes: list[str], compiled: bool) -> list[Case]:
    return [_case(device, shape, compiled) for shape in shapes]


def _case(device: torch.device, shape: str, compiled: bool) -> Case:
    (G, B, D), dtype = parse_shape(shape)

    def make(seed: int) -> Tensor:
        """Pairs: of many rows, two may else be equally near within a rounding, and variants choose differently."""
        x = torch.randn(G, B, D, generator=generator(device, seed), device=device)
        x[:, 1::2] += x[:, 0 : B // 2 * 2 : 2]
        return x.to(dtype).requires_grad_()

    variants = {
        OURS: Variant(_bind(koleo_loss)),
        PLAIN: Variant(_bind(koleo_loss_reference)),
        "lightly": Variant(_bind(_lightly)),
    }
    if compiled:
        variants["reference, torch.compile"] = Variant(_bind(torch.compile(koleo_loss_reference, dynamic=False)))
    # Forward reads the features; backward reads them again and writes their gradient.
    return Case("koleo_loss", shape, make, _exact, variants, 3 * G * B * D * dtype.itemsize)


def _lightly(features: Tensor) -> Tensor:
    """One call for each view, in fp32 as DINOv2 does it."""
    return torch.stack([KoLeoLoss()(view.float()) for view in features]).mean()


def _bind(implementation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Bound]:
    def bind(features: Tensor) -> Bound:
        def call() -> list[Tensor]:
            loss = implementation(features)
            (grad,) = torch.autograd.grad(loss, features)
            return [loss.detach(), grad]

        return call

    return bind


def _exact(features: Tensor) -> list[Tensor]:
    return _bind(koleo_loss_reference)(features.detach().double().requires_grad_())()
