"""Networks built from settings, with our backbones and timm's."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fastdino.config import Config, ConfigError, HeadConfig, LossConfig, ModelConfig, RunConfig, ViewsConfig
from fastdino.data.batch import Masks
from fastdino.data.masks import masks_of
from fastdino.model import Network, ViT, build_backbone, build_network, export_backbone

HEAD = HeadConfig(num_prototypes=16, hidden_dim=24, bottleneck_dim=8)


def config(model: ModelConfig, **views: Any) -> Config:
    return Config(model=model, head=HEAD, views=ViewsConfig(**{"global_size": 64, "local_size": 32, **views}))


def views(batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"global": torch.randn(2, batch, 3, 64, 64), "local": torch.randn(3, batch, 3, 32, 32)}


@pytest.mark.parametrize("arch", ["vit_nano", "timm:vit_tiny_patch16_224", "timm:resnet18"])
def test_outputs_are_view_major(arch: str) -> None:
    torch.manual_seed(0)
    network = build_network(config(ModelConfig(arch=arch, drop_path=0.0))).eval()
    with torch.no_grad():
        made = network(views())
        assert made.cls.shape == (5, 2, network.backbone.num_features)
        assert made.cls_points.shape == (5, 2, 8)
        assert made.prototypes.shape == (16, 8)
        for i, view in enumerate([*views()["global"], *views()["local"]]):
            for image in range(2):
                cls = network.backbone(view[image : image + 1])
                torch.testing.assert_close(made.cls[i, image], cls[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(made.cls_points[i, image], network.head(cls)[0][0], rtol=1e-4, atol=1e-5)
        alone = network({"global": views()["global"]})
        torch.testing.assert_close(alone.cls, made.cls[:2], rtol=1e-4, atol=1e-5)


def masked(patch_head: HeadConfig | None, **head: Any) -> tuple[Network, Masks]:
    """A nano network that predicts patches, and masks of two images of 4 x 4 patches."""
    settings = dataclasses.replace(
        config(ModelConfig(arch="vit_nano", drop_path=0.0)),
        head=dataclasses.replace(HEAD, **head), patch_head=patch_head, loss=LossConfig(patch_weight=1.0),
    )  # fmt: skip
    torch.manual_seed(0)
    hidden = torch.zeros(2, 2, 16, dtype=torch.bool)
    hidden[0, 0, 3:6], hidden[1, 1, [0, 15]] = True, True
    return build_network(settings), masks_of(hidden)


OWN = HeadConfig(num_prototypes=12, hidden_dim=20, bottleneck_dim=6, num_layers=2)


@pytest.mark.parametrize("patch_head", [None, OWN], ids=["shared", "own"])
def test_patches_are_read_by_their_head(patch_head: HeadConfig | None) -> None:
    """The rows of masks, in their order; with a shared head the prototypes are one tensor, made once."""
    network, masks = masked(patch_head)
    made = network(views(), masks)
    cls, patches = network.backbone(views(), masks)
    torch.testing.assert_close(made.cls, cls)
    torch.testing.assert_close(made.patches, patches)
    assert made.patches.shape == (5, 96)
    assert not torch.equal(made.patches, network(views(), masks._replace(hidden=None)).patches), "nothing was hidden"
    head = network.patch_head or network.head
    torch.testing.assert_close(made.cls_points, network.head.points(cls))
    torch.testing.assert_close(made.patch_points, head.points(patches))
    assert torch.equal(made.patch_prototypes, head.prototypes())
    assert (made.patch_prototypes is made.prototypes) == (patch_head is None)
    names = {name.split(".")[0] for name in network.state_dict()}
    assert names == ({"backbone", "head"} if patch_head is None else {"backbone", "head", "patch_head"})
    assert "backbone.mask_token" in network.state_dict()


@pytest.mark.parametrize("patch_head", [None, OWN], ids=["shared", "own"])
def test_without_masks_there_are_no_patches(patch_head: HeadConfig | None) -> None:
    """And no BatchNorm sees them: it would make statistics of nothing."""
    network, _ = masked(patch_head and dataclasses.replace(OWN, batch_norm=True), batch_norm=True)
    made = network(views())
    assert made.patches.shape == (0, 96)
    assert made.patch_points.shape == (0, 6 if patch_head else 8)
    assert all(x.isfinite().all() for x in network.state_dict().values())


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_head_is_one_call(shared: bool) -> None:
    """So its BatchNorm averages over views and patches together, and two heads each over their own."""
    network, masks = masked(None if shared else dataclasses.replace(OWN, batch_norm=True), batch_norm=True)
    rows: dict[str, list[int]] = {"head": [], "patch_head": []}
    for name, calls in rows.items():
        head = getattr(network, name)
        if head is not None:
            head.mlp.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
    network(views(), masks)
    assert rows == ({"head": [15], "patch_head": []} if shared else {"head": [10], "patch_head": [5]})


def test_the_seed_decides_and_the_teacher_has_no_drop_path() -> None:
    settings = config(ModelConfig(arch="vit_nano", drop_path=0.4))
    student, teacher_ = (build_network(settings, teacher=teacher) for teacher in (False, True))
    assert student.state_dict().keys() == teacher_.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher_.parameters(), strict=True))
    assert isinstance(student.backbone, ViT)
    assert isinstance(teacher_.backbone, ViT)
    assert student.backbone.blocks[-1].drop_path == pytest.approx(0.4)
    assert teacher_.backbone.blocks[-1].drop_path == 0
    assert [p.requires_grad for p in teacher_.parameters()] == [False] * len(list(teacher_.parameters()))
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {"head.last_layer.g"}
    assert student.training
    assert teacher_.training  # as in DINO v1


def test_options_reach_the_backbone() -> None:
    model = ModelConfig(arch="vit_tiny", patch_size=8, attention="sdpa", pos_embed="sincos", init="xavier")
    backbone = build_backbone(model, 48)
    assert backbone.num_features == 192
    assert backbone.grid == (6, 6)
    assert backbone.blocks[0].attn.choice == "sdpa"
    assert not backbone.pos_embed[0, 0].any()
    assert backbone.blocks[0].mlp.fc1.weight.abs().max() < (6 / (192 + 768)) ** 0.5  # uniform, so bounded


def test_weights_are_loaded(tmp_path: Path) -> None:
    source = build_backbone(ModelConfig(arch="vit_nano"), 64)
    export_backbone(source, tmp_path / "nano.safetensors")
    network = build_network(config(ModelConfig(arch="vit_nano", weights=tmp_path / "nano.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(network.backbone.parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arch", "width"),
    [("convnext_atto", 320), ("swin_tiny_patch4_window7_224", 768), ("mobilenetv3_small_050", 1024)],
)  # ConvNeXt knows no image size, Swin must be told, MobileNet's num_features is not its output's width
def test_timm_backbones_take_both_sizes(arch: str, width: int) -> None:
    model = ModelConfig(arch=f"timm:{arch}", drop_path=0.1)
    backbone = build_backbone(model, 224, {"global": (224, 2), "local": (96, 2)}).eval()
    assert backbone.num_features == width
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 96, 96)).shape == (1, width)
    assert backbone.published.state_dict().keys() == timm.create_model(arch, num_classes=0).state_dict().keys()


def test_timm_vit_equals_ours() -> None:
    """On views of the size that both were made for; other sizes differ, as timm resamples positions its own way."""
    torch.manual_seed(0)
    ours = build_network(config(ModelConfig(arch="vit_tiny", drop_path=0.0))).eval()
    theirs = build_network(config(ModelConfig(arch="timm:vit_tiny_patch16_224", drop_path=0.0))).eval()
    theirs.backbone.published.load_state_dict(ours.backbone.published.state_dict())
    x = {"global": views()["global"]}
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).cls, ours(x).cls, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "drop_path", "message"),
    [
        ("timm:resnet5", 0.0, r"no such model; did you mean resnet50"),
        ("timm:mixer_s16_224", 0.0, r"local views of 96 px \(views.local_size\).*Input height \(96\)"),
        (
            "timm:vit_tiny_patch16_224.augreg_in21k",
            0.0,
            r"'augreg_in21k' names weights.*use timm:vit_tiny_patch16_224,",
        ),
        ("timm:vgg11", 0.1, r"model.drop_path=0.1: vgg11 has no drop path, set it to 0"),
    ],
)
def test_what_timm_cannot_do(arch: str, drop_path: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(ModelConfig(arch=arch, drop_path=drop_path), 224, {"global": (224, 2), "local": (96, 2)})


def test_without_local_views_their_size_does_not_matter() -> None:
    model = ModelConfig(arch="timm:mixer_s32_224", drop_path=0.0)
    network = build_network(config(model, global_size=224, num_local=0, local_size=96))
    assert network.backbone.num_features == 512


def test_timm_backbones_are_compiled_whole_but_for_statistics_over_ranks() -> None:
    backbone = build_backbone(ModelConfig(arch="timm:resnet18", drop_path=0.0), 64, {"global": (64, 4)})
    assert backbone.regions() == [(backbone.published, "forward")]
    assert torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone).regions() == []


def test_timm_backbones_are_checkpointed() -> None:
    model, gradients = ModelConfig(arch="timm:convnext_atto", drop_path=0.1), []
    for how in ("none", "full"):
        backbone = build_backbone(model, 64, {"global": (64, 4)})
        backbone.set_checkpointing(how)
        torch.manual_seed(1)
        backbone({"global": views()["global"]})[0].square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("arch", "says"),
    [("resnet18", "running averages of batch normalisation twice a step"), ("crossvit_tiny_240", "no checkpointing")],
)
def test_what_cannot_be_checkpointed_is_refused(arch: str, says: str) -> None:
    backbone = build_backbone(ModelConfig(arch=f"timm:{arch}", drop_path=0.0), 240, {"global": (240, 4)})
    backbone.set_checkpointing("none")
    with pytest.raises(ConfigError, match=f"engine.checkpointing=full.* {says}.* model.arch='timm:{arch}'.*: use none"):
        backbone.set_checkpointing("full")


def test_bf16_timm_backbone_takes_fp32_views() -> None:
    network = build_network(config(ModelConfig(arch="timm:resnet18", drop_path=0.0))).eval().bfloat16()
    assert network(views()).cls_points.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("local_batch", "num_local", "size", "works"),
    [(1, 1, 32, False), (2, 1, 32, True), (1, 2, 32, True), (1, 1, 64, True)],
)
def test_one_value_per_channel_cannot_be_normalised(local_batch: int, num_local: int, size: int, works: bool) -> None:
    settings = config(ModelConfig(arch="timm:resnet18", drop_path=0.0), num_local=num_local, local_size=size)
    settings = dataclasses.replace(settings, run=RunConfig(local_batch=local_batch))
    if works:
        build_network(settings)
    else:
        with pytest.raises(ConfigError, match=r"one value per channel: raise run.local_batch"):
            build_network(settings)


@pytest.mark.parametrize("patch_head", [None, OWN], ids=["shared", "own"])
def test_a_parameter_is_read_by_its_own_module_alone_with_masks(patch_head: HeadConfig | None) -> None:
    network, masks = masked(patch_head)
    check_reads(network, masks)


ROPE = {"pos_embed": "rope", "rope_scale": 1.0, "registers": 2, "layer_scale": 0.1}
SUBSETS = {"drop_path": 0.5, "drop_path_rule": "uniform", "layer_scale": 0.1}
APART = {"packed": "off", "drop_path": 0.5}


@pytest.mark.parametrize(
    ("arch", "options"),
    [("vit_nano", {}), ("vit_nano", ROPE), ("vit_nano", SUBSETS), ("vit_nano", APART), ("timm:resnet18", {})],
    ids=["vit", "rope", "subsets", "apart", "resnet"],
)
def test_a_parameter_is_read_by_its_own_module_alone(arch: str, options: dict[str, Any]) -> None:
    """What lets an engine partition a network: weights exist only while the module that owns them runs.

    BatchNorm's and the heads' included. Each module's parameters are empty but for the time of its own forward.
    """
    torch.manual_seed(0)
    check_reads(build_network(config(ModelConfig(arch=arch, **{"drop_path": 0.0, **options}))))


def check_reads(network: Network, masks: Masks | None = None) -> None:
    with torch.no_grad():
        torch.manual_seed(1)  # of drop path
        expected = network(views(), masks)
        about = (network.backbone.implementation, network.regions())
        for module in network.modules():
            hide_outside_forward(module)
        assert all(p.numel() == 0 for p in network.parameters())
        assert (network.backbone.implementation, network.regions()) == about, "read of no weight's shape"
        torch.manual_seed(1)
        for made, wanted in zip(network(views(), masks), expected, strict=True):
            assert torch.equal(made, wanted)


def hide_outside_forward(module: torch.nn.Module) -> None:
    own = {p: p.data for p in module.parameters(recurse=False)}

    def show(*_: Any) -> None:
        for p, values in own.items():
            p.data = values

    def hide(*_: Any) -> None:
        for p in own:
            p.data = torch.empty(0)

    hide()
    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide)
