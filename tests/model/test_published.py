"""What people have: training checkpoints of DINOv2 with their heads, folders of Hugging Face, and broken ones."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdino.config import Config, ConfigError, HeadConfig, LossConfig, ModelConfig, ViewsConfig
from fastdino.model import (
    Head,
    ViT,
    WeightsError,
    build_backbone,
    build_network,
    export_backbone,
    load_backbone,
    load_head,
    restore_backbone,
)
from fastdino.model.weights import form_of, settled
from fastdino.model.weights.dialects import without_key_biases
from fastdino.training.export import any_backbone

HEAD: dict[str, Any] = {"num_prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8, "freeze_prototype_norm": False}
V2: dict[str, Any] = {"registers": 4, "layer_scale": 1e-5, "interpolation": "antialias"}


def nano(seed: int = 0, **options: Any) -> ViT:
    torch.manual_seed(seed)
    vit = ViT("nano", **{"image_size": 64, **options})
    for p in vit.parameters():
        p.data.normal_(0, 0.1)
    if vit.pos_embed is None:
        vit.load_state_dict(without_key_biases(vit.state_dict()))
    return vit


def head(seed: int, **options: Any) -> Head:
    torch.manual_seed(seed)
    made = Head(96, HeadConfig(**{**HEAD, **options}), seed=seed)
    made.last_layer.g.data.uniform_(0.5, 2)
    return made


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def v2_state(backbone: ViT, dino: Head, ibot: Head | None) -> dict[str, torch.Tensor]:
    """As DINOv2's trainer names it: blocks in chunks, heads with weight_norm's names."""
    state = {}
    for name, x in backbone.state_dict().items():
        words = name.split(".")
        chunk = f"blocks.{int(words[1]) // 2}." if words[0] == "blocks" else ""
        state["backbone." + (chunk + ".".join(words[1:]) if chunk else name)] = x
    for kind, module in (("dino_head", dino), ("ibot_head", ibot)):
        for name, x in module.state_dict().items() if module else ():
            state[f"{kind}.{name.replace('last_layer.', 'last_layer.weight_')}"] = x
    return state


@pytest.mark.parametrize("layout", ["teacher alone", "both under model"])
def test_dinov2_training_checkpoint(layout: str, tmp_path: Path) -> None:
    """The teacher's backbone and its two heads, each where it belongs; the mask token goes where there is one."""
    vit, dino, ibot = nano(1, **V2, mask_token=True), head(2), head(3)
    teacher, student = v2_state(vit, dino, ibot), v2_state(nano(4, **V2, mask_token=True), head(5), head(6))
    if layout == "teacher alone":
        content = {"teacher": teacher}
    else:
        content = {"model": {"student." + k: x for k, x in student.items()}, "iteration": 7}  # type: ignore[dict-item]
        content["model"] |= {"teacher." + k: x for k, x in teacher.items()}
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save(content, path)
    network = build_network(
        Config(
            model=ModelConfig(arch="vit_nano", weights=path),
            head=HeadConfig(**HEAD, weights=path),
            patch_head=HeadConfig(**HEAD, weights=path),
            views=ViewsConfig(global_size=64, local_size=32),
            loss=LossConfig(patch_weight=1.0),
        )
    )
    assert same(network.backbone, vit)
    assert same(network.head, dino)
    assert network.patch_head is not None
    assert same(network.patch_head, ibot)
    evaluated, config = restore_backbone(path)
    assert "mask_token" not in evaluated.state_dict()
    assert (config.model.registers, config.model.interpolation) == (4, "antialias")
    torch.save({"teacher": v2_state(vit, dino, None)}, path)
    with pytest.raises(WeightsError, match=r"holds no head for patches \(ibot_head, patch_head\)"):
        load_head(head(7), path, patches=True)


