"""A user's DeepSpeed JSON: what it may set reaches DeepSpeed, all else is refused with its reason."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fastdino
from fastdino.config import Config, ConfigError, EngineConfig
from fastdino.config.deepspeed import FLAG, FREE, REASONS, SIZE
from fastdino.engine.zero import deepspeed_config
from tests.training.test_resume import config as tiny


def merge(tmp_path: Path, text: str, stage: Any = 3, **engine: Any) -> dict[str, Any]:
    (tmp_path / "ds.json").write_text(text)
    config = Config(engine=EngineConfig(deepspeed=tmp_path / "ds.json", zero_stage=stage, **engine))
    return deepspeed_config(config, stage, bf16=True)


def ours(stage: int = 3) -> dict[str, Any]:
    return deepspeed_config(Config(), stage, bf16=True)


def test_what_is_free_reaches_deepspeed_and_the_rest_stays(tmp_path: Path) -> None:
    zero = {"overlap_comm": False, "reduce_bucket_size": 5e8, "stage3_max_reuse_distance": 10**9}
    sections = {"comms_logger": {"enabled": True}, "flops_profiler": {"enabled": True, "profile_step": 7}}
    found = merge(tmp_path, json.dumps({"communication_data_type": "fp32", "zero_optimization": zero, **sections}))
    for key, value in zero.items():
        assert found["zero_optimization"].pop(key) == value
        assert type(value) is not float or isinstance(value, float)
    assert {key: found.pop(key) for key in sections} == sections
    assert found.pop("communication_data_type") == "fp32"
    rest = ours()
    del rest["communication_data_type"]
    rest["zero_optimization"] = {k: v for k, v in rest["zero_optimization"].items() if k not in zero}
    assert found == rest


def test_sizes_become_whole_numbers(tmp_path: Path) -> None:
    zero = merge(tmp_path, '{"zero_optimization": {"reduce_bucket_size": 5e8}}')["zero_optimization"]
    assert type(zero["reduce_bucket_size"]) is int


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"zero_optimization": {"stage": 3, "sub_group_size": "auto", "memory_efficient_linear": False}},
        {"gradient_clipping": 0, "train_batch_size": "auto", "bf16": {"enabled": True}},
        {"fp16": {"enabled": False, "loss_scale": 0}, "optimizer": None},
        {"zero_optimization": {"offload_optimizer": {"device": "none", "pin_memory": True}}},
    ],
)
def test_what_is_said_alike_or_switched_off_changes_nothing(tmp_path: Path, content: Any) -> None:
    assert merge(tmp_path, json.dumps(content)) == ours()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2 is not .* to set: set engine.zero_stage"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 .*: set optim.clip"),
        ({"train_micro_batch_size_per_gpu": 1}, "set run.local_batch"),
        ({"train_batch_size": 32}, "run.local_batch times the ranks"),
        ({"gradient_accumulation_steps": 2}, "set engine.accumulate"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, 'optimizer.type="AdamW" .* set optim.name'),
        ({"scheduler": {"type": "WarmupLR"}}, "set optim.schedule"),
        ({"fp16": {"enabled": True}}, "use engine.precision=bf16"),
        ({"bf16": {"enabled": True, "check_grad_overflow": True}}, "set engine.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "summed in fp32"),
        ({"zero_optimization": {"sub_group_size": 1e9}}, "updated in one pass"),
        ({"zero_optimization": {"stage3_param_persistence_threshold": 1e5}}, "its average does not reach"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "its average does not reach"),
        ({"zero_optimization": {"memory_efficient_linear": True}}, "rounds otherwise"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 'offload_optimizer.device="cpu".*more ranks'),
        ({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}}, "offload_param.*more ranks"),
        ({"zero_optimization": {"cpu_offload": True}}, "more ranks"),
        ({"zero_optimization": {"contiguous_gradients": True}}, "contiguous_gradients=true cannot be.*needs false"),
        ({"activation_checkpointing": {"partition_activations": True}}, "set engine.checkpointing"),
        ({"zero_optimization": {"reduce_bucketsize": 1}}, "did you mean zero_optimization.reduce_bucket_size?"),
        ({"zero_optimization": {"prefetch_bucket_size": 1}}, "did you mean zero_optimization.stage3_prefetch_buck"),
        ({"quantum": 1}, "quantum is not a setting that fastdino hands to DeepSpeed: leave it out; it may set comm"),
        ({"zero_optimization": 3}, "zero_optimization=3 must be an object of settings"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size=0 must be a whole number, 1 or more"),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "must be a whole number"),
        ({"zero_optimization": {"stage3_max_reuse_distance": -1}}, "must be a whole number, 0 or more"),
        ({"zero_optimization": {"stage3_max_reuse_distance": math.inf}}, "=Infinity must be a whole number"),
        ({"zero_optimization": {"stage3_max_reuse_distance": math.nan}}, "=NaN must be a whole number"),
        ({"zero_optimization": {"stage3_max_reuse_distance": "big"}}, '="big" must be a whole number'),
        ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm=1 must be true or false"),
        ({"communication_data_type": "fp16"}, 'communication_data_type="fp16" must be one of bf16, fp32'),
        ({"communication_data_type": ["bf16"]}, "must be one of bf16, fp32"),
    ],
)
def test_what_fastdino_decides_is_refused_with_the_reason(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine.deepspeed=.*ds.json: .*{says}"):
        merge(tmp_path, json.dumps(content), stage=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON: "),
        ("", "is not JSON: "),
        ("[1]", "holds no object of settings"),
        ('{"bf16": {}, "bf16": {}}', "is not JSON: 'bf16' is in it twice"),
        ("\udcff", "is not JSON"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "ds.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=f"engine.deepspeed=.*ds.json {says}"):
        deepspeed_config(Config(engine=EngineConfig(deepspeed=tmp_path / "ds.json")), 1, bf16=False)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none.json", "there is no such file"), (tmp_path, "cannot be read: Is a dir")):
        with pytest.raises(ConfigError, match=says):
            deepspeed_config(Config(engine=EngineConfig(deepspeed=path)), 1, bf16=False)


def test_a_run_with_such_a_file_ends_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(ConfigError, match="offload_optimizer"):
        fastdino.train(tiny(tmp_path, engine__name="deepspeed", engine__deepspeed=tmp_path / "ds.json"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_names_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that it does not know would be taken and do nothing."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig.model_fields
    zero_names = {field.alias or name for name, field in zero.items()}
    for setting in [*FREE, *REASONS]:
        section, _, key = setting.partition(".")
        if section == "zero_optimization":
            assert key in zero_names
    assert set(ours()["zero_optimization"]) <= zero_names
    comms = import_module("deepspeed.comm.config").CommsLoggerConfig.model_fields
    flops = vars(import_module("deepspeed.profiling.config").DeepSpeedFlopsProfilerConfig({}))
    for section, fields in {"comms_logger": comms, "flops_profiler": flops}.items():
        assert {s.partition(".")[2] for s in FREE if s.startswith(section)} <= set(fields)
    assert {kind for kind in FREE.values() if isinstance(kind, str)} == {SIZE, FLAG}
