"""What a ViT can have beside DINO v1's, against the textbook: masks, read patches, registers, RoPE and the rest."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, HeadConfig, ModelConfig, ViewsConfig
from fastdino.data import Masks
from fastdino.model import ViT, build_backbone, build_network
from fastdino.model.block import Shape
from tests.model.textbook import literal, nano, views

SWIGLU = Shape(96, 4, 4, 256, swiglu=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 3, "interpolation": "antialias"},
    "layer scale and swiglu": {"size": SWIGLU, "layer_scale": 0.5},
    "rope": {"pos_embed": "rope", "rope_scale": 1.0},
    "all": {"size": SWIGLU, "pos_embed": "rope", "rope_scale": 1.0, "registers": 2, "layer_scale": 0.5},
}
GROUPS = [
    [(2, 3, 3, 48, 48), (4, 3, 3, 24, 24)],
    [(2, 2, 3, 24, 40), (1, 2, 3, 8, 8)],  # another size than positions are kept for, a view of one patch
    [(2, 2, 3, 48, 32)],
]


def masks_for(x: Tensor, patch: int = 8) -> Masks:
    """A third of the patches of (V, B, 3, h, w) views; nothing of the first view, all of the last."""
    torch.manual_seed(2)
    hidden = torch.rand(x.shape[0] * x.shape[1], x.shape[-2] * x.shape[-1] // patch**2) < 0.3
    hidden[0], hidden[-1] = False, True
    return Masks(hidden, hidden.flatten().nonzero().flatten(), torch.ones(int(hidden.sum())))


def of_views(x: Tensor, groups: dict[str, Tensor]) -> Tensor:
    """(sum of V_i * B, ..) -> (sum of V_i, B, ..)."""
    return x.unflatten(0, (-1, next(iter(groups.values())).shape[1]))


@pytest.mark.parametrize("student", [True, False], ids=["hidden", "seen"])
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_equals_the_textbook(variant: str, shapes: list[tuple[int, ...]], student: bool) -> None:
    """CLS, patches and every gradient: masks reach the first group before positions, and pruning changes nothing."""
    vit, groups = nano(mask_token=True, **VARIANTS[variant]), views(*shapes)
    masks = masks_for(groups["0"])
    hidden = masks.hidden if student else None
    cls, patches = vit(groups, masks._replace(hidden=hidden))
    every = [literal(vit, x.flatten(0, 1), hidden if name == "0" else None)[0] for name, x in groups.items()]
    want_cls = of_views(torch.cat([x[:, 0] for x in every]), groups)
    want_patches = every[0][:, vit.num_prefix :].flatten(0, 1)[masks.rows]
    torch.testing.assert_close(cls, want_cls, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches, want_patches, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(cls), torch.randn_like(patches)

    def gradients(cls: Tensor, patches: Tensor) -> tuple[Tensor | None, ...]:
        value = (cls * weights[0]).sum() + (patches * weights[1]).sum()
        return torch.autograd.grad(value, list(vit.parameters()), allow_unused=True)

    ours, theirs = gradients(cls, patches), gradients(want_cls, want_patches)
    for (name, _), a, b in zip(vit.named_parameters(), ours, theirs, strict=True):
        if name == "mask_token" and not student:
            assert a is None
            continue
        assert a is not None
        assert b is not None
        assert b.abs().max() > 1e-6 or "pos_embed" in name, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_patches_and_attention_equal_the_textbook(variant: str) -> None:
    vit, x = nano(**VARIANTS[variant]), views((3, 3, 24, 40))["0"]
    tokens, weights = literal(vit, x)
    torch.testing.assert_close(vit(x), tokens[:, 0], rtol=1e-10, atol=1e-10)
    want = tokens[:, vit.num_prefix :].unflatten(1, (3, 5))
    torch.testing.assert_close(vit.patch_tokens(x), want, rtol=1e-10, atol=1e-10)
    want = weights[:, :, 0, vit.num_prefix :].float()
    torch.testing.assert_close(vit.attention_maps(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_keys_are_the_second_third_of_the_last_projection(variant: str) -> None:
    """Of the patches alone, in their places, heads in order, before any rotation."""
    vit, x = nano(**VARIANTS[variant]), views((3, 3, 24, 40))["0"]
    last, seen = vit.blocks[-1], []
    hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vit.patch_tokens(x)
    hook.remove()
    into = nn.functional.layer_norm(seen[0], (96,), last.norm1.weight, last.norm1.bias, last.norm1.eps)
    bias = torch.zeros(96).double() if vit.pos_embed is None else last.attn.qkv.bias[96:192]
    want = into.view(3, vit.num_prefix + 15, 96) @ last.attn.qkv.weight[96:192].T + bias
    want = want[:, vit.num_prefix :].unflatten(1, (3, 5))
    torch.testing.assert_close(vit.last_keys(x), want, rtol=1e-10, atol=1e-10)


def test_without_masks_no_patch_is_given() -> None:
    vit, groups = nano(mask_token=True), views((2, 3, 3, 48, 48), (4, 3, 3, 24, 24))
    cls, patches = vit(groups)
    assert (cls.shape, patches.shape) == ((6, 3, 96), (0, 96))
    masks = masks_for(groups["0"])
    torch.testing.assert_close(vit(groups, masks._replace(hidden=None))[0], cls, rtol=1e-10, atol=1e-10)


def rows_of(module: nn.Module, seen: list[int]) -> None:
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))


def test_the_last_block_computes_what_is_read() -> None:
    """Queries of every token of the masked group, of CLS in the others; projection and MLP of the rows read alone."""
    vit, groups = nano(mask_token=True, registers=2), views((2, 3, 3, 48, 48), (4, 3, 3, 24, 24))
    queries, projected, hidden = [], [], []
    vit.blocks[-1].attn.qkv.register_forward_pre_hook(lambda _, args: queries.append([len(args[1]), args[0].shape[1]]))
    rows_of(vit.blocks[-1].attn.proj, projected)
    rows_of(vit.blocks[-1].mlp, hidden)
    masks, tokens = masks_for(groups["0"]), 6 * 39 + 12 * 12
    vit(groups, masks)
    assert (queries, projected, hidden) == ([[6 * 39 + 12, tokens]], [18 + len(masks.rows)], [18 + len(masks.rows)])
    vit(groups)
    assert (queries[1:], projected[1:], hidden[1:]) == ([[18, tokens]], [18], [18])


def test_masks_that_cannot_be() -> None:
    vit, groups = nano(mask_token=True), views((2, 3, 3, 48, 48))
    masks = masks_for(groups["0"])
    assert masks.hidden is not None
    with pytest.raises(AssertionError, match=r"a mask of \(6, 35\), \(6, 36\) patches"):
        vit(groups, masks._replace(hidden=masks.hidden[:, 1:]))
    with pytest.raises(AssertionError, match=r"a mask of \(3, 36\), \(6, 36\) patches"):
        vit(groups, masks._replace(hidden=masks.hidden[:3]))
    with pytest.raises(AssertionError, match="hidden from a backbone without a mask token"):
        nano()(groups, masks)
    with pytest.raises(AssertionError, match="backbone of timm hides and gives no patches"):
        build_backbone(ModelConfig(arch="timm:resnet18", drop_path=0.0), 64)(
            {"global": torch.zeros(2, 1, 3, 64, 64)}, masks
        )


ROPE = {"pos_embed": "rope", "registers": 1, "rope_scale": 3.0}


def drawn(seed: int, groups: int, most: float) -> list[float]:
    torch.manual_seed(seed)
    return [
        torch.empty(1, dtype=torch.float64).uniform_(-math.log(most), math.log(most)).exp().item()
        for _ in range(groups)
    ]


def test_coordinates_are_stretched_in_training() -> None:
    """One factor for each size of views: for both axes, for queries and keys of every block, for all images."""
    vit, groups = nano(**ROPE).train(), views((2, 3, 3, 48, 32), (4, 3, 3, 24, 24))
    for seed in range(3):
        factors = drawn(seed, 2, 3.0)
        torch.manual_seed(seed)
        cls, _ = vit(groups)
        want = [
            literal(vit, x.flatten(0, 1), stretch=s)[0][:, 0] for x, s in zip(groups.values(), factors, strict=True)
        ]
        torch.testing.assert_close(cls, of_views(torch.cat(want), groups), rtol=1e-10, atol=1e-10)
    factors = torch.tensor(drawn(0, 4000, 3.0)).log()
    assert factors.abs().max() <= math.log(3)
    assert factors.std().item() == pytest.approx(math.log(3) / math.sqrt(3), rel=0.03)


def test_coordinates_are_not_stretched_elsewhere() -> None:
    groups = views((2, 3, 3, 48, 48), (4, 3, 3, 24, 24))
    vit = nano(**ROPE)
    want = of_views(torch.cat([literal(vit, x.flatten(0, 1))[0][:, 0] for x in groups.values()]), groups)
    torch.testing.assert_close(vit.eval()(groups)[0], want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(nano(**{**ROPE, "rope_scale": 1.0}).train()(groups)[0], want, rtol=1e-10, atol=1e-10)
    config = Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, pos_embed="rope"),
        head=HeadConfig(num_prototypes=16, hidden_dim=24, bottleneck_dim=8),
        views=ViewsConfig(global_size=48, local_size=24),
    )
    floats = {name: x.float() for name, x in groups.items()}
    for teacher in (True, False):
        network = build_network(config, teacher=teacher)
        assert network.training  # a teacher too
        assert torch.equal(network.backbone(floats)[0], network.backbone(floats)[0]) == teacher


def test_a_key_has_no_bias_with_rope() -> None:
    """The weights have a place for it, as released ones do; what stands there does nothing and learns nothing."""
    vit, x = nano(pos_embed="rope").eval(), views((2, 3, 48, 48))["0"]
    want = vit(x)
    want.square().sum().backward()
    for block in vit.blocks:
        q, k, v = block.attn.qkv.bias.grad.chunk(3)
        assert q.any()
        assert not k.any()
        assert v.any()
        block.attn.qkv.bias.data[96:192] += 5
    assert torch.equal(vit(x), want)
    vit.blocks[-1].attn.qkv.bias.data[:96] += 5
    assert not torch.allclose(vit(x), want)


def test_heads_that_two_axes_of_pairs_do_not_fill() -> None:
    with pytest.raises(AssertionError, match="heads of 10 do not divide into two axes of pairs"):
        nano(Shape(20, 1, 2, 8), pos_embed="rope")(torch.zeros(1, 3, 48, 48, dtype=torch.float64))


def test_rope_in_bf16_turns_in_fp32() -> None:
    """Angles in bf16 would be off by up to 0.01 of a turn."""
    groups = {name: x.float() for name, x in views((2, 3, 3, 48, 48), (2, 3, 3, 24, 24)).items()}
    vit, masks = nano(**VARIANTS["all"], mask_token=True).float(), masks_for(groups["0"])
    want = vit(groups, masks)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = vit(groups, masks)
    half = vit.bfloat16()(groups, masks)
    _, _, tables = vit._start(list(groups.values()), None)
    assert tables is not None
    assert tables.cos.dtype == tables.sin.dtype == torch.float32
    for exact, mixed, low in zip(want, autocast, half, strict=True):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.1)
        torch.testing.assert_close(low.float(), exact, rtol=0.1, atol=0.1)


def test_starting_values_of_options() -> None:
    torch.manual_seed(0)
    vit = ViT("tiny", registers=8, layer_scale=1e-5, mask_token=True)
    assert vit.register_tokens is not None
    assert vit.register_tokens.shape == (1, 8, 192)
    assert vit.register_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert vit.mask_token is not None
    assert vit.mask_token.shape == (1, 192)
    assert not vit.mask_token.any()
    assert vit.num_prefix == 9
    for block in vit.blocks:
        assert torch.equal(block.ls1.gamma, torch.full((192,), 1e-5))
        assert torch.equal(block.ls2.gamma, torch.full((192,), 1e-5))
    rope = ViT("tiny", pos_embed="rope")
    assert not [name for name, _ in rope.named_parameters() if "pos" in name]
    assert {m.eps for m in rope.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_options_draw_nothing_before_those_without() -> None:
    """The same seed starts the layers that two networks share alike, so a comparison of options compares options."""
    torch.manual_seed(0)
    plain = ViT("nano").state_dict()
    torch.manual_seed(0)
    more = ViT("nano", layer_scale=0.1, mask_token=True, drop_path_rule="uniform").state_dict()
    assert all(torch.equal(more[name], tensor) for name, tensor in plain.items())


def test_drop_path_rules() -> None:
    for rule, rates in (("linear", [0.0, 0.1, 0.2, 0.3]), ("uniform", [0.3] * 4)):
        blocks = ViT("nano", drop_path=0.3, drop_path_rule=rule).blocks
        assert [block.drop_path for block in blocks] == pytest.approx(rates)


def test_patches_of_14() -> None:
    settings = Config(model=ModelConfig(patch_size=14), views=ViewsConfig(local_size=98))
    backbone = build_backbone(settings.model, 224)
    assert isinstance(backbone, ViT)
    assert backbone.grid == (16, 16)
    with torch.no_grad():
        cls, _ = backbone({"global": torch.zeros(2, 1, 3, 224, 224), "local": torch.zeros(1, 1, 3, 98, 98)})
    assert cls.shape == (3, 1, 384)
    with pytest.raises(ConfigError, match=r"local_size=96 .*patch_size=14: use 84 or 98"):
        Config(model=ModelConfig(patch_size=14))
