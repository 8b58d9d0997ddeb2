"""``fastdino plan``: what it advises, what it refuses, and how it says so."""

import dataclasses
import json
from typing import Any

import pytest

from fastdino import cli, recipes
from fastdino.config import Config, ConfigError
from fastdino.planning.footprint import Layout
from fastdino.planning.plan import Plan, smallest, ways

VITG = recipes.get("dinov2_vit_giant_14")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``fastdino plan`` in this process: what it prints, or its message where it ends with 2."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object, code: int = 0) -> str:
        ended: Any = 0
        try:
            cli.main(["plan", *map(str, arguments)])
        except SystemExit as end:
            ended = end.code or 0
        printed = capfd.readouterr()
        assert ended == code, printed.err
        if code:
            assert len(printed.err.strip().splitlines()) == 1, "one message"
            assert printed.out == ""
        return printed.err if code else printed.out

    return call


def advised(config: Config, gpus: int, gpu_memory: float) -> tuple[int, str]:
    chosen = Plan(gpus=gpus, gpu_memory=gpu_memory)(config).chosen
    return chosen.stage, chosen.checkpointing


def batch(config: Config, images: int, **engine: Any) -> Config:
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, local_batch=images),
        engine=dataclasses.replace(config.engine, **engine),
    )


def test_the_cheapest_that_fits() -> None:
    """By what is computed again, then by stage; stage 3 last."""
    assert advised(VITG, 64, 80) == (0, "none")
    assert advised(VITG, 64, 50) == (1, "none")
    assert advised(VITG, 64, 30) == (2, "none")
    assert advised(VITG, 64, 24) == (1, "selective")
    assert advised(VITG, 64, 13) == (2, "full")
    assert advised(VITG, 64, 10) == (3, "full")
    assert advised(recipes.get("vit_small_16"), 1, 80) == (0, "none")


def test_what_is_set_is_the_only_one_tried() -> None:
    assert advised(batch(VITG, 12, zero_stage=3), 64, 80) == (3, "none")
    assert advised(batch(VITG, 12, checkpointing="full"), 64, 80) == (0, "full")
    for config in (batch(VITG, 12, name="torch"), batch(VITG, 12, zero_stage=0)):
        assert {way.stage for way in ways(config, Layout.of(config), 64)} == {0}
    resnet = recipes.get("resnet50")
    assert {way.checkpointing for way in ways(resnet, Layout.of(resnet), 8)} == {"none"}


def test_more_of_anything_takes_no_less() -> None:
    layout = Layout.of(VITG)
    few, many = ({(w.stage, w.checkpointing): w.bytes for w in ways(VITG, layout, gpus)} for gpus in (8, 64))
    larger = {(w.stage, w.checkpointing): w.bytes for w in ways(batch(VITG, 24), layout, 8)}
    for way, size in few.items():
        assert many[way] <= size < larger[way]
    for stage in range(4):
        assert few[stage, "none"] > few[stage, "selective"] > few[stage, "full"]
    for how in ("none", "selective", "full"):
        assert few[0, how] > few[1, how] > few[2, how] > few[3, how]


def test_the_smallest_number_that_fits() -> None:
    config = batch(VITG, 4)
    layout = Layout.of(config)
    found = smallest(config, layout, 12e9, 1)
    assert found is not None
    gpus, way = found
    assert way.bytes <= 12e9
    assert not [w for w in ways(config, layout, gpus - 1) if w.bytes <= 12e9], "one fewer does not"
    with pytest.raises(ConfigError, match=rf"Take {gpus} of them \(ZeRO {way.stage}, checkpointing "):
        Plan(gpus=2, gpu_memory=12e9 / 0.9e9)(config)


def test_it_prints_parts_and_reason(here: Any) -> None:
    said = here("dinov2_vit_giant_14", "--gpus", 64, "--gpu-memory", 50, "--global-batch", 768)
    assert "vit_giant2, 1,235 M parameters with heads, on 64 GPUs of 50 GB; 12 images each, 768 a step" in said
    assert "take --engine.zero-stage 1 --engine.checkpointing none" in said
    for part in ("masters", "moments", "teacher", "gradients", "weights", "activations", "logits", "allocator"):
        assert f"\n  {part}" in said
    assert "3 x all-gather" in said
    assert "40 GB/s: more than it computes, so the network is the limit" in said


def test_settings_are_those_of_train(here: Any) -> None:
    found = json.loads(here(
        "vit_small_16", "--model.arch", "vit_7b", "--run.local-batch", 4, "--engine.accumulate", 2, "--gpus", 256,
        "--json",
    ))  # fmt: skip
    assert (found["arch"], found["local_batch"], found["global_batch"]) == ("vit_7b", 4, 4 * 256 * 2)
    assert found["parameters"] > 6.7e9
    assert len(found["ways"]) == 12
    for way in found["ways"]:
        assert way["bytes"] == sum(way["parts"].values())
        assert way["fits"] == (way["bytes"] <= 0.9 * 80e9)
    sent = {stage: sum(part["bytes_per_gpu"] for part in parts) for stage, parts in found["sent"].items()}
    assert sent["2"] > 1.4 * sent["1"], "each micro batch's gradients"
    assert found["take"]["zero_stage"] == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["vit_small_17"], "no recipe 'vit_small_17': did you mean vit_small_16?"),
        (["vit_small_16", "--gpus", 0], "--gpus=0 must be 1 to 65536"),
        (["vit_small_16", "--gpu-memory", 0], "--gpu-memory=0.0 must be a positive number"),
        (["vit_small_16", "--gpu-memory", "nan"], "--gpu-memory=nan must be a positive number"),
        (["vit_small_16", "--global-batch", -1], "--global-batch=-1 must be a positive number of images"),
        (["vit_small_16", "--gpus", 6, "--global-batch", 100], "no multiple of 6 GPUs times engine.accumulate=1: "
         "use 96 or 102"),
        (["vit_small_16", "--gpus", 6, "--global-batch", 4], "use 6"),
        (["dinov2_vit_giant_14", "--gpu-memory", 8], "Take 16 of them (ZeRO 3, checkpointing full), or lower "
         "run.local_batch"),
        (["vit_small_16", "--gpu-memory", 3, "--run.local-batch", 2000], "More GPUs do not help: lower"),
        (["vit_small_16", "--model.arch", "timm:nothing"], "timm has no such model"),
        (["vit_small_16", "--engine.deepspeed", "/no/such.json"], "engine.deepspeed=/no/such.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_message(here: Any, flags: list[object], said: str) -> None:
    assert said in here(*flags, code=2)


def test_help_teaches(here: Any) -> None:
    page = " ".join(here("vit_small_16", "--help").replace("\u2502", " ").split())
    assert "1 masters, moments and the teacher's average" in page
    assert "Of each GPU, in GB of 1e9 bytes" in page
    assert "--views.num-local" in page, "settings are flags here too"
