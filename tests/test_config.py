"""Settings: DINO v1's defaults, what each bad value says, recipes, JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

import fastdino.config
from fastdino import Config, ConfigError, recipes
from fastdino.config import DataConfig, EngineConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, ViewsConfig

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
        (lambda: ViewsConfig(num_local=31), "views.num_local=31.*at most 32 views"),
        (lambda: ViewsConfig(global_scale=(0.9, 0.4)), r"views.global_scale=\(0.9, 0.4\)"),
        (lambda: LossConfig(teacher_temp=0.7), "loss.teacher_temp=0.7.*sharper"),
        (lambda: LossConfig(center_momentum=1.0), "loss.center_momentum=1.0.*collapses"),
        (lambda: OptimConfig(teacher_momentum=1.5), "optim.teacher_momentum=1.5"),
        (lambda: OptimConfig(lr=-1.0), "optim.lr=-1.0"),
        (lambda: EngineConfig(accumulate=0), "engine.accumulate=0"),
        (lambda: DataConfig(max_bad=2.0), "data.max_bad=2.0"),
        (lambda: RunConfig(epochs=0), "run.epochs=0"),
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
    with pytest.raises(ConfigError, match=r"unknown setting loss.temperature"):
        Config.from_json(json.dumps(content))
    with pytest.raises(ConfigError, match="not a config"):
        Config.from_json("{}")


def test_settings_are_few_and_each_is_explained():
    """A new setting is a decision: raise the number knowingly."""
    source = "".join(file.read_text() for file in Path(fastdino.config.__file__).parent.glob("*.py"))
    names = [f.name for group in dataclasses.fields(Config) for f in dataclasses.fields(group.type)]
    assert len(names) == 65
    for name in set(names):
        assert f"    {name}: " in source
        after = source.split(f"    {name}: ")[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), f"{name} has no docstring, so --help does not explain it"
