"""Each dialect against the official networks' outputs, and against the classes that speak it."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdino.config import ConfigError
from fastdino.model import ViT, export_backbone, load_backbone, restore_backbone
from fastdino.model.block import Shape
from fastdino.model.vit import SIZES
from fastdino.model.weights import Form
from fastdino.model.weights.dialects import Published, State, from_published, to_published
from fastdino.model.weights.exports import hf_config, timm_model
from fastdino.model.weights.form import recognise

LAYOUTS = json.loads((Path(__file__).parents[1] / "fixtures/layouts.json").read_text())
OFFICIAL = {f"{family}-{layout['name']}": layout for family in ("dinov2", "dinov3") for layout in LAYOUTS[family]}


def gen(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def official_weights(layout: dict[str, Any]) -> State:
    """Each tensor from a seed made of its name in the repository."""
    state = {}
    for name, shape in layout["repository_keys"].items():
        state[name] = 0.2 * gen(int(hashlib.sha1(name.encode()).hexdigest()[:6], 16), *shape)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            state[name] = 1 + 0.1 * state[name]
    return state


def vit_for(name: str) -> ViT:
    keys, rotary = OFFICIAL[name]["repository_keys"], name.startswith("dinov3")
    hidden = next(shape[1] for key, shape in keys.items() if key.endswith(("mlp.fc2.weight", "mlp.w3.weight")))
    shape = Shape(48, 2, 3, hidden, swiglu="blocks.0.mlp.w3.weight" in keys)
    registers = 4 if rotary else OFFICIAL[name]["registers"]
    rule, pos_embed = "antialias" if registers else "offset", "rope" if rotary else "learned"
    options = {"registers": registers, "layer_scale": 1e-5, "pos_embed": pos_embed, "interpolation": rule}
    return ViT(shape, image_size=64, mask_token=True, **options).eval()


def run(expression: str) -> Any:
    """What an export says that it is loaded with."""
    return eval(expression, {"timm": timm, "torch": torch})


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_give_official_features(name: str, tmp_path: Path) -> None:
    """Under the repository's names, at the native and at other sizes; DINOv3's bias of keys, masked there, is none."""
    vit, state = vit_for(name), official_weights(OFFICIAL[name])
    if name == "dinov3-mlp":
        width = torch.ones(48)
        for i in range(2):
            state[f"blocks.{i}.attn.qkv.bias"][48:96] = math.nan
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([width, 0 * width, width])
        state["rope_embed.periods"] = torch.tensor(LAYOUTS["rope"]["periods"]).bfloat16()
        state |= {"local_cls_norm.weight": width, "local_cls_norm.bias": width + 1}
    save_file(state, tmp_path / "a.safetensors")
    load_backbone(vit, tmp_path / "a.safetensors")
    for side, want in OFFICIAL[name]["sizes"].items():
        height, width = map(int, side.split("x"))
        want = want.get("repository", want)["cls"]
        with torch.no_grad():
            cls = vit(gen(900 + height + 7 * width, 2, 3, height, width))
        torch.testing.assert_close(cls.flatten()[:6].tolist(), want["first"], rtol=0, atol=2e-5)
        torch.testing.assert_close(cls.flatten()[-3:].tolist(), want["last"], rtol=0, atol=2e-5)
        assert cls.double().norm().item() == pytest.approx(want["norm"], rel=2e-6)


KEYS = {"timm_keys": ("timm", "timm Eva"), "hf_file_keys": ("HF Dinov2",)} | {
    "hf_keys": ("HF Dinov2 in memory", "HF DINOv3ViT in memory"), "repository_keys": ("DINO", "DINOv3")
}  # fmt: skip


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_of_every_dialect(name: str, keys: str) -> None:
    """Ours become theirs and theirs ours, the same tensors; a prefix and a full checkpoint's head change nothing."""
    want = OFFICIAL[name].get(keys)
    if want is None:
        pytest.skip("one file form serves both")
    state = {**vit_for(name).state_dict()}
    dialect = KEYS[keys][-1 if name.startswith("dinov3") else 0]
    ours = from_published(official_weights(OFFICIAL[name])).state
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in state.items()}
    theirs = to_published(ours, dialect)
    for token in ("mask_token", "embeddings.mask_token"):
        if token in theirs:
            theirs[token] = theirs[token].reshape(want.get(token, ()) or theirs[token].shape)
    if keys == "timm_keys":
        del theirs["mask_token"]
        if "pos_embed" in theirs and OFFICIAL[name]["registers"]:
            theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    if name == "dinov3-mlp_no_qkv_bias":
        theirs = {key: x for key, x in theirs.items() if key in want}
    assert {key: list(x.shape) for key, x in theirs.items()} == want
    again = from_published({"module." + key: x for key, x in theirs.items()} | {"head.mlp.0.weight": torch.ones(1)})
    assert again.rotary == name.startswith("dinov3")
    for key, tensor in again.state.items():
        if name == "dinov3-mlp_no_qkv_bias" and key.endswith("qkv.bias"):
            assert not tensor.any()
        elif not (keys == "timm_keys" and key == "pos_embed"):
            assert torch.equal(tensor, ours[key]), key
    assert again.state.keys() == ours.keys() - ({"mask_token"} if keys == "timm_keys" else set())