def test_the_official_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Free lengths of prototypes: the logits are DINOv2's. Frozen they stay so, which is said."""
    caplog.set_level(logging.INFO)
    official = json.loads((Path(__file__).parents[1] / "fixtures/dinov2_head.json").read_text())

    def gen(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    state = {
        f"teacher.dino_head.{name}": 0.05 * gen(int(hashlib.sha1(f"h.{name}".encode()).hexdigest()[:6], 16), *shape)
        for name, shape in official["keys"].items()
    }
    save_file(state, tmp_path / "a.safetensors")
    ours = Head(48, HeadConfig(num_prototypes=130, hidden_dim=64, bottleneck_dim=32, freeze_prototype_norm=False))
    load_head(ours, tmp_path / "a.safetensors")
    assert not caplog.text
    frozen = Head(48, HeadConfig(num_prototypes=130, hidden_dim=64, bottleneck_dim=32))
    load_head(frozen, tmp_path / "a.safetensors")
    assert torch.equal(frozen.last_layer.g, ours.last_layer.g)
    assert "prototypes of other lengths than 1, and freeze_prototype_norm keeps them" in caplog.text
    points, prototypes = ours(gen(950, 4, 48))
    logits = (points @ prototypes.T).detach().flatten()
    torch.testing.assert_close(logits[:6].tolist(), official["out"]["first"], rtol=0, atol=1e-7)
    torch.testing.assert_close(logits[-3:].tolist(), official["out"]["last"], rtol=0, atol=1e-7)
    assert logits.norm().item() == pytest.approx(official["out"]["norm"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the form


def run_of(path: Path, **options: Any) -> Config:
    model = ModelConfig(**{"arch": "vit_nano", "weights": path, **options})
    return Config(model=model, head=HeadConfig(**HEAD), views=ViewsConfig(global_size=32, local_size=16))


FORMS = {
    "v1": {},
    "v2": {"layer_scale": 1e-5},
    "v2-reg4": V2,
    "v3": {"registers": 4, "layer_scale": 1e-5, "pos_embed": "rope"},
}


@pytest.mark.parametrize("name", FORMS)
def test_weights_decide_the_form(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Registers, LayerScale, positions with their rule and their grid; what was asked for otherwise is said."""
    vit, path = nano(1, **FORMS[name]), tmp_path / "a.pth"
    torch.save({"backbone." + k: x for k, x in vit.state_dict().items()}, path)
    config = settled(run_of(path, pos_embed="sincos", layer_scale=0.5))
    assert settled(config) == config
    assert {key: getattr(config.model, key) for key in FORMS[name]} == FORMS[name]
    assert config.model.registers == FORMS[name].get("registers", 0)
    assert config.model.image_size == (None if name == "v3" else 64)
    scale = FORMS[name].get("layer_scale", 0.0)
    positions = "rope" if name == "v3" else "learned"
    assert f"model.layer_scale=0.5 has no effect: model.weights have {scale}" in caplog.text
    assert f"model.pos_embed=sincos has no effect: model.weights have {positions}" in caplog.text
    for teacher in (False, True):
        assert same(build_network(run_of(path), teacher).backbone, vit)
    path.unlink()
    assert build_network(config, load=False).backbone.state_dict().keys() == vit.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"arch": "vit_tiny"}, "asks for arch vit_tiny: start it with --model.arch vit_nano,"),
        ({"patch_size": 8}, "asks for patch_size 8: start it with --model.patch-size 16,"),
        ({"registers": 2}, "asks for registers 2: start it with --model.registers 4,"),
        ({"registers": 0, "image_size": 128}, "--model.registers 4 --model.image-size 64,"),
    ],
)
def test_weights_that_the_run_contradicts(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(nano(1, **V2).state_dict(), path)
    with pytest.raises(ConfigError) as refused:
        settled(run_of(path, **options))
    assert f"{path}' has arch vit_nano, patch_size 16, registers 4, image_size 64" in str(refused.value)
    assert says in str(refused.value)


def test_the_flags_to_type_are_enough(tmp_path: Path) -> None:
    """Another patch size may ask for other sizes of views too."""
    path = tmp_path / "a.pth"
    torch.save(nano(1, patch_size=14, image_size=70).state_dict(), path)
    with pytest.raises(ConfigError, match=r"--model.patch-size 14 --views.global-size 42 --views.local-size 28, or"):
        settled(run_of(path))
    model = ModelConfig(arch="vit_nano", weights=path, patch_size=14)
    settled(Config(model=model, views=ViewsConfig(global_size=42, local_size=28)))


def test_a_mask_token_that_the_file_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.save(nano(1).state_dict(), tmp_path / "a.pth")
    for seed in (2, 3):
        vit = nano(seed, mask_token=True)
        load_backbone(vit, tmp_path / "a.pth")
        assert not vit.mask_token.any()
    assert caplog.text.count("has no mask token: it starts at zeros") == 1, "once for student and teacher"


# ------------------------------------------------------------------------------------- folders of Hugging Face


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_backbone(nano(1, **V2), tmp_path / "hf", format="hf")
    return tmp_path / "hf"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split(folder: Path, **places: str) -> None:
    """Its tensors in a file that an index names."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(state, "part.safetensors") | places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda hf: (hf / "config.json").unlink(), r"looked for config\.json beside.*found model\.safet"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), r"beside model\.safetensors or.*found config\.json"),
    "cut": (lambda hf: cut(hf / "model.safetensors"), r"model\.safetensors is not a whole safetensors file"),
    "not JSON": (lambda hf: (hf / "config.json").write_text("{"), r"config\.json cannot be read"),
    "a list": (lambda hf: (hf / "config.json").write_text("[]"), r"config\.json holds a list"),
    "heads": (lambda hf: edit(hf / "config.json", num_attention_heads=8), r"num_attention_heads 8 for 4"),
    "base": (lambda hf: edit(hf / "config.json", rope_theta=10000.0), r"rope_theta 10000\.0 for 100\.0"),
    "part": (lambda hf: split(hf, gone="other.safetensors"), r"no weights at .*other\.safetensors"),
    "elsewhere": (lambda hf: split(hf, gone="../other.safetensors"), r"no index of files beside it"),
    "no map": (lambda hf: (split(hf), (hf / "model.safetensors.index.json").write_text("{}")), r"no index of files"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, folder: Path) -> None:
    damage, says = BROKEN[case]
    damage(folder)
    with pytest.raises(WeightsError, match=says):
        any_backbone(folder)
    with pytest.raises(WeightsError, match=says):
        build_network(run_of(folder))


def test_a_folder_in_parts(folder: Path) -> None:
    split(folder)
    assert same(any_backbone(folder)[0], nano(1, **V2))


def test_a_folder_of_another_family(folder: Path) -> None:
    """Hugging Face's own ViT: named by what was found."""
    state = {"vit.embeddings.cls_token": torch.ones(1, 1, 96), "vit.layernorm.weight": torch.ones(96)}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"looked for patch_embed.proj.weight and blocks.0.mlp, found cls_token, norm.weight"
    ):
        any_backbone(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("pos_embed"), "holds a vit_nano with no pos_embed"),
        (lambda s: s.update(pos_embed=torch.ones(1, 19, 96)), "19 position embeddings, not those of a square"),
        (lambda s: s.update(cls_token=torch.ones(1, 1, 100)), "4 blocks of width 100 with an MLP of 384"),
        (lambda s: s.update(cls_token=torch.ones(96)), r"none of our ViTs \(looked for cls_token"),
        (lambda s: [s.pop(k) for k in [*s] if k.startswith("blocks.3")], "3 blocks of width 96"),
        (lambda s: s.update({"blocks.1.attn.qkv.bias": torch.tensor(1.0)}), r"misshaped: blocks.1.attn.qkv.bias \(\)"),
        (lambda s: s.update({"blocks.1.norm3.bias": torch.ones(2)}), r"1 unexpected: blocks.1.norm3.bias"),
        (lambda s: s.update(register_tokens=torch.ones(4, 96)), r"1 unexpected: register_tokens"),
    ],
)
def test_backbones_that_are_none_of_ours(change: Any, says: str, tmp_path: Path) -> None:
    state = {k: x.clone() for k, x in nano(1).state_dict().items()}
    change(state)
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=says) as refused:
        any_backbone(path)
    assert str(path) in str(refused.value)


