"""Our ViT against numbers of the official code and of timm: DINOv2's features, RoPE's tables, DINOv3's features."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino.data import Masks
from fastdino.model import ViT
from fastdino.model.block import Shape
from fastdino.model.positions import rope_angles, rotation

FIXTURES = Path(__file__).parents[1] / "fixtures"
DINOV2 = json.loads((FIXTURES / "dinov2_vit.json").read_text())
LAYOUTS = json.loads((FIXTURES / "layouts.json").read_text())


def gen(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_name(name: str, shape: list[int]) -> Tensor:
    return gen(int(hashlib.sha1(name.encode()).hexdigest()[:6], 16), *shape)


def assert_summary(got: Tensor, want: dict[str, Any], tolerance: float) -> None:
    assert list(got.shape) == want["shape"]
    flat = got.detach().flatten().double()
    assert flat.norm().item() == pytest.approx(want["norm"], rel=tolerance)
    torch.testing.assert_close(flat[:6].tolist(), want["first"], rtol=0, atol=tolerance)
    torch.testing.assert_close(flat[-3:].tolist(), want["last"], rtol=0, atol=tolerance)


def every_row(images: int, patches: int, hidden: Tensor | None) -> Masks:
    return Masks(hidden, torch.arange(images * patches), torch.ones(images * patches))


V2 = {
    "mlp_offset": (Shape(48, 3, 3, 192), {}),
    "mlp_reg4_antialias": (Shape(48, 3, 3, 192), {"registers": 4, "interpolation": "antialias"}),
    "swiglu_reg4": (Shape(48, 3, 3, 128, swiglu=True), {"registers": 4, "interpolation": "antialias"}),
    "mlp_antialias_offset": (Shape(48, 3, 3, 192), {}),  # released with no weights: at its own grid alone
}
V2_CASES = [
    (model["name"], side) for model in DINOV2["models"] for side in model["sizes"]
    if model["name"] != "mlp_antialias_offset" or side == "56x56"
]  # fmt: skip


@pytest.mark.parametrize(("name", "side"), V2_CASES)
def test_features_are_dinov2s(name: str, side: str) -> None:
    """CLS and every patch, seen and masked, at the native and at other sizes; parameters by the official names."""
    model = next(model for model in DINOV2["models"] if model["name"] == name)
    shape, options = V2[name]
    vit = ViT(shape, patch_size=14, image_size=56, layer_scale=1.0, mask_token=True, **options).eval()
    vit.load_state_dict({name: 0.05 * of_name(name, size) for name, size in model["keys"].items()})
    height, width = map(int, side.split("x"))
    want = model["sizes"][side]
    x = gen(900 + height + 7 * width, 2, 3, height, width)
    patches = height * width // 14**2
    mask = torch.rand(2, patches, generator=torch.Generator().manual_seed(height * width)) < 0.3
    assert mask.sum(1).tolist() == want["mask"]
    with torch.no_grad():
        for hidden, suffix in ((None, ""), (mask, "_masked")):
            cls, rows = vit({"global": x.unsqueeze(0)}, every_row(2, patches, hidden))
            assert_summary(cls[0], want["cls" + suffix], 1e-6)
            assert_summary(rows.view(2, patches, -1), want["patch" + suffix], 1e-6)
        torch.testing.assert_close(vit(x), vit({"global": x.unsqueeze(0)})[0][0])
        assert_summary(vit.patch_tokens(x).flatten(1, 2), want["patch"], 1e-6)


def test_rotations_are_those_of_timm() -> None:
    want = LAYOUTS["rope"]
    turns = rotation([rope_angles((3, 5), 16, torch.device("cpu"), torch.float32)], [2], 5)
    for table, wanted, prefix in ((turns.sin, want["sin"], 0.0), (turns.cos, want["cos"], 1.0)):
        table = table.view(2, 20, 16)
        torch.testing.assert_close(table[:, 5:], torch.tensor([wanted, wanted]), rtol=0, atol=1e-6)
        assert torch.equal(table[:, :5], torch.full((2, 5, 16), prefix))


V3 = {
    "mlp": Shape(48, 2, 3, 192),
    "swiglu_plus": Shape(48, 2, 3, 192, swiglu=True),
    "mlp_no_qkv_bias": Shape(48, 2, 3, 192),
}


@pytest.mark.parametrize("side", ["64x64", "32x32", "96x48", "128x128"])
@pytest.mark.parametrize("name", V3)
def test_features_are_dinov3s(name: str, side: str) -> None:
    """By timm and transformers, which agree. The key's third of the bias is in the weights and does not act."""
    model = next(model for model in LAYOUTS["dinov3"] if model["name"] == name)
    state = {}
    for tensor, size in model["repository_keys"].items():
        state[tensor] = 0.2 * of_name(tensor, size)
        if tensor.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            state[tensor] = 1 + 0.1 * state[tensor]
    state["register_tokens"] = state.pop("storage_tokens")
    for i in range(2):
        for kind in ("weight", "bias") if name == "swiglu_plus" else ():
            halves = [state.pop(f"blocks.{i}.mlp.{half}.{kind}") for half in ("w1", "w2")]
            state[f"blocks.{i}.mlp.w12.{kind}"] = torch.cat(halves)
        state.setdefault(f"blocks.{i}.attn.qkv.bias", torch.zeros(144))
    options = {"pos_embed": "rope", "registers": 4, "layer_scale": 1e-5, "mask_token": True}
    vit = ViT(V3[name], patch_size=16, image_size=64, **options).eval()
    vit.load_state_dict(state)
    height, width = map(int, side.split("x"))
    x = gen(900 + height + 7 * width, 2, 3, height, width)
    with torch.no_grad():
        assert_summary(vit(x), model["sizes"][side]["cls"], 5e-6)
        assert_summary(vit.patch_tokens(x).flatten(1, 2), model["sizes"][side]["patch"], 5e-6)


