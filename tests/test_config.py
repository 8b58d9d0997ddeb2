"""Settings: DINO v1's defaults, what each bad value says, recipes, JSON."""

import dataclasses
import inspect
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdino import Config, ConfigError, recipes
from fastdino.config import (
    DataConfig,
    EngineConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PatchHeadConfig,
    RunConfig,
    ViewsConfig,
    group_kinds,
)

# DINO v1's option, its default, ours. Its use_fp16 became engine.precision (bf16 needs no loss scaler); dist_url and
# local_rank are the launcher's.
DINO_V1 = {
    "arch": ("vit_small", "model.arch"),
    "patch_size": (16, "model.patch_size"),
    "drop_path_rate": (0.1, "model.drop_path"),
    "out_dim": (65536, "head.num_prototypes"),
    "norm_last_layer": (True, "head.freeze_prototype_norm"),
    "use_bn_in_head": (False, "head.batch_norm"),
    "momentum_teacher": (0.996, "optim.teacher_momentum"),
    "warmup_teacher_temp": (0.04, "loss.warmup_teacher_temp"),
    "teacher_temp": (0.04, "loss.teacher_temp"),
    "warmup_teacher_temp_epochs": (0, "loss.warmup_teacher_temp_epochs"),
    "weight_decay": (0.04, "optim.weight_decay"),
    "weight_decay_end": (0.4, "optim.weight_decay_end"),
    "clip_grad": (3.0, "optim.clip"),
    "batch_size_per_gpu": (64, "run.local_batch"),
    "epochs": (100, "run.epochs"),
    "freeze_last_layer": (1, "optim.freeze_last_layer"),
    "lr": (0.0005, "optim.lr"),
    "warmup_epochs": (10, "optim.warmup_epochs"),
    "min_lr": (1e-6, "optim.min_lr"),
    "optimizer": ("adamw", "optim.name"),
    "global_crops_scale": ((0.4, 1.0), "views.global_scale"),
    "local_crops_number": (8, "views.num_local"),
    "local_crops_scale": ((0.05, 0.4), "views.local_scale"),
    "saveckp_freq": (20, "run.keep_every"),
    "seed": (0, "run.seed"),
    "num_workers": (10, "data.num_workers"),
    "student_temp": (0.1, "loss.student_temp"),  # these two are constants of its loss
    "center_momentum": (0.9, "loss.center_momentum"),
}


