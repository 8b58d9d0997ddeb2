"""A step's FLOPs: the closed form is what torch counts of a real network of every kind, and what others count."""

import dataclasses
from mmap import mmap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.workload import nano_config, random_batch
from fastdino import recipes
from fastdino.config import Config, PatchHeadConfig
from fastdino.distributed import Ranks
from fastdino.model import Outputs, build_network, vit
from fastdino.model.block import Block
from fastdino.model.packing import Drop, Packing, Reading
from fastdino.model.positions import Rotation
from fastdino.model.vit import SIZES, Shape
from fastdino.training import flops
from fastdino.training.flops import Meter, matmul_flops, peak_memory, published_peak, reset_peak_memory, step_flops

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)


def changed(**groups: Any) -> Config:
    """bench's smallest step; group={setting: value}, or group=value."""
    config = nano_config(engine="torch")
    values = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **values)


PATCHES = {"loss": {"patch_weight": 1.0}}
OWN_HEAD = PatchHeadConfig(num_prototypes=96, hidden_dim=48, bottleneck_dim=24, num_layers=2)
UNIFORM = {"drop_path": 0.3, "drop_path_rule": "uniform"}
KINDS = {
    "plain": changed(),
    "no local views": changed(views={"num_local": 0}),
    "other sizes": changed(views={"global_size": 48, "local_size": 24, "num_local": 3}, run={"local_batch": 3}),
    "registers": changed(model={"registers": 4}),
    "rope": changed(model={"pos_embed": "rope"}),
    "five channels": changed(
        data={"channels": 5, "normalize": "image"}, views={"jitter": 0.0, "grayscale": 0.0, "num_local": 2}
    ),
    "one linear layer": changed(head={"num_layers": 1}),
    "drop path by chance": changed(model={"drop_path": 0.3}),
    "drop path on subsets": changed(model=UNIFORM, run={"local_batch": 5}),
    "patches, one head": changed(**PATCHES),
    "patches, own head": changed(**PATCHES, patch_head=OWN_HEAD, run={"local_batch": 16}),
    "an odd batch of patches": changed(**PATCHES, run={"local_batch": 6}),
    "accumulation": changed(engine={"accumulate": 3}),
    "timm, convolutions": changed(model={"arch": "timm:resnet10t"}),
    "timm, attention": changed(model={"arch": "timm:vit_tiny_patch16_224", "drop_path": 0.0}),
}


@pytest.fixture
def _as_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block computes all tokens, of which some are read. Positions are cut to size without the product that
    resamples them once for all images."""
    original = Block.forward

    def forward(
        self: Block,
        x: Tensor,
        packing: Packing,
        rotation: Rotation | None = None,
        reading: Reading | None = None,
        drops: tuple[Drop, Drop] = (None, None),
    ) -> Tensor:
        # What is dropped is multiplied by 0, which takes no product of matrices.
        whole = original(self, x, packing, rotation, None, drops if reading is None else (None, None))
        return whole if reading is None else whole.index_select(1, reading.rows)

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(vit, "resample_positions", lambda positions, matrix: positions[:, : len(matrix)])


def counted(config: Config) -> int:
    """What torch counts of student and teacher, forward and backward, with all logits that the losses define."""
    student, teacher = (build_network(config, teacher=role == "teacher") for role in ("student", "teacher"))
    total = 0
    for seed in range(config.engine.accumulate):
        batch = random_batch(config, CPU, seed)
        views = {name: group.float() for name, group in batch.views.items()}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                masks = batch.masks and batch.masks._replace(hidden=None)
                logits(teacher({"global": views["global"]}, masks))
            logits(student(views, batch.masks)).backward()
        total += counter.get_total_flops()
    return total


def logits(made: Outputs) -> Tensor:
    patches = F.linear(made.patch_points, made.patch_prototypes) if len(made.patches) else made.patches
    return F.linear(made.cls_points, made.prototypes).sum() + patches.sum()


@pytest.mark.usefixtures("_as_defined")
@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_what_torch_counts(kind: str) -> None:
    assert step_flops(KINDS[kind]) == counted(KINDS[kind])


@pytest.mark.usefixtures("_as_defined")
def test_a_gated_mlp_has_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a network as small as the others: published ones are large."""
    monkeypatch.setitem(SIZES, "nano", Shape(96, 4, 4, 256, swiglu=True))
    assert step_flops(KINDS["plain"]) == counted(KINDS["plain"])


