"""The projection head against its formula and torch's own weight normalisation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fastdino.config import HeadConfig
from fastdino.model import Head

SMALL: dict[str, Any] = {"num_prototypes": 37, "hidden_dim": 24, "bottleneck_dim": 8}


def head(**options: Any) -> Head:
    torch.manual_seed(0)
    return Head(12, HeadConfig(**{**SMALL, **options}))


def logits(net: Head, x: torch.Tensor) -> torch.Tensor:
    points, prototypes = net(x)
    return points @ prototypes.T


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_formula(num_layers: int) -> None:
    net = head(num_layers=num_layers, freeze_prototype_norm=False).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in net.named_parameters()}
    z = x.numpy()
    for i in range(num_layers):
        z = z @ w[f"mlp.{2 * i}.weight"].T + w[f"mlp.{2 * i}.bias"]
        if i < num_layers - 1:
            z = z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    v = w["last_layer.v"]
    want = w["last_layer.g"][:, 0] * (z @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T)
    assert len(w) == 2 * num_layers + 2
    torch.testing.assert_close(logits(net, x), torch.tensor(want), rtol=1e-10, atol=1e-12)


def test_prototypes_equal_torchs_weight_norm() -> None:
    torch.manual_seed(0)
    net = head(freeze_prototype_norm=False).double()
    ours = net.last_layer
    theirs = weight_norm(nn.Linear(8, 37, bias=False).double(), dim=0)
    original = theirs.parametrizations.weight
    with torch.no_grad():
        ours.g.uniform_(0.5, 2)
        original.original0.copy_(ours.g)
        original.original1.copy_(ours.v)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(x @ net.prototypes().T, theirs(x))
    weights = torch.randn(5, 37, dtype=torch.float64)
    got = torch.autograd.grad((x @ net.prototypes().T * weights).sum(), [ours.g, ours.v])
    want = torch.autograd.grad((theirs(x) * weights).sum(), [original.original0, original.original1])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_norm_makes_logits_cosines() -> None:
    net = head()
    assert not net.last_layer.g.requires_grad
    assert net.last_layer.v.requires_grad
    assert [name for name, _ in net.named_parameters() if "last_layer" in name] == ["last_layer.v", "last_layer.g"]
    assert logits(net, 1000 * torch.randn(6, 12)).abs().max() <= 1 + 1e-5
    torch.testing.assert_close(net.prototypes().norm(dim=1), torch.ones(37))
    torch.testing.assert_close(logits(net, torch.zeros(1, 12)), torch.zeros(1, 37))  # a zero bottleneck is not NaN
    assert head(freeze_prototype_norm=False).last_layer.g.requires_grad


def test_bf16_norms_are_computed_in_fp32() -> None:
    """Every prototype keeps length 1 within the rounding of its entries, not within that of a bf16 norm."""
    torch.manual_seed(0)
    net = Head(12, HeadConfig(num_prototypes=500, hidden_dim=24, bottleneck_dim=256)).bfloat16()
    weight, v = net.prototypes(), net.last_layer.v.double()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (v / v.norm(dim=1, keepdim=True)).bfloat16())
    x = torch.randn(9, 12).bfloat16()
    z = net.mlp(x).double()
    points, prototypes = net(x)
    assert torch.equal(points, (z / z.norm(dim=1, keepdim=True)).bfloat16())
    assert torch.equal(prototypes, weight)
    (points @ prototypes.T).sum().backward()
    assert net.last_layer.v.grad is not None


def test_starting_values_and_size() -> None:
    torch.manual_seed(0)
    config = HeadConfig(num_prototypes=4096)
    net = Head(384, config)
    for i in (0, 2, 4):
        assert net.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not net.mlp[i].bias.any()
    bound = 1 / math.sqrt(256)  # kaiming-uniform with a = sqrt(5)
    assert bound * 0.99 < net.last_layer.v.abs().max().item() <= bound
    assert net.last_layer.v.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.equal(net.last_layer.g, torch.ones(4096, 1))
    with torch.device("meta"):
        full = Head(384, HeadConfig())
    assert sum(p.numel() for p in full.parameters() if p.requires_grad) == 22_286_592


def test_batch_norm() -> None:
    net = head(batch_norm=True)
    assert [name for name, _ in net.mlp.named_parameters()] == [
        f"{i}.{kind}" for i in (0, 1, 3, 4, 6) for kind in ("weight", "bias")
    ]  # DINO v1's indices
    x = 5 + torch.randn(3, 4, 12)
    inner: list[torch.Tensor] = []
    net.mlp[1].register_forward_hook(lambda module, args, out: inner.append(out))
    net(x)
    torch.testing.assert_close(inner[0].mean(dim=0), torch.zeros(24), rtol=0, atol=1e-5)  # over all 12 rows
    torch.testing.assert_close(inner[0].std(dim=0, unbiased=False), torch.ones(24), rtol=0.1, atol=0)
