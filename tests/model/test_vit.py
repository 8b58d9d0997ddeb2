"""Our ViT against timm's, against DINO v1's formulas, and against itself without packing and pruning."""

import math
import types
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino.data import Masks
from fastdino.model import ViT
from fastdino.model import attention as attention_room
from fastdino.model import packing as packing_room
from fastdino.model import vit as vit_room
from fastdino.model.block import _add
from fastdino.model.packing import packing_of
from fastdino.model.positions import resample_positions, resampling, rope_angles
from tests.model.textbook import literal, nano, views

TIMM = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
    "giant": "vit_giant_patch14_224",
}


@pytest.mark.parametrize("size", TIMM)
def test_names_and_shapes_are_timms(size: str) -> None:
    patch = 14 if size in ("huge", "giant") else 16
    with torch.device("meta"):
        ours, theirs = ViT(size, patch_size=patch), timm.create_model(TIMM[size], num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert [b.attn.num_heads for b in ours.blocks] == [b.attn.num_heads for b in theirs.blocks]


@pytest.mark.parametrize(("size", "millions"), [("small", 21.67), ("base", 85.8), ("large", 303.3)])
def test_parameter_counts(size: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in ViT(size).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_features_equal_timms() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    ours = ViT("small").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


GROUPS = [
    [(2, 3, 3, 48, 48)],
    [(2, 3, 3, 48, 48), (4, 3, 3, 24, 24)],
    [(1, 2, 3, 24, 40), (2, 2, 3, 48, 48), (1, 2, 3, 8, 8)],  # other sizes, not square, one single patch
]


@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_packed_and_pruned_equals_the_textbook(shapes: list[tuple[int, ...]]) -> None:
    """Output and every gradient: packing mixes nothing, and pruning the last block drops nothing that matters."""
    vit, groups = nano(), views(*shapes)
    got, _ = vit(groups)
    want = torch.cat([literal(vit, x.flatten(0, 1))[0][:, 0].unflatten(0, x.shape[:2]) for x in groups.values()])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), list(vit.parameters()))
    theirs = torch.autograd.grad((want * weights).sum(), list(vit.parameters()))
    for (name, _), a, b in zip(vit.named_parameters(), ours, theirs, strict=True):
        assert b.abs().max() > 1e-6 or "pos_embed" in name, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_features_and_attention_maps_of_images() -> None:
    vit, x = nano(), views((3, 3, 24, 40))["0"]
    tokens, weights = literal(vit, x)
    torch.testing.assert_close(vit.attention_maps(x), weights[:, :, 0, 1:].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vit(x), tokens[:, 0], rtol=1e-10, atol=1e-10)


def keys(distance: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    d = abs(distance)
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0


def offset(old: int, new: int) -> np.ndarray:
    """DINO v1's: a = -0.75, half-pixel centers, edges repeated; scale (new + 0.1) / old."""
    out = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            out[i, min(max(j, 0), old - 1)] += keys(center - j, -0.75)
    return out


def antialias(old: int, new: int) -> np.ndarray:
    """a = -0.5, the kernel as wide as an output where that is larger; what is outside counts for nothing."""
    out, scale = np.zeros((new, old)), old / new
    for i in range(new):
        for j in range(old):
            out[i, j] = keys((j + 0.5 - (i + 0.5) * scale) / max(scale, 1.0), -0.5)
    return out / out.sum(1, keepdims=True)


@pytest.mark.parametrize("rule", [offset, antialias])
@pytest.mark.parametrize(("old", "new"), [((14, 14), (6, 6)), ((6, 6), (3, 5)), ((4, 7), (9, 2)), ((3, 3), (30, 30))])
def test_positions_are_resampled_by_their_familys_rule(old: tuple[int, int], new: tuple[int, int], rule: Any) -> None:
    torch.manual_seed(0)
    positions = torch.randn(1, math.prod(old), 5)
    matrix = resampling(old, new, rule.__name__, torch.device("cpu"), torch.float32)
    got = resample_positions(positions, matrix)
    grid = positions[0].reshape(*old, 5).double().numpy()
    want = np.einsum("io,jp,opd->ijd", rule(old[0], new[0]), rule(old[1], new[1]), grid)
    torch.testing.assert_close(got[0], torch.tensor(want).float().reshape(-1, 5), rtol=1e-4, atol=1e-5)
    half = resample_positions(positions.bfloat16(), matrix)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, resample_positions(positions.bfloat16().float(), matrix).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_positions(positions, matrix), got)


def test_own_grid_is_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(vit_room, "resampling", lambda *args: asked.append(args[:2]) or resampling(*args))
    nano(image_size=(24, 40))(views((1, 2, 3, 24, 40), (1, 2, 3, 40, 24)))
    assert asked == [((3, 5), (5, 3))]


