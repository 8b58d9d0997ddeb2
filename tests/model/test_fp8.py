"""engine.fp8: which layers compute in it, what is refused, and that a network learns as in bf16."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, EngineConfig, HeadConfig, ModelConfig, ViewsConfig
from fastdino.model import vit
from fastdino.model.block import Linear, Shape
from fastdino.model.network import build_backbone, build_network
from fastdino.model.vit import ViT

FP8 = EngineConfig(fp8=True)


def settings(**model: object) -> Config:
    return Config(
        model=ModelConfig(**{"arch": "vit_nano", "patch_size": 8, **model}),  # type: ignore[arg-type]
        head=HeadConfig(num_prototypes=32, hidden_dim=32, bottleneck_dim=16),
        views=ViewsConfig(global_size=16, local_size=8, num_local=2),
        engine=FP8,
    )


def in_fp8(network: nn.Module) -> set[str]:
    return {name for name, layer in network.named_modules() if isinstance(layer, Linear) and layer.fp8}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_nano is as wide as is asked for."""
    monkeypatch.setitem(vit.SIZES, "nano", Shape(1024, 1, 16, 64))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("teacher", [False, True])
def test_the_blocks_compute_in_fp8(teacher: bool) -> None:
    """Neither heads nor the patch embedding; without the setting nothing does."""
    layers = {"backbone.blocks.0." + name for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert in_fp8(build_network(settings(), teacher)) == layers
    assert not in_fp8(build_network(dataclasses.replace(settings(), engine=EngineConfig()), teacher))
    assert not in_fp8(build_backbone(settings().model, 16)), "a trained backbone is used in its own precision"


def test_a_gated_block_does_as_well() -> None:
    network = ViT(Shape(1024, 1, 16, 32, swiglu=True), image_size=16)
    network.use_fp8()
    assert in_fp8(network) == {"blocks.0." + name for name in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")}


def test_a_narrow_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.fp8=True needs a model.arch of width 1024 .* this one has 96"):
        build_network(settings())


def views() -> Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[False, True], ids=["mlp", "swiglu"])
def start(request: pytest.FixtureRequest) -> ViT:
    """Narrow, so that it learns in seconds; accuracy does not depend on that."""
    torch.manual_seed(0)
    return ViT(Shape(64, 3, 4, 128, swiglu=request.param), image_size=16, patch_size=8).bfloat16()


def as_asked(start: ViT, fp8: bool) -> ViT:
    network = copy.deepcopy(start)
    for layer in network.modules():
        if isinstance(layer, Linear):
            layer.fp8 = fp8
    return network


def gradients(network: ViT, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    features = network(views().to(target.dtype))
    loss = (features - target).float().square().mean()
    return features, list(torch.autograd.grad(loss, list(network.blocks.parameters())))


def test_gradients_point_the_same_way(start: ViT) -> None:
    """Through three blocks, every parameter's, as judged from float64; and in fp8 they are others."""
    target = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    features, exact = gradients(copy.deepcopy(start).double(), target.double())
    found, fp8 = gradients(as_asked(start, fp8=True), target.bfloat16())
    assert 0.005 < (found.double() - features).norm() / features.norm() < 0.1
    for got, want in zip(fp8, exact, strict=True):
        if want.norm() > 1e-3 * torch.cat([x.flatten() for x in exact]).norm():  # a key's bias has none
            assert nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0) > 0.97


def test_learns_as_in_bf16(start: ViT) -> None:
    """It tells 16 images apart: masters in fp32, as an engine keeps them."""

    def train(fp8: bool) -> list[float]:
        network, losses = as_asked(start, fp8), []
        masters = [p.detach().float().clone() for p in network.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0)
        labels = nn.functional.one_hot(torch.arange(16), 64).float()
        for _ in range(60):
            loss = nn.functional.cross_entropy(network(views().bfloat16()).float(), labels)
            grads = torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad.float()
            optimizer.step()
            for p, master in zip(network.parameters(), masters, strict=True):
                p.data.copy_(master)
            losses.append(loss.item())
        return losses

    fp8, bf16 = train(fp8=True), train(fp8=False)
    assert fp8 != bf16
    assert bf16[-1] < 0.3 * bf16[0], "the task is learnt at all"
    for a, b in zip(fp8, bf16, strict=True):
        assert abs(a - b) < 0.1 * bf16[0]
    assert fp8[-1] < 0.3 * fp8[0]


def test_compiles_whole() -> None:
    """As one graph, forward and backward, and equal to the eager one."""
    torch.manual_seed(0)
    network = as_asked(ViT(Shape(64, 2, 4, 128), image_size=16, patch_size=8), fp8=True)
    target = torch.randn(16, 64)
    want = gradients(network, target)
    for block in network.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    got = gradients(network, target)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