@pytest.mark.parametrize("option", DINO_V1)
def test_defaults_are_those_of_dino_v1(option):
    default, path = DINO_V1[option]
    group, name = path.split(".")
    assert getattr(getattr(Config(), group), name) == default


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ModelConfig(arch="vit_smal"), "model.arch='vit_smal'.*vit_small"),
        (lambda: ModelConfig(drop_path=1.0), r"model.drop_path=1.0 must be in \[0, 1\)"),
        (lambda: ModelConfig(rope_scale=0.5), "model.rope_scale=0.5 must be 1 or more"),
        (lambda: ModelConfig(registers=-1), "model.registers=-1 must be 0 or more"),
        (lambda: ModelConfig(layer_scale=-1e-5), "model.layer_scale=-1e-05 must be 0 or more"),
        (lambda: ModelConfig(pos_embed="ropes"), "model.pos_embed='ropes' must be one of learned, sincos, rope"),
        (lambda: ViewsConfig(num_local=31), "views.num_local=31.*at most 32 views"),
        (lambda: ViewsConfig(global_scale=(0.9, 0.4)), r"views.global_scale=\(0.9, 0.4\)"),
        (lambda: LossConfig(teacher_temp=0.7), "loss.teacher_temp=0.7.*sharper"),
        (lambda: LossConfig(center_momentum=1.0), "loss.center_momentum=1.0.*collapses"),
        (lambda: LossConfig(patch_weight=-1), "loss.patch_weight=-1.0 must be 0 or more"),
        (lambda: LossConfig(koleo_weight=-0.1), "loss.koleo_weight=-0.1 must be 0 or more"),
        (lambda: PatchHeadConfig(num_prototypes=1), "patch_head.num_prototypes=1 must be at least 2"),
        (
            lambda: Config(loss=LossConfig(patch_weight=0.5), model=ModelConfig(arch="timm:resnet50")),
            "loss.patch_weight=0.5 hides patches behind a mask token, and timm:resnet50 has none",
        ),
        (
            lambda: Config(patch_head=HeadConfig()),
            "patch_head is a head for patches, and loss.patch_weight=0 reads none",
        ),
        (
            lambda: Config(loss=LossConfig(koleo_weight=0.1), run=RunConfig(local_batch=1)),
            "run.local_batch=1 has no other: use at least 2, or loss.koleo_weight=0",
        ),
        (lambda: OptimConfig(teacher_momentum=1.5), "optim.teacher_momentum=1.5"),
        (lambda: OptimConfig(lr=-1.0), "optim.lr=-1.0"),
        (lambda: OptimConfig(layer_decay=0.0), r"optim.layer_decay=0.0 must be in \(0, 1\]"),
        (lambda: OptimConfig(layer_decay=1.1), r"optim.layer_decay=1.1 must be in \(0, 1\]"),
        (lambda: OptimConfig(patch_embed_lr=-0.2), "optim.patch_embed_lr=-0.2 must be 0 or more"),
        (lambda: OptimConfig(beta2=1.0), r"optim.beta2=1.0 must be in \[0, 1\)"),
        (lambda: OptimConfig(name="sgd", layer_decay=0.9), "optim.layer_decay=0.9 must be 1 with optim.name=sgd: only"),
        (lambda: OptimConfig(name="lars", patch_embed_lr=0.2), "patch_embed_lr=0.2 must be 1 with optim.name=lars"),
        (lambda: OptimConfig(name="sgd", freeze_how="lr"), "optim.freeze_how='lr' must be skip with optim.name=sgd"),
        (
            lambda: Config(model=ModelConfig(arch="timm:resnet50"), optim=OptimConfig(layer_decay=0.9)),
            "optim.layer_decay=0.9 must be 1 with model.arch=timm:resnet50: which parameter",
        ),
        (
            lambda: Config(model=ModelConfig(arch="timm:vit_small"), optim=OptimConfig(patch_embed_lr=0.2)),
            "optim.patch_embed_lr=0.2 must be 1 with model.arch=timm:vit_small: which parameter",
        ),
        (lambda: EngineConfig(accumulate=0), "engine.accumulate=0"),
        (lambda: EngineConfig(fp8=True, precision="fp32"), "engine.precision='fp32' must be auto or bf16 with .*fp8"),
        (
            lambda: Config(model=ModelConfig(attention="varlen"), engine=EngineConfig(device="cpu")),
            "model.attention='varlen' needs a GPU, and engine.device='cpu'",
        ),
        (lambda: EngineConfig(fp8=True, device="cpu"), "engine.device='cpu' must be auto or cuda with engine.fp8=True"),
        (
            lambda: Config(model=ModelConfig(arch="timm:vit_large_patch16_224"), engine=EngineConfig(fp8=True)),
            "engine.fp8=True must be False with model.arch=timm:vit_large",
        ),
        (lambda: DataConfig(max_bad=2.0), "data.max_bad=2.0"),
        (lambda: DataConfig(eval_crop=0.0), "data.eval_crop=0.0"),
        (lambda: DataConfig(views="quick"), "data.views='quick' must be one of auto, reference, fast"),
        (lambda: DataConfig(eval_crop=1.1), "data.eval_crop=1.1"),
        (lambda: DataConfig(channels=0), r"data.channels=0 must be in \[1, 256\]"),
        (lambda: DataConfig(channels=257), "data.channels=257"),
        (lambda: DataConfig(range=(4095, 0)), r"data.range=\(4095.0, 0.0\) must be two numbers with low < high"),
        (lambda: DataConfig(range=(7, 7)), "data.range=.* low < high"),
        (lambda: DataConfig(range=(-1e308, 1e308)), "data.range=.* low < high"),
        (lambda: DataConfig(range=(0, float("nan"))), "data.range=nan must be a finite number"),
        (lambda: DataConfig(range=(0, 9), bits=12), "data.bits=12 must be left out: data.range=0 9 says"),
        (
            lambda: Config(data=DataConfig(channels=4)),
            r"data.channels=4, .*\(data.normalize, views.jitter, views.grayscale\): use --data.normalize image "
            "--views.jitter 0 --views.grayscale 0$",
        ),
        (
            lambda: Config(data=DataConfig(channels=1, normalize="image"), views=ViewsConfig(grayscale=0)),
            r"data.channels=1, .*\(views.jitter\): use --views.jitter 0$",
        ),
        (lambda: RunConfig(epochs=0), "run.epochs=0"),
        (lambda: RunConfig(hang_after=-1.0), "run.hang_after=-1.0 must be 0 or more"),
        (lambda: RunConfig(prometheus=65536), "run.prometheus=65536 must be a port, 1 to 65535, or 0 for none"),
        (lambda: Config(model=ModelConfig(patch_size=15)), "global_size=224 .* model.patch_size=15: use 210 or 225"),
        (lambda: Config(views=ViewsConfig(local_size=90)), "local_size=90 .* use 80 or 96"),
        (lambda: Config(run=RunConfig(epochs=5)), "warmup_epochs=10 is longer than run.epochs=5"),
        (
            lambda: Config(model=ModelConfig(attention="xformers"), engine=EngineConfig(device="cpu")),
            "xformers.* needs a GPU",
        ),
    ],
)
def test_bad_values_say_what_to_change(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"optim": OptimConfig(freeze_last_layer=6, warmup_epochs=0)},
            "freeze_last_layer=6 is longer than run.epochs=5",
        ),
        (
            {"loss": LossConfig(teacher_temp=0.07, warmup_teacher_temp_epochs=30)},
            "optim.warmup_epochs=10 and loss.warmup_teacher_temp_epochs=30 are longer than run.epochs=5: shorten them",
        ),
    ],
)
def test_what_would_not_end_within_the_run_is_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        Config(run=RunConfig(epochs=5), **overrides)