def test_the_last_block_does_less_than_is_defined() -> None:
    """Its definition counts, whatever it leaves out: else a change of code would change a model's MFU."""
    config = KINDS["plain"]
    assert 0.7 < counted(config) / step_flops(config) < 0.95


@pytest.mark.parametrize(
    ("recipe", "num_local", "drop_path", "billions"),
    [
        ("vit_small_16", 10, 0.1, 123),
        ("vit_base_16", 10, 0.1, 473),
        ("dinov2_vit_large_16", 8, 0.3, 1150),
        ("dinov2_vit_large_16", 8, 0.0, 1537),
    ],
)
def test_published_configs_cost_what_others_count(
    recipe: str, num_local: int, drop_path: float, billions: float
) -> None:
    """Of an image, without the losses on patches, which the figures leave out."""
    config = recipes.get(recipe)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, drop_path=drop_path),
        views=dataclasses.replace(config.views, num_local=num_local),
        loss=dataclasses.replace(config.loss, patch_weight=0.0),
    )
    assert step_flops(config) / config.run.local_batch / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "auto", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("Radeon", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_device_and_of_the_precision(
    name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config = changed(engine={"precision": precision, "device": "auto"})
    assert published_peak(config, torch.device("cuda", 0)) == peak
    assert published_peak(config, CPU) is None


def test_a_meter_says_what_a_device_makes_of_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(engine={"accumulate": 2})
    unknown = Meter.of(config, Ranks(0, 4, 0, CPU))(100.0)
    figures = {"images_per_second_per_device", "memory_gb", "peak_memory_gb"}
    assert unknown.keys() == figures, "no MFU, not one of 0"
    monkeypatch.setattr(flops, "published_peak", lambda config, device: 1e12)
    known = Meter.of(config, Ranks(0, 4, 0, CPU))(100.0)
    assert known["images_per_second_per_device"] == 25.0
    assert known["mfu"] == pytest.approx(25.0 * step_flops(config) / 8 / 1e12)


def test_the_rate_of_products_is_that_of_the_clock() -> None:
    times = iter([9.0, 9.0, 4.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    assert matmul_flops(CPU, torch.float32, lambda work: next(times)) == 2 * 1024**3 / 2.0


def test_memory_of_a_process_is_now_and_at_most() -> None:
    page = bytes(2**12)
    before, kept = flops.memory(CPU)["memory_gb"], mmap(-1, 2**27)  # a tensor may get what others left
    for _ in range(2**15):
        kept.write(page)
    now = flops.memory(CPU)
    assert now["memory_gb"] - before == pytest.approx(2**27 / 1e9, abs=0.02)
    kept.close()
    assert flops.memory(CPU)["memory_gb"] < now["memory_gb"] - 0.1
    assert flops.memory(CPU)["peak_memory_gb"] >= now["memory_gb"] - 0.02


@pytest.mark.gpu
def test_memory_of_a_gpu_has_what_the_allocator_holds() -> None:
    device = torch.device("cuda", 0)
    kept = torch.ones(2**20, device=device)
    found = flops.memory(device)
    assert kept.nbytes / 1e9 <= found["memory_gb"] <= found["peak_memory_gb"]
    assert found["memory_gb"] <= found["reserved_memory_gb"]
    assert found["alloc_retries"] >= 0


def test_peak_memory_begins_anew() -> None:
    big = torch.frombuffer(mmap(-1, 200_000_000), dtype=torch.uint8).fill_(1)  # pages that go back, unlike the heap's
    high = peak_memory(CPU)
    del big
    reset_peak_memory(CPU)
    assert 0 < peak_memory(CPU) < high - 100_000_000