def test_periods_of_another_base(tmp_path: Path) -> None:
    vit = nano(1, **FORMS["v3"])
    export_backbone(vit, tmp_path / "a.safetensors", format="repository")
    state = load_file(tmp_path / "a.safetensors")
    state["rope_embed.periods"] *= 1.1
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"other periods than ours: 1\.1"):
        any_backbone(tmp_path / "a.safetensors")


def test_the_licence_of_dinov3(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Is named for weights that may be DINOv3's, once; not for our own, and not for DINOv2's."""
    caplog.set_level(logging.INFO)
    vit, config = nano(1, **FORMS["v3"]), Config(model=ModelConfig(arch="vit_nano", pos_embed="rope"))
    export_backbone(vit, tmp_path / "a.safetensors", format="repository")
    state = load_file(tmp_path / "a.safetensors") | {"local_cls_norm.weight": torch.ones(96)}
    save_file(state, tmp_path / "a.safetensors")
    export_backbone(vit, tmp_path / "ours.safetensors", {"config": config.to_json()})
    export_backbone(nano(1, **V2), tmp_path / "hf", format="hf")
    for name in ("a.safetensors", "a.safetensors", "ours.safetensors", "hf"):
        any_backbone(tmp_path / name)
    assert caplog.text.count("under the DINOv3 License") == 1
    assert caplog.text.count("left out local_cls_norm.weight") == 1


@pytest.mark.parametrize("format", ["timm", "hf", "repository"])
def test_our_own_export_keeps_its_interpolation(format: Any, tmp_path: Path) -> None:
    """A network with registers that was trained by DINO v1's rule: names and shapes alone would tell the other."""
    vit = nano(1, registers=4)
    config = Config(model=ModelConfig(arch="vit_nano", registers=4), views=ViewsConfig(global_size=64, local_size=16))
    path = tmp_path / ("a" if format == "hf" else "a.safetensors")
    export_backbone(vit, path, {"config": config.to_json()}, format)
    again, found = restore_backbone(path)
    assert isinstance(again, ViT)
    assert again.interpolation == "offset"
    assert found == config
    assert form_of(path).interpolation == "antialias"
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(again.eval()(x), vit.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "name", "says"),
    [
        ("timm", "v1", ["no mask token: left out", "other sizes than 64 px"]),
        ("timm", "v2-reg4", ["no mask token: left out"]),
        ("timm", "rope", ["no mask token: left out", "written as ones"]),
        ("hf", "v1", ["written as ones", "other sizes than 64 px"]),
        ("hf", "v2", ["other sizes than 64 px"]),
        ("hf", "v2-reg4", []),
        ("hf", "v3", []),
        ("repository", "v1", []),
        ("repository", "v2-reg4", []),
        ("repository", "v3", []),
    ],
)
def test_what_a_format_cannot_express_is_said(
    format: Any, name: str, says: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    vit = nano(1, **{**FORMS, "rope": {"pos_embed": "rope"}}[name], mask_token=True)
    export_backbone(vit, tmp_path / "a", format=format)
    assert len(caplog.messages) == len(says)
    assert all(part in line for part, line in zip(says, caplog.messages, strict=True))


def test_a_backbone_of_timm_has_timms_names_alone(tmp_path: Path) -> None:
    model = ModelConfig(arch="timm:resnet18", drop_path=0.0)
    backbone = build_backbone(model, 64)
    for format in ("hf", "repository"):
        with pytest.raises(ConfigError, match=f"no names but timm's: leave out --format {format}"):
            export_backbone(backbone, tmp_path / "a", format=format)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