def test_a_warm_up_of_the_temperature_that_goes_nowhere_may_be_long():
    Config(run=RunConfig(epochs=10), loss=LossConfig(warmup_teacher_temp_epochs=30))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model": ModelConfig(arch="timm:resnet50", patch_size=8)}, ["model.patch_size=8 has no effect: timm:"]),
        ({"model": ModelConfig(arch="timm:resnet50", pos_embed="sincos", attention="sdpa")},
         ["model.attention=sdpa", "model.pos_embed=sincos"]),
        ({"model": ModelConfig(arch="timm:resnet50", registers=4, layer_scale=1e-5)},
         ["model.registers=4", "model.layer_scale=1e-05"]),
        ({"model": ModelConfig(arch="timm:resnet50", rope_scale=1.0)}, ["model.rope_scale=1.0 has no effect: timm:"]),
        ({"model": ModelConfig(drop_path=0, drop_path_rule="uniform")}, ["model.drop_path_rule=uniform"]),
        ({"model": ModelConfig(pos_embed="rope", interpolation="antialias")}, ["model.interpolation=antialias"]),
        ({"model": ModelConfig(pos_embed="rope", rope_scale=1.0, registers=4)}, []),
        ({"model": ModelConfig(rope_scale=1.0)}, ["model.rope_scale=1.0 has no effect: model.pos_embed is learned"]),
        ({"model": ModelConfig(pos_embed="rope", image_size=64)}, ["model.image_size=64 has no effect: rope"]),
        ({"data": DataConfig(root="/images", num_images=7)}, ["data.num_images=7 has no effect: a folder"]),
        ({"data": DataConfig(root="shapes", num_images=7)}, []),
        ({"data": DataConfig(root="shapes", bits=12)}, ["data.bits=12 has no effect: shapes"]),
        ({"data": DataConfig(root="shapes", range=(0, 9))}, ["data.range=(0.0, 9.0) has no effect: shapes"]),
        ({"views": ViewsConfig(num_local=0, local_size=64)}, ["views.local_size=64"]),
        ({"engine": EngineConfig(name="torch", zero_stage=2)}, ["engine.zero_stage=2"]),
        ({"engine": EngineConfig(device="cpu", teacher_stream=True)}, ["engine.teacher_stream=True has no effect: a"]),
        ({"model": ModelConfig(packed="off"), "views": ViewsConfig(num_local=0)}, ["model.packed=off"]),
        ({"optim": OptimConfig(clip=0, clip_mode="global")}, ["optim.clip_mode=global"]),
        ({"optim": OptimConfig(name="sgd", beta2=0.9)}, ["optim.beta2=0.9 has no effect: optim.name is sgd"]),
        ({"optim": OptimConfig(schedule="constant", min_lr=0, weight_decay_end=0.1, teacher_momentum_end=0.999)},
         ["optim.min_lr=0.0", "optim.weight_decay_end=0.1", "optim.teacher_momentum_end=0.999"]),
        ({"optim": OptimConfig(freeze_last_layer=0, freeze_how="lr")}, ["optim.freeze_how=lr"]),
        ({"loss": LossConfig(temp_warmup_by="step")}, ["loss.temp_warmup_by=step has no effect: loss.warmup"]),
        ({"run": RunConfig(knn_every=0, knn_root="/images")}, ["run.knn_root=/images"]),
        ({"loss": LossConfig(warmup_teacher_temp=0.01)}, ["loss.warmup_teacher_temp=0.01"]),
        ({"loss": LossConfig(patch_targets="sinkhorn")}, ["loss.patch_targets=sinkhorn has no effect: loss.patch_"]),
        ({"loss": LossConfig(targets="sinkhorn", center_momentum=0.5)}, ["loss.center_momentum=0.5 has no effect: "]),
        ({"loss": LossConfig(targets="sinkhorn", patch_targets="center", center_momentum=0.5, patch_weight=1)}, []),
        ({"loss": LossConfig(targets="sinkhorn", center_momentum=0.5, patch_weight=1)}, ["loss.center_momentum=0.5"]),
        ({"loss": LossConfig(patch_weight=1), "patch_head": HeadConfig(num_layers=1, hidden_dim=7)},
         ["patch_head.hidden_dim=7 has no effect: patch_head.num_layers is 1"]),
        ({}, []),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(overrides, says):
    lines = Config(**overrides).ignored()
    assert len(lines) == len(says)
    assert all(line.startswith(start) for line, start in zip(lines, says, strict=True))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_sets_nothing_in_vain(name):
    given = recipes.get(name)
    folder = dataclasses.replace(given.data, root=given.data.root or "/images")
    assert dataclasses.replace(given, data=folder).ignored() == []


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("made", "equal"),
    [
        (lambda: RunConfig(dir="runs/x"), RunConfig(dir=Path("runs/x"))),  # type: ignore[arg-type]
        (lambda: RunConfig(dir=Path("~/x")), RunConfig(dir=Path(HOME) / "x")),
        (lambda: RunConfig(knn_root="~/x"), RunConfig(knn_root=f"{HOME}/x")),
        (lambda: DataConfig(root=Path("/images")), DataConfig(root="/images")),  # type: ignore[arg-type]
        (lambda: DataConfig(root=np.str_("~")), DataConfig(root=HOME)),
        (lambda: ModelConfig(weights="a"), ModelConfig(weights=Path("a"))),  # type: ignore[arg-type]
        (lambda: ViewsConfig(global_scale=[0.5, 1]), ViewsConfig(global_scale=(0.5, 1.0))),  # type: ignore[arg-type]
        (lambda: ViewsConfig(blur=np.array([1, 0, 0.5])), ViewsConfig(blur=(1.0, 0.0, 0.5))),
        (lambda: OptimConfig(lr=np.float32(0.5)), OptimConfig(lr=0.5)),
        (lambda: OptimConfig(lr=torch.tensor(0.5)), OptimConfig(lr=0.5)),  # type: ignore[arg-type]
        (lambda: OptimConfig(clip=3), OptimConfig(clip=3.0)),
        (lambda: RunConfig(seed=np.int64(3), epochs=1e2), RunConfig(seed=3, epochs=100)),  # type: ignore[arg-type]
        (lambda: EngineConfig(zero_stage=np.int64(2)), EngineConfig(zero_stage=2)),  # type: ignore[arg-type]
        (lambda: HeadConfig(batch_norm=np.bool_(True)), HeadConfig(batch_norm=True)),
    ],
)
def test_values_as_notebooks_and_sweeps_give_them(made, equal):
    found = made()
    assert found == equal
    for name in found.__dataclass_fields__:
        given, wanted = getattr(found, name), getattr(equal, name)
        assert repr(given) == repr(wanted), "the same types, at any depth"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EngineConfig(name="ddp"), "engine.name='ddp' must be one of deepspeed, torch"),
        (lambda: EngineConfig(precision="fp16"), "engine.precision='fp16' must be one of auto, fp32, bf16"),
        (lambda: EngineConfig(zero_stage=4), "engine.zero_stage=4 must be one of auto, 0, 1, 2, 3"),
        (lambda: EngineConfig(zero_stage=True), "engine.zero_stage=True must be one of"),
        (lambda: EngineConfig(device=None), "engine.device=None must be one of"),
        (lambda: HeadConfig(batch_norm="false"), "head.batch_norm='false' must be True or False"),
        (lambda: PatchHeadConfig(batch_norm=1), "patch_head.batch_norm=1 must be True or False"),
        (lambda: LossConfig(targets="mean"), "loss.targets='mean' must be one of center, sinkhorn"),
        (lambda: LossConfig(patch_targets="mean"), "loss.patch_targets='mean' must be one of center, sinkhorn"),
        (lambda: LossConfig(targets=None), "loss.targets=None must be one of center, sinkhorn"),
        (lambda: HeadConfig(batch_norm=1), "head.batch_norm=1 must be True or False"),
        (lambda: RunConfig(epochs=1.5), "run.epochs=1.5 must be a whole number"),
        (lambda: RunConfig(epochs=True), "run.epochs=True must be a whole number"),
        (lambda: RunConfig(epochs="10"), "run.epochs='10' must be a whole number"),
        (lambda: RunConfig(epochs=float("inf")), "run.epochs=inf must be a whole number"),
        (lambda: RunConfig(seed=2**64), r"run.seed=18446744073709551616 must be in \[0, 2\*\*64\)"),
        (lambda: RunConfig(seed=-1), "run.seed=-1 must be in"),
        (lambda: RunConfig(dir=""), "run.dir='' must be a path"),
        (lambda: RunConfig(checkpoints=""), "run.checkpoints='' must be a folder or a URL"),
        (lambda: RunConfig(dir=None), "run.dir=None must be a path"),
        (lambda: RunConfig(knn_root=None), "run.knn_root=None must be text"),
        (lambda: OptimConfig(lr=float("nan")), "optim.lr=nan must be a finite number"),
        (lambda: OptimConfig(lr=float("inf")), "optim.lr=inf must be a finite number"),
        (lambda: OptimConfig(lr=10**400), "optim.lr=10+ must be a finite number"),
        (lambda: OptimConfig(lr="high"), "optim.lr='high' must be a finite number"),
        (lambda: OptimConfig(lr=[0.1]), r"optim.lr=\[0.1\] must be a finite number"),
        (lambda: ViewsConfig(blur=(1, 2)), r"views.blur=\(1, 2\) must be 3 numbers"),
        (lambda: ViewsConfig(blur="abc"), "views.blur='abc' must be 3 numbers"),
        (lambda: ViewsConfig(blur=0.5), "views.blur=0.5 must be 3 numbers"),
        (lambda: ViewsConfig(blur=(0, 0, None)), "views.blur=None must be a finite number"),
        (lambda: Config(model={"arch": "vit_small"}), "model={'arch': 'vit_small'} must be a ModelConfig"),
        (lambda: Config(patch_head=OptimConfig()), "patch_head=OptimConfig.* must be a PatchHeadConfig"),
        (lambda: Config(head=None), "head=None must be a HeadConfig"),
        (lambda: Config(run=OptimConfig()), "run=OptimConfig.* must be a RunConfig"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("seed", range(40))
def test_any_config_reads_back_equal_to_itself(seed):
    """Of values drawn at random, odd ones among them."""
    draw = random.Random(seed)
    folders = ["~", "~/x y", "../up", "a/~/b", "./~nobody-of-that-name", "/", "\u00e9\n", "a\udcff", ".", "shapes"]
    numbers = [0, 1, 0.1, np.float32(0.3), np.float64(1) / 3, 1e-300, np.float16(0.7), torch.tensor(0.2)]

    config = Config(
        model=ModelConfig(arch=draw.choice(["vit_small", "vit_base"]), weights=draw.choice([None, *folders])),
        views=ViewsConfig(
            blur=draw.choice([list, tuple, np.array])([float(draw.choice(numbers)) for _ in range(3)]),
            global_scale=[np.float32(0.1), 1], jitter=draw.choice(numbers), flip=draw.choice(numbers),
        ),
        data=DataConfig(
            root=draw.choice(folders), num_images=np.int32(draw.randrange(1, 10**9)), max_bad=draw.choice(numbers),
        ),
        optim=OptimConfig(lr=draw.choice(numbers), min_lr=np.float32(draw.random()), clip=draw.randrange(9)),
        engine=EngineConfig(zero_stage=draw.choice(["auto", 0, np.int64(1), 2, 3])),
        loss=LossConfig(patch_weight=np.float32(0.5), patch_targets=draw.choice([None, "sinkhorn"])),
        patch_head=draw.choice([None, HeadConfig(num_prototypes=np.int64(7)), PatchHeadConfig(weights=Path("~"))]),
        run=RunConfig(dir=draw.choice(folders), seed=draw.choice([0, 2**53 + 1, 2**64 - 1, np.uint64(2**63)])),
    )  # fmt: skip
    again = Config.from_json(config.to_json())
    assert again == config
    assert repr(again) == repr(config)
    assert again.to_json() == config.to_json()


def test_other_channels_have_no_colour_steps():
    """Solarization is of each channel; jitter of no strength is none."""
    views = ViewsConfig(jitter=0.8, jitter_strength=(0, 0, 0, 0), grayscale=0, solarize=0.2)
    made = Config(data=DataConfig(channels=4, normalize="image", range=(0, 4095)), views=views)
    assert Config.from_json(made.to_json()) == made


def test_no_local_views_need_no_local_size():
    Config(views=ViewsConfig(local_size=90, num_local=0))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe(name):
    config = recipes.get(name)
    assert Config.from_json(config.to_json()) == config
    doc = recipes.RECIPES[name].__doc__ or ""
    assert "Run: " in doc
    if name != "demo":
        assert name in doc, "the command of a recipe names it"
        assert ("Score: " in doc and "README" in doc) or "no published score" in doc


def test_wrong_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="no recipe 'vit_smal_16': did you mean vit_small_16"):
        recipes.get("vit_smal_16")


