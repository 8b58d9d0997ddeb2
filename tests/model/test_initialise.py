"""How parameters start: ranges, statistics, a rule for each parameter, and models that are names and shapes alone."""

import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdino.config import Config, HeadConfig, LossConfig, ModelConfig, PatchHeadConfig, RunConfig, ViewsConfig
from fastdino.model import ViT, build_network, export_backbone, initialise, outline, start_of
from fastdino.model.initialise import constant, held, rules_of, table, trunc_normal, uniform, values
from fastdino.model.vit import SIZES
from fastdino.model.weights.files import load_backbone

N = 70_001
RULES = {
    "constant": constant(0.25),
    "uniform": uniform(0.1),
    "trunc_normal": trunc_normal(0.02),
    "table": table(lambda: torch.arange(N).float()),
    "held": held([torch.arange(9.0).view(3, 3).T, torch.arange(N - 9).bfloat16()]),
}
V2: dict[str, Any] = {"registers": 4, "layer_scale": 1e-5}


def config(arch: str = "vit_nano", seed: int = 0, **options: Any) -> Config:
    small = {"num_prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8}
    return Config(
        model=ModelConfig(arch=arch, **options),
        head=HeadConfig(**small, batch_norm=True),
        patch_head=PatchHeadConfig(**small),
        loss=LossConfig(patch_weight=1.0),
        views=ViewsConfig(global_size=64, local_size=32),
        run=RunConfig(seed=seed),
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_range_is_that_slice_of_the_whole(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, however much of it is made at a time, and by how many threads."""
    whole = values(3, "x", 0, N, RULES[rule])
    ranges = [(0, 1), (1, 2), (7, 8), (3, 501), (9, 40_000), (65_535, 65_537), (65_536, N), (N - 1, N), (5, 5)]
    for threads, chunk in ((1, 2**16), (1, 24), (3, 512)):
        monkeypatch.setattr(initialise, "CHUNK", chunk)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for start, stop in ranges:
            assert torch.equal(values(3, "x", start, stop, RULES[rule]), whole[start:stop]), (start, stop)


def test_values_are_the_same_on_every_processor() -> None:
    """To the bit, and of every version: a run's start is its seed."""
    made = [values(0, "a.weight", 5, 1000, RULES[name]) for name in ("uniform", "trunc_normal")]
    assert [zlib.crc32(x.numpy().tobytes()) for x in made] == [1127710276, 2549875765]


def test_statistics() -> None:
    n = 2**20
    made = values(0, "x", 0, n, trunc_normal(0.02)).double()
    assert abs(made.mean().item()) < 4 * 0.02 / n**0.5
    assert made.std().item() == pytest.approx(0.02, rel=0.002)
    bound = 2 * 0.02 / initialise.DEVIATION
    assert bound * 0.9999 < made.abs().max().item() <= bound * 1.00001
    made = values(0, "x", 0, n, uniform(0.1)).double()
    assert abs(made.mean().item()) < 4 * 0.1 / (3 * n) ** 0.5
    assert made.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.002)
    assert 0.0999 < made.abs().max().item() <= 0.1
    assert (values(0, "x", 0, 99, constant(0.25)) == 0.25).all()


def test_the_rational_function_is_the_inverse_of_the_normal_distribution() -> None:
    noise = values(0, "x", 0, N, uniform(0.5)).double()
    want = torch.erfinv(2 * noise * math.erf(2**0.5)) * 2**0.5
    found = values(0, "x", 0, N, trunc_normal(initialise.DEVIATION)).double()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_names_and_seeds_have_noise_of_their_own() -> None:
    made = [values(seed, name, 0, N, uniform(1.0)) for seed, name in ((0, "a"), (0, "b"), (1, "a"), (0, "ab"))]
    correlation = torch.corrcoef(torch.stack(made)) - torch.eye(4)
    assert correlation.abs().max().item() < 5 / N**0.5


OPTIONS: list[dict[str, Any]] = [
    {}, V2, {"pos_embed": "rope"}, {"pos_embed": "sincos", "init": "xavier"},
    {**V2, "pos_embed": "rope", "patch_size": 8},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_has_a_rule(size: str, options: dict[str, Any]) -> None:
    network = outline(config(f"vit_{size}", **options))
    assert all(p.is_meta for p in network.parameters())
    assert rules_of(network).keys() == {name for name, _ in network.named_parameters()}
    assert not any(buffer.is_meta for buffer in network.buffers())


def test_a_parameter_without_a_rule_is_named() -> None:
    network = outline(config())
    with torch.device("meta"):
        network.backbone.extra = nn.Parameter(torch.empty(3))
    with pytest.raises(AssertionError, match=r"no module says how these start: backbone\.extra"):
        start_of(config(), network)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_networks_start_by_their_rules(options: dict[str, Any]) -> None:
    """Whole, as student, as teacher, and as a backbone alone; the teacher in the student's values."""
    settings = config(seed=3, **options)
    student, teacher = (build_network(settings, teacher) for teacher in (False, True))
    start = start_of(settings, outline(settings))
    for name, param in student.named_parameters():
        assert torch.equal(param.flatten(), start(name, 0, param.numel())), name
        assert torch.equal(param, teacher.get_parameter(name))
        assert not teacher.get_parameter(name).requires_grad
    assert not student.head.last_layer.g.requires_grad
    assert student.backbone.mask_token.requires_grad
    assert all(module.running_var.eq(1).all() for module in student.modules() if isinstance(module, nn.BatchNorm1d))
    alone, other = (ViT("nano", seed=seed, image_size=64, **options) for seed in (3, 4))
    for name, param in alone.named_parameters():
        assert torch.equal(param.flatten(), values(3, name, 0, param.numel(), rules_of(alone)[name])), name
    assert not torch.equal(alone.cls_token, other.cls_token)


def test_a_model_of_7_billion_is_outlined_at_once() -> None:
    started = time.process_time()
    network = outline(config("vit_7b", pos_embed="rope", **V2))
    shapes = {name: tuple(p.shape) for name, p in network.backbone.named_parameters()}
    assert time.process_time() - started < 2
    assert sum(math.prod(shape) for shape in shapes.values()) / 1e9 == pytest.approx(6.716, abs=0.001)
    assert shapes["blocks.39.mlp.w12.weight"] == (16384, 4096)
    assert len(shapes) == 40 * 14 + 7


FILES: dict[str, Callable[[ViT, Path], object]] = {
    "safetensors": lambda vit, path: export_backbone(vit, path / "a.safetensors"),
    "hf": lambda vit, path: export_backbone(vit, path, format="hf"),
    "archive": lambda vit, path: torch.save(vit.state_dict(), path / "a.pth"),
    "old": lambda vit, path: torch.save(vit.state_dict(), path / "a.pth", _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_read_by_slices(kind: str, tmp_path: Path) -> None:
    """Any range of a parameter is that of the loaded network, in dialects that have several tensors for one, too."""
    vit = ViT("small_plus", seed=1, image_size=64, mask_token=True, pos_embed="rope", **V2)
    folder = tmp_path / "a"
    if kind != "hf":
        folder.mkdir()
    FILES[kind](vit, folder)
    path = folder if kind == "hf" else next(folder.iterdir())
    options = {**V2, "pos_embed": "rope"}
    settings = config("vit_small_plus", weights=path, **options)
    start = start_of(settings, outline(settings))
    want = ViT("small_plus", seed=2, image_size=64, mask_token=True, **options)
    load_backbone(want, path)
    for name, param in want.named_parameters():
        assert torch.equal(param, vit.get_parameter(name)), name
        low, high = param.numel() // 3, param.numel() - param.numel() // 5
        assert torch.equal(start(f"backbone.{name}", low, high), param.flatten()[low:high]), name


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    """Memory of a process that holds one parameter of many, each of which is several tensors in the file."""
    vit = ViT("small_plus", image_size=64, mask_token=True, pos_embed="rope", **V2)
    export_backbone(vit, tmp_path / "a", format="hf")
    settings = config("vit_small_plus", weights=tmp_path / "a", pos_embed="rope", **V2)
    network, size = outline(settings), sum(p.nbytes for p in vit.parameters())
    before = resident()
    start = start_of(settings, network)
    start("backbone.blocks.3.mlp.w12.weight", 0, 100_000)
    assert resident() - before < size / 4


def resident() -> int:
    """Bytes of this process that are its own, no pages of a file."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])