def test_an_evaluation_before_training_leaves_training_alone() -> None:
    """What is kept between calls must not be made of inference tensors, which autograd refuses."""
    groups = views((1, 2, 3, 48, 48), (1, 2, 3, 32, 16))
    masks = Masks(None, torch.arange(0, 2 * 36, 5), torch.empty(0))
    for cached in (packing_of, packing_room._asking, rope_angles):
        cached.cache_clear()
    for pos_embed in ("learned", "rope"):
        vit = nano(drop_path=0.5, pos_embed=pos_embed)
        with torch.inference_mode():
            vit(groups, masks)
        sum(x.sum() for x in vit(groups, masks)).backward()
        assert vit.cls_token.grad is not None
        assert vit.cls_token.grad.abs().sum() > 0


def test_image_that_patches_do_not_tile() -> None:
    with pytest.raises(ValueError, match="48x50 pixels does not divide into patches of 8"):
        nano()(torch.zeros(1, 3, 48, 50))


@pytest.mark.parametrize("pos_embed", ["learned", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_in_patches_are_the_same_views(pos_embed: str, dtype: torch.dtype) -> None:
    """As the device makes them: a patch's pixels in the order of the projection's weight."""
    vit = nano(pos_embed=pos_embed, mask_token=True).to(dtype).eval()
    planes = {name: x.to(dtype) for name, x in views((2, 3, 3, 32, 32), (1, 3, 3, 16, 16)).items()}
    p = vit.patch_size
    patches = {
        name: F.unfold(x.flatten(0, 1).float(), p, stride=p).mT.contiguous().to(dtype).unflatten(0, x.shape[:2])
        for name, x in planes.items()
    }
    hidden = torch.rand(6, (32 // p) ** 2) < 0.3
    rows = hidden.flatten().nonzero().squeeze(1)
    masks = Masks(hidden, rows, torch.ones(len(rows)))
    for got, want in zip(vit(patches, masks), vit(planes, masks), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("pos_embed", ["learned", "rope"])
def test_one_pass_per_size_gives_the_same(pos_embed: str) -> None:
    """Masks are of the first group, whose patches are read; a single size is one pass either way."""
    groups = views((2, 2, 3, 48, 48), (3, 2, 3, 24, 24))
    hidden = torch.arange(4 * 36).view(4, 36) % 7 == 0
    masks = Masks(hidden, hidden.flatten().nonzero().flatten(), torch.empty(0))
    options = {"pos_embed": pos_embed, "registers": 2, "mask_token": True}
    whole, apart = nano(packed="on", **options).eval(), nano(packed="off", **options).eval()
    passes: list[int] = []
    apart.norm.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    made = [vit(groups, masks) for vit in (apart, whole)]
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        (got[..., 0].sum() + want[..., 0].sum()).backward(retain_graph=True)
    for ours, theirs in zip(apart.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert passes == [4 + len(masks.rows), 6]
    assert torch.equal(apart(groups["0"][0]), whole(groups["0"][0]))


def test_packing_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(packing_room, "PACKED", {})
    assert packing_room.is_packed("auto", gpu)
    monkeypatch.setattr(packing_room, "PACKED", {"NVIDIA H200": False})
    assert not packing_room.is_packed("auto", gpu), "not measured, and of an H200's generation"
    monkeypatch.setattr(packing_room, "PACKED", {"A100": True, "H100": False})
    assert not packing_room.is_packed("auto", gpu)
    assert packing_room.is_packed("auto", cpu)
    assert packing_room.is_packed("on", gpu)
    assert not packing_room.is_packed("off", cpu)


def test_drop_path_drops_whole_branches_of_sequences() -> None:
    torch.manual_seed(0)
    rates = [block.drop_path for block in nano(drop_path=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    lengths = ((3000, 2), (2000, 3))
    packing = packing_of(lengths, torch.device("cpu"))
    tokens = torch.ones(1, 12000, 1)
    drawn = packing.per_token(packing.draw_factors([0.0, 0.3], torch.float32))
    assert torch.equal(_add(10 * tokens, tokens, drawn[0, 0]), 11 * tokens)  # no rate, no drop
    out = _add(10 * tokens, tokens, drawn[1, 0])[0, :, 0] - 10
    per_sequence = torch.cat([out[:6000].view(3000, 2)[:, 0], out[6000:].view(2000, 3)[:, 0]])
    assert torch.equal(
        out, torch.cat([per_sequence[:3000].repeat_interleave(2), per_sequence[3000:].repeat_interleave(3)])
    )
    kept = per_sequence != 0
    torch.testing.assert_close(per_sequence[kept], torch.full((int(kept.sum()),), 1 / 0.7), rtol=1e-5, atol=1e-5)
    assert kept.double().mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.7 * 0.3 / 5000))
    assert (drawn[1, 0] != drawn[1, 1]).any()  # each branch draws anew


def test_drop_path_follows_the_seed_and_pruning_changes_no_draw() -> None:
    vit, groups = nano(drop_path=0.5).train(), views((2, 4, 3, 48, 48), (3, 4, 3, 24, 24))
    masks = Masks(None, torch.arange(0, 8 * 36, 5), torch.empty(0))

    def run(seed: int, masks: Masks | None = None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return vit(groups, masks)

    assert torch.equal(run(0)[0], run(0)[0])
    assert not torch.equal(run(0)[0], run(1)[0])
    torch.manual_seed(0)
    x, packing, _ = vit._start(list(groups.values()), None)
    for block, drops in zip(vit.blocks, vit._draw(packing, None, x.dtype), strict=True):
        x = block(x, packing, drops=drops)  # the last block in full
    x = vit.norm(x)[0]
    want = x[packing.first].view(5, 4, -1)
    torch.testing.assert_close(run(0)[0], want, rtol=1e-10, atol=1e-10)
    cls, patches = run(0, masks)
    torch.testing.assert_close(cls, want, rtol=1e-10, atol=1e-10)
    every = x[: 8 * 37].view(8, 37, -1)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(patches, every[masks.rows], rtol=1e-10, atol=1e-10)


class _CountSyncs(TorchDispatchMode):
    """Counts reads of a device value: .item(), float(t), if t."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::repeat_interleave.Tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pos_embed", ["learned", "rope"])
def test_no_device_value_is_read(pos_embed: str) -> None:
    options = {"mask_token": True, "registers": 2, "layer_scale": 0.1}
    vit = nano(drop_path=0.2, pos_embed=pos_embed, **options).train()
    groups = views((2, 2, 3, 48, 48), (2, 2, 3, 16, 32))
    hidden = torch.arange(4 * 36).view(4, 36) % 7 == 0
    masks = Masks(hidden, hidden.flatten().nonzero().flatten(), torch.empty(0))
    for cached in (packing_of, packing_room._asking, rope_angles):
        cached.cache_clear()
    with _CountSyncs() as syncs:
        sum(x.sum() for x in vit(groups, masks)).backward()
        vit(groups)[0].sum().backward()
    assert syncs.count == 0


def test_bf16_and_autocast() -> None:
    """bf16 weights and autocast both stay near fp32, and both train."""
    vit, groups = (
        nano(drop_path=0.1).float().eval(),
        {name: x.float() for name, x in views((2, 2, 3, 48, 48), (2, 2, 3, 24, 24)).items()},
    )
    want, _ = vit(groups)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, _ = vit(groups)
        vit.train()(groups)[0].sum().backward()
    torch.testing.assert_close(autocast.float(), want, rtol=0.1, atol=0.1)
    half, _ = vit.eval().bfloat16()(groups)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.1, atol=0.1)


def test_starting_values() -> None:
    vit = ViT("tiny")
    for tensor in (vit.pos_embed, vit.cls_token, vit.blocks[3].mlp.fc1.weight, vit.blocks[0].attn.qkv.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
    assert not vit.blocks[0].attn.qkv.bias.any()
    xavier = ViT("tiny", init="xavier", pos_embed="sincos")
    assert xavier.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / (192 + 768)), rel=0.05)
    positions = xavier.pos_embed.detach()[0]
    assert xavier.pos_embed.requires_grad
    assert not positions[0].any()
    patch = positions[1 + 14 * 5 + 3].double()  # row 5, column 3
    omega = [10000 ** (-i / 48) for i in range(48)]
    want = [f(3 * o) for f in (math.sin, math.cos) for o in omega] + [
        f(5 * o) for f in (math.sin, math.cos) for o in omega
    ]
    torch.testing.assert_close(patch, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_way_through_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers' own masks over whole packed batches; its kernel, which no CPU has, stands aside for SDPA."""

    def with_mask(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        bias = attn_bias.materialize((1, 1, q.shape[1], k.shape[1]), dtype=q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    vit, groups = nano(registers=2), views((2, 2, 3, 48, 48), (3, 2, 3, 24, 16))
    masks = Masks(None, torch.arange(0, 4 * 36, 5), torch.empty(0))
    want = vit(groups), vit(groups, masks)
    ops = types.SimpleNamespace(fmha=attention_room._xformers().fmha, memory_efficient_attention=with_mask)
    monkeypatch.setattr(attention_room, "_xformers", lambda: ops)
    monkeypatch.setattr(attention_room, "implementation", lambda *_: "xformers")
    torch.testing.assert_close((vit(groups), vit(groups, masks)), want, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers' attention needs a GPU")
def test_xformers_and_sdpa_agree_on_the_whole_network() -> None:
    groups = {name: x.float().cuda() for name, x in views((2, 4, 3, 48, 48), (6, 4, 3, 24, 24)).items()}
    masks = Masks(None, torch.arange(0, 8 * 36, 5, device="cuda"), torch.empty(0))
    outputs = []
    for choice in ("xformers", "sdpa"):
        vit = nano(attention=choice, pos_embed="rope", rope_scale=1.0, registers=2).float().cuda()
        out = [vit(groups)[0], *vit(groups, masks)]
        loss = sum(x.square().sum() for x in out)
        outputs.append([*out, *torch.autograd.grad(loss, list(vit.parameters()))])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