def test_json_of_another_version_is_refused():
    content = json.loads(Config().to_json())
    content["loss"]["temperature"] = 1
    with pytest.raises(ConfigError, match=r"unknown setting loss.temperature: another version .* wrote it"):
        Config.from_json(json.dumps(content))
    del content["loss"]["temperature"]
    content["loss"]["teacher_temperature"] = content["loss"].pop("teacher_temp")
    with pytest.raises(ConfigError, match=r"unknown setting loss.teacher_temperature.* call it loss.teacher_temp if"):
        Config.from_json(json.dumps(content))
    for text in ("{}", "[]", "3", "null", '{"model": 3}', "{", json.dumps({"ibot": {}})):
        with pytest.raises(ConfigError, match="not a config"):
            Config.from_json(text)


def test_a_config_from_before_patch_heads_has_none():
    content = json.loads(Config().to_json())
    assert content.pop("patch_head") is None
    assert Config.from_json(json.dumps(content)) == Config()
    content["patch_head"] = {"num_layers": 0}
    with pytest.raises(ConfigError, match=r"patch_head.num_layers=0 must be at least 1"):
        Config.from_json(json.dumps(content))
    content["patch_head"] = {"num_layer": 1}
    with pytest.raises(ConfigError, match=r"unknown setting patch_head.num_layer: .* call it patch_head.num_layers"):
        Config.from_json(json.dumps(content))


def test_a_setting_of_later_takes_its_default():
    content = json.loads(Config().to_json())
    del content["loss"]["center_momentum"]
    assert Config.from_json(json.dumps(content)) == Config()
    content["loss"]["teacher_temp"] = "warm"
    with pytest.raises(ConfigError, match=r"loss.teacher_temp='warm' must be a finite number"):
        Config.from_json(json.dumps(content))


def test_settings_are_few_and_each_is_explained():
    """A new setting is a decision: raise the number knowingly."""
    kinds = group_kinds()
    assert {f.name for f in dataclasses.fields(kinds.pop("patch_head"))} == {
        f.name for f in dataclasses.fields(HeadConfig)
    }
    settings = [(kind, f.name) for kind in kinds.values() for f in dataclasses.fields(kind)]
    assert len(settings) == 107
    for kind, name in settings:
        after = inspect.getsource(kind).split(f"    {name}: ")[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), f"{name} has no docstring, so --help does not explain it"