@pytest.mark.parametrize("name", LAYOUTS["timm_models"])
def test_released_models_are_recognised(name: str) -> None:
    """By names and shapes alone, none of them downloaded; and their own name is what an export is loaded with."""
    released = LAYOUTS["timm_models"][name]
    state = {
        key.replace("blocks.0.", f"blocks.{i}."): torch.empty(shape, device="meta")
        for key, shape in released["tensors"].items() for i in range(released["depth"])
    }  # fmt: skip
    form = recognise(from_published(state))
    size, patch, family = name.split("_patch")[0], int(name.split("_patch")[1][:2]), name.split("_")[-1]
    assert form.arch == ("vit_giant2" if size == "vit_giant" else size)
    assert form.patch_size == patch
    assert form.layer_scale > 0
    rotary = "dinov3" in name
    assert form.registers == (4 if rotary or "reg4" in name else 0)
    assert (form.image_size, form.pos_embed) == ((None, "rope") if rotary else (518, "learned"))
    assert form.interpolation == ("antialias" if family == "dinov2" and "reg4" in name else "offset")
    loads, options = timm_model(form)
    assert loads.removesuffix("_qkvb") == name.removesuffix("_qkvb")
    assert options[0] == "num_classes=0"
    assert len(options) <= 3, "nothing but the pooling of Eva, and biases where timm's model has none"


FORMS = {
    "v1": {},
    "v2": {"layer_scale": 1e-5},
    "v2-reg4": {"layer_scale": 1e-5, "registers": 4, "interpolation": "antialias"},
    "reg2": {"registers": 2, "interpolation": "antialias"},
    "v3": {"layer_scale": 1e-5, "registers": 4, "pos_embed": "rope"},
    "rope": {"pos_embed": "rope"},
}


NETWORKS = [("nano", name) for name in FORMS] + [
    (size, name) for size in SIZES for name in ("v2-reg4", "v3") if size != "nano" and (size, name) != ("7b", "v2-reg4")
]


def on_meta(size: str, options: dict[str, Any], **more: Any) -> tuple[Form, State]:
    with torch.device("meta"):
        vit = ViT(size, patch_size=14, image_size=84, **options, **more)
    state = vit.state_dict()
    return recognise(Published(state, "DINO", vit.pos_embed is None, {})), state


@pytest.mark.parametrize(("size", "form_name"), NETWORKS)
def test_timm_has_a_model_for_every_network(size: str, form_name: str) -> None:
    """Under the name and with the options that an export tells: the same names and shapes."""
    form, state = on_meta(size, FORMS[form_name])
    name, options = timm_model(form)
    with torch.device("meta"):
        theirs = run(f'timm.create_model("{name}", {", ".join(options)})').state_dict()
    ours = to_published(state, "timm Eva" if form.pos_embed == "rope" else "timm")
    want = {key: x.shape for key, x in theirs.items() if form.layer_scale or "gamma" not in key}
    if form.registers and form.pos_embed == "learned":
        ours["pos_embed"] = ours["pos_embed"][:, 1:]
    assert {key: x.shape for key, x in ours.items()} == want


@pytest.mark.parametrize(("size", "form_name"), NETWORKS)
def test_hugging_face_has_a_model_for_every_network(size: str, form_name: str) -> None:
    """Under the config that an export writes: the same names, of 5.x in memory, and shapes. One MLP it lacks."""
    transformers = pytest.importorskip("transformers")
    form, state = on_meta(size, FORMS[form_name], mask_token=True)
    if size == "giant" and form.pos_embed == "learned":
        with pytest.raises(ConfigError, match=r"MLP of width 6144.*use --format timm or repository"):
            hf_config(form)
        return
    config = hf_config(form)
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config)).state_dict()
    ours = to_published(state, f"HF {'DINOv3ViT' if form.pos_embed == 'rope' else 'Dinov2'} in memory")
    want = {key: x.numel() for key, x in theirs.items() if x.numel() and (form.layer_scale or "layer_scale" not in key)}
    assert {key: x.numel() for key, x in ours.items()} == want