RELEASED = {  # timm's name: ours, and how many numbers more ours has
    "vit_small_patch14_dinov2": ("small", {"layer_scale": 1e-5}, 0),
    "vit_base_patch14_dinov2": ("base", {"layer_scale": 1e-5}, 0),
    "vit_large_patch14_dinov2": ("large", {"layer_scale": 1e-5}, 0),
    "vit_giant_patch14_dinov2": ("giant2", {"layer_scale": 1e-5}, 0),
    "vit_small_patch14_reg4_dinov2": ("small", {"layer_scale": 1e-5, "registers": 4}, 384),  # the position of CLS
    "vit_giant_patch14_reg4_dinov2": ("giant2", {"layer_scale": 1e-5, "registers": 4}, 1536),
    "vit_small_patch16_dinov3_qkvb": ("small", {}, 12 * 384),  # the key's third of the bias
    "vit_small_plus_patch16_dinov3": ("small_plus", {}, 12 * 3 * 384),  # all three
    "vit_large_patch16_dinov3_qkvb": ("large", {}, 24 * 1024),
    "vit_huge_plus_patch16_dinov3": ("huge_plus", {}, 32 * 3 * 1280),
    "vit_7b_patch16_dinov3": ("7b", {}, 40 * 3 * 4096),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_have_our_sizes(name: str) -> None:
    size, options, more = RELEASED[name]
    if "dinov3" in name:
        options = {"pos_embed": "rope", "registers": 4, "layer_scale": 1e-5, "patch_size": 16}
    released = LAYOUTS["timm_models"][name]
    with torch.device("meta"):
        vit = ViT(size, **{"patch_size": 14, "image_size": 518 if "dinov2" in name else 256, **options})
    assert sum(p.numel() for p in vit.parameters()) == released["parameters"] + more
    assert len(vit.blocks) == released["depth"]
    assert math.prod(vit.grid) == (released["input_size"][1] // vit.patch_size) ** 2
