"""What a plan says of a step, beside what real steps keep and send."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.counters import kernels_counted, saved_bytes
from bench.workload import nano_dinov2, random_batch
from fastdino import recipes
from fastdino.config import Config
from fastdino.model import build_network
from fastdino.planning import footprint
from fastdino.planning.footprint import Layout
from tests.engine import footprint_cases
from tests.engine.footprint_cases import ALONE, BUCKET, ENGINES, KEPT, V1, V2
from tests.engine.test_engine import launch
from tests.engine.zero3_cases import TIMM

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of footprint_cases.py by world size."""
    folder = tmp_path_factory.mktemp("footprint")
    for size in (1, 2):
        launch(footprint_cases.main, folder / f"{size}.pt", ranks=size, builds=folder / "builds")
    return {size: torch.load(folder / f"{size}.pt") for size in (1, 2)}


def changed(config: Config, engine: str, **settings: Any) -> tuple[Config, int]:
    """``config`` as a case has it, and its stage."""
    name, stage = ("torch", 0) if engine == "torch" else ("deepspeed", int(engine[-1]))
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, name=name, **settings)), stage


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", KEPT)
@WORLD_SIZES
def test_what_stays(results: Any, world_size: int, name: str, engine: str) -> None:
    config, stage = changed(KEPT[name], engine, precision=name.split()[1])
    found = results[world_size][f"kept {name}/{engine}"]
    planned = footprint.states(config, Layout.of(config), stage, world_size)
    assert sum(planned.values()) == pytest.approx(found["total"], rel=0.01)
    assert planned["masters"] == found["masters"]
    assert planned["moments"] == found["moments"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["v1", "v2", "twice", "small"])
def test_what_is_sent(results: Any, tmp_path: Path, case: str, engine: str) -> None:
    """Calls, elements and bytes of every kind; stage 3's gathers as its prefetch goes, and never more of them."""
    if (case, engine) == ("small", "torch"):
        pytest.skip("plain torch has no buckets")
    settings: dict[str, Any] = {"precision": "bf16"}
    if case == "twice":
        settings["accumulate"] = 2
    if case == "small":
        settings["deepspeed"] = tmp_path / "ds.json"
        settings["deepspeed"].write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
    config, stage = changed(V2 if case in ("v2", "twice") else V1, engine, **settings)
    planned: dict[str, Counter[str]] = {}
    for part in footprint.traffic(config, Layout.of(config), stage, ranks=2):
        total = planned.setdefault(part.kind, Counter())
        total.update(calls=part.calls, elements=part.elements, bytes=part.elements * part.size)
    found = {kind: dict(zip(("calls", "elements", "bytes"), x, strict=True)) for kind, x in
             results[2][f"sent {case}/{engine}"].items()}  # fmt: skip
    assert planned.keys() == found.keys()
    for kind, total in planned.items():
        gathers = stage == 3 and kind == "all-gather"
        assert total["bytes"] == pytest.approx(found[kind]["bytes"], rel=0.06 if gathers else 0), kind
        assert total["elements"] == pytest.approx(found[kind]["elements"], rel=0.06 if gathers else 0), kind
        assert total["bytes"] >= found[kind]["bytes"]
        assert total["calls"] == pytest.approx(found[kind]["calls"], rel=0.2 if gathers else 0), kind


def test_one_gpu_sends_nothing(results: Any) -> None:
    assert footprint.traffic(V1, Layout.of(V1), 1, ranks=1) == []
    for engine in ALONE:
        assert "all-gather" not in results[1][f"sent v1/{engine}"]


def test_rings() -> None:
    """An all-reduce is a reduce-scatter and an all-gather, of which each GPU sends all but its own part."""
    reduced = footprint.Sent("gradients", "all-reduce", 1, elements=800, size=2)
    assert reduced.per_gpu(8) == 2 * 7 * 100 * 2
    assert dataclasses.replace(reduced, kind="all-gather").per_gpu(8) == 7 * 100 * 2


BASE = recipes.get("vit_small_16")
BASE = dataclasses.replace(
    BASE,
    model=dataclasses.replace(BASE.model, attention="sdpa"),
    engine=dataclasses.replace(BASE.engine, precision="bf16"),
    views=dataclasses.replace(BASE.views, num_local=4),
    run=dataclasses.replace(BASE.run, local_batch=2),
)
DINOV2 = nano_dinov2(BASE, sinkhorn=False)  # subsets, masks, LayerScale, registers
ARCHS = {
    "tiny": dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, arch="vit_tiny")),
    "swiglu, rope": dataclasses.replace(
        BASE, model=dataclasses.replace(BASE.model, arch="vit_small_plus", pos_embed="rope", layer_scale=1e-5)
    ),
    "dinov2": dataclasses.replace(DINOV2, model=dataclasses.replace(DINOV2.model, arch="vit_small")),
}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("arch", ARCHS)
def test_what_the_backbone_keeps(arch: str, checkpointing: str) -> None:
    """Beside what autograd keeps on the path of a GPU."""
    config, _ = changed(ARCHS[arch], "zero1", checkpointing=checkpointing)
    backbone = build_network(config, load=False).backbone.bfloat16()
    batch = random_batch(config, torch.device("cpu"), 0)
    views = {name: view.bfloat16() for name, view in batch.views.items()}
    with kernels_counted(), saved_bytes() as saved:
        backbone(views, batch.masks)
        assert footprint.kept(config) == pytest.approx(saved(), rel=0.03)


def test_what_a_backbone_of_timm_keeps() -> None:
    config, _ = changed(TIMM, "zero1", precision="bf16")
    backbone = build_network(config, load=False).backbone.bfloat16()
    found = 0
    for view in random_batch(config, torch.device("cpu"), 0).views.values():
        images = view.flatten(0, 1).bfloat16()
        with saved_bytes() as saved:
            backbone(images)
            found += saved()
    assert footprint.kept(config) == pytest.approx(found, rel=0.03)


def test_what_is_made_again_is_one_block() -> None:
    """All that checkpointing leaves out of a block, at most; nothing without."""
    none, selective, full = (changed(BASE, "zero1", checkpointing=how)[0] for how in ("none", "selective", "full"))
    assert footprint.remade(none) == 0 < footprint.remade(selective) < footprint.remade(full)
    assert footprint.kept(none) > 5 * footprint.activations(full)