# ------------------------------------------------------------------------------------------------- round trips


SHAPES = {"mlp": Shape(96, 2, 4, 384), "swiglu": Shape(96, 2, 4, 256, swiglu=True)}
SIDES = [(64, 64), (32, 32), (48, 96), (128, 128)]  # the native one first


@pytest.fixture(params=SHAPES)
def nano(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Shape:
    """vit_nano in two blocks, with an MLP or gated."""
    monkeypatch.setitem(SIZES, "nano", SHAPES[request.param])
    return SHAPES[request.param]


def random_vit(options: dict[str, Any], seed: int = 0, **more: Any) -> ViT:
    torch.manual_seed(seed)
    vit = ViT("nano", image_size=64, **options, **more).eval()
    for name, p in vit.named_parameters():
        around_one = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma"))
        p.data.normal_(1.0 if around_one else 0.0, 0.1)
    return vit


def features(model: nn.Module, side: tuple[int, int]) -> Tensor:
    x = gen(sum(side), 2, 3, *side)
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state[:, 0]


def assert_same_function(ours: ViT, theirs: nn.Module, elsewhere: float) -> None:
    """The same features at the native size, and within ``elsewhere`` at others; 0.1 stands for another rule."""
    for side in SIDES:
        difference = (features(ours, side) - features(theirs, side)).abs().max().item()
        bound = 1e-5 if side == SIDES[0] else elsewhere
        assert difference < bound, side
        assert side == SIDES[0] or elsewhere < 0.05 or difference > 1e-4, "another rule, so other features"


@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.usefixtures("nano")
def test_round_trip_through_timm(form_name: str, tmp_path: Path) -> None:
    ours, path = random_vit(FORMS[form_name], mask_token=True), tmp_path / "a.safetensors"
    loads = export_backbone(ours, path)
    theirs = run(loads.replace(", checkpoint_path", ", dynamic_img_size=True, checkpoint_path")).eval()
    exact = ours.pos_embed is None or ours.interpolation == "antialias"
    assert_same_function(ours, theirs, 1e-5 if exact else 0.1)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    again, config = restore_backbone(tmp_path / "theirs.safetensors")
    assert isinstance(again, ViT)
    assert (again.interpolation, config.model.registers) == (ours.interpolation, FORMS[form_name].get("registers", 0))
    assert_same_function(ours, again.eval(), 1e-5)


@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.usefixtures("nano")
def test_round_trip_through_hugging_face(form_name: str, tmp_path: Path) -> None:
    """By folder, written by us and by its own save_pretrained, whole and in several files; and in memory."""
    transformers = pytest.importorskip("transformers")
    ours = random_vit(FORMS[form_name], mask_token=True)
    export_backbone(ours, tmp_path / "ours", format="hf")
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    exact = ours.pos_embed is None or FORMS[form_name].get("registers")
    assert_same_function(ours, theirs.eval(), 1e-5 if exact else 0.1)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="300KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 1
    wrapped = {"backbone.model." + key: x for key, x in theirs.state_dict().items()}
    save_file(wrapped, tmp_path / "memory.safetensors")
    for name in ("ours", "whole", "parts", "memory.safetensors"):
        again, _ = restore_backbone(tmp_path / name)
        assert_same_function(ours, again.eval(), 1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.usefixtures("nano")
def test_round_trip_through_the_repositories(form_name: str, suffix: str, tmp_path: Path) -> None:
    ours, path = random_vit(FORMS[form_name]), tmp_path / f"a{suffix}"
    export_backbone(ours, path, format="repository")
    names = (load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)).keys()
    assert ("mask_token" in names) == (form_name != "v1" or "blocks.0.mlp.w12.weight" in names)
    rotary = ours.pos_embed is None
    assert ("rope_embed.periods" in names, "blocks.1.attn.qkv.bias_mask" in names) == (rotary, rotary)
    assert ("storage_tokens" in names) == (form_name == "v3")
    again, _ = restore_backbone(path)
    assert_same_function(ours, again.eval(), 1e-6)
