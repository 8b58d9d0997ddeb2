"""data.views=device: decoded images in slots, whose views the device makes; here by the kernels' plain-torch twin."""

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastdino
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.data import FolderSource, ShapesSource, Source
from fastdino.data.makers import Decoded
from fastdino.data.sampler import Plan
from fastdino.data.views import device, normalize
from fastdino.data.workers import Tensors, WorkerDied
from fastdino.training.export import export_run
from tests.data.batches import assert_equal, make_config, start, take

MEAN, WORST = 0.25, 1.0  # gray levels that views may be off, over all and in any


def on_device(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, views="device", **changes))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """JPEG in colour and in gray, PNG with and without alpha, of many sizes, one of a single pixel."""
    rng = np.random.default_rng(0)
    for i in range(20):
        height, width = (int(side) for side in rng.integers(20, 130, 2))
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        kind = ("RGB", "RGB", "L", "RGBA")[i % 4]
        image.convert(kind).save(tmp_path / f"{i:02d}.{'png' if kind == 'RGBA' or i % 8 == 1 else 'jpg'}", quality=90)
    Image.new("RGB", (1, 1), (9, 200, 30)).save(tmp_path / "one.png")
    Image.new("RGB", (1, 90), (90, 20, 30)).save(tmp_path / "thin.png")
    return tmp_path


def test_views_are_those_of_the_reference(pictures: Path) -> None:
    source, config = FolderSource(pictures), make_config(0)
    config = dataclasses.replace(config, views=dataclasses.replace(config.views, rotate=20.0))
    got, want = take(10, on_device(config), source), take(10, config, source)
    off = [
        (a.views[name].float() - b.views[name].float()).abs().mean((2, 3, 4))
        for a, b in zip(got, want, strict=True)
        for name in b.views
    ]
    assert torch.cat([x.flatten() for x in off]).mean() <= MEAN
    assert max(x.max() for x in off) <= WORST
    assert max(x.max() for x in off) > 0, "they are the reference's own"


@pytest.mark.parametrize("num_workers", [1, 2, 9])
def test_workers_change_nothing(pictures: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    source = FolderSource(pictures)
    config = make_config(num_workers, local_batch=6)
    assert_equal(take(9, on_device(config), source), take(9, on_device(make_config(local_batch=6)), source))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_any_step_continues_exactly(pictures: Path, num_workers: int) -> None:
    source, config = FolderSource(pictures), on_device(make_config(num_workers, local_batch=2, accumulate=2))
    whole = take(24, config, source)
    for step in (1, 5, 6):
        assert_equal(take(24 - 2 * step, config, source, step=step), whole[2 * step :])


def test_masks_are_those_of_the_other_implementations(shapes: ShapesSource) -> None:
    config = make_config(2)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, patch_weight=1.0))
    for got, want in zip(take(3, on_device(config), shapes), take(3, config, shapes), strict=True):
        assert got.masks is not None
        assert want.masks is not None
        assert all(torch.equal(a, b) for a, b in zip(got.masks, want.masks, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_same_one(pictures: Path, num_workers: int) -> None:
    """Of one the header is right, so that it begins to be decoded into the slot."""
    whole = (pictures / "04.jpg").read_bytes()
    (pictures / "04.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "05.jpg").write_bytes(b"")
    source = FolderSource(pictures)
    got, want = take(10, on_device(make_config(num_workers)), source), take(10, make_config(), source)
    assert [batch.bad for batch in got] == [batch.bad for batch in want]
    assert sum(len(batch.bad) for batch in got) >= 4
    off = [(a.views["global"].float() - b.views["global"].float()).abs().mean() for a, b in zip(got, want, strict=True)]
    assert max(off) <= WORST


def test_a_large_image_is_reduced_and_told(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = FolderSource(pictures)
    batches = start(on_device(make_config(2, local_batch=11), max_side=64), source)
    got = list(islice(batches, 2))
    sizes = [max(source.read(index)[0].shape) for index in range(len(source))]
    assert batches.num_reduced == sum(size > 64 for size in sizes) > 3
    assert caplog.text.count("images longer than data.max_side") == 1
    assert f"{batches.num_reduced} images of an epoch on this rank were longer" in caplog.text
    batches.close()
    want = take(2, on_device(make_config(local_batch=11)), source)
    off = [(a.views["global"].float() - b.views["global"].float()).abs().mean() for a, b in zip(got, want, strict=True)]
    assert 0 < max(off) < 20, "another picture"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_much_memory_is_one_message(num_workers: int) -> None:
    """3.3 terabytes."""
    config = on_device(make_config(num_workers, local_batch=4096), max_side=16384)
    with pytest.raises(WorkerDied, match=r"memory ran out.* data\.max_side"):
        next(start(config, ShapesSource(4096, 8)))


@pytest.mark.parametrize(("size", "want"), [((400, 100), (64, 16)), ((64, 64), (64, 64)), ((3, 900), (1, 64))])
def test_reduced_keeps_the_ratio(size: tuple[int, int], want: tuple[int, int]) -> None:
    image = np.full((size[1], size[0], 3), 77, np.uint8)
    found = device.reduced(image, 64)
    assert found.shape == (want[1], want[0], 3)
    assert np.unique(found).tolist() == [77]


def made(source: Source, config: Config, keys: list[tuple[int, int]], poison: int) -> tuple[Decoded, Tensors]:
    maker = Decoded(config, source)
    out = {name: torch.full(shape, poison).to(dtype) for name, (shape, dtype) in maker.fields.items()}
    maker.prepare(out, keys)
    for first in range(0, len(keys), 4):
        assert not any(maker.make(out, first, keys[first : first + 4], lambda _: None))
    return maker, out


def test_nothing_of_an_earlier_batch_is_seen(pictures: Path) -> None:
    source, config = FolderSource(pictures), on_device(make_config(local_batch=8), max_side=150)
    keys = [(0, index) for index in range(8)]
    views = []
    for poison in (0, 1):
        maker, out = made(source, config, keys, poison)
        views.append(maker.views(maker.upload(out, torch.device("cpu"))))
    assert all(torch.equal(views[0][name], views[1][name]) for name in views[0])


def test_images_lie_back_to_back_and_are_uploaded_in_few_pieces(pictures: Path) -> None:
    source, config = FolderSource(pictures), on_device(make_config(local_batch=8), max_side=150)
    maker, out = made(source, config, [(0, index) for index in range(8)], poison=0)
    images = [source.read(index)[0] for index in range(8)]
    starts = out["starts"].tolist()
    assert starts[::4] == [0, 4 * maker.room]
    for place, image in enumerate(images):
        assert starts[place] % 16 == 0
        assert starts[place] + image.size == out["ends"][place]
        assert np.array_equal(out["pixels"].numpy()[starts[place] :][: image.size].reshape(image.shape), image)
    uploaded = maker.upload(out, torch.device("cpu"))
    assert len(uploaded["pixels"]) == sum(device.aligned(image.size) for image in images)
    for place, image in enumerate(images):
        start = int(uploaded["starts"][place])
        assert np.array_equal(uploaded["pixels"].numpy()[start:][: image.size].reshape(image.shape), image)


def test_a_jpeg_is_decoded_where_it_is_wanted(pictures: Path) -> None:
    source, asked = FolderSource(pictures), list[np.ndarray]()

    def room(height: int, width: int) -> np.ndarray:
        asked.append(np.zeros((height, width, 3), np.uint8))
        return asked[-1]

    image, _ = source.read(0, room)
    assert np.shares_memory(image, asked[0])
    assert np.array_equal(image, source.read(0)[0])
    gray = next(i for i in range(len(source)) if source.name(i) == "02.jpg")
    image, _ = source.read(gray, room)
    assert len(asked) == 1, "Pillow decodes gray, into memory of its own"
    assert np.array_equal(source.read(0, lambda height, width: None)[0], source.read(0)[0])


def test_a_step_in_bf16_is_given_what_it_would_make_of_the_bytes(pictures: Path) -> None:
    source, config = FolderSource(pictures), on_device(make_config())
    lower = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
    for got, plain in zip(take(3, lower, source), take(3, config, source), strict=True):
        for name, views in plain.views.items():
            wanted = normalize(views, "imagenet").to(torch.bfloat16).flatten(0, 1)
            patches = torch.nn.functional.unfold(wanted.float(), 8, stride=8).mT.to(torch.bfloat16)
            assert torch.equal(got.views[name].flatten(0, 1), patches)
    for change in (
        {"data": dataclasses.replace(lower.data, normalize="image")},
        {"model": ModelConfig(arch="timm:resnet18")},
    ):
        assert next(start(dataclasses.replace(lower, **change), source)).views["global"].dtype == torch.uint8


def test_other_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.views='device' .* data.channels=4"):
        dataclasses.replace(
            Config(), data=dataclasses.replace(Config().data, channels=4, views="device", normalize="image"),
            views=dataclasses.replace(Config().views, jitter=0.0, grayscale=0.0),
        )  # fmt: skip


def test_the_plan_is_that_of_every_implementation(pictures: Path) -> None:
    """The images of a batch, and the draws of their views, whatever makes them."""
    config, source = on_device(make_config()), FolderSource(pictures)
    keys = next(Plan(num_images=len(source), local_batch=4, world_size=1, seed=3).micro_batches(0, 0))
    maker, out = made(source, config, keys, poison=0)
    views = maker.views(maker.upload(out, torch.device("cpu")))
    batch = next(start(config, source))
    assert all(torch.equal(batch.views[name], views[name]) for name in views)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(pictures: Path, num_workers: int) -> None:
    """While the GPU is busy with earlier batches, and slots are written again; a weight in fp16 moves a byte by one."""
    gpu, source = torch.device("cuda", torch.cuda.current_device()), FolderSource(pictures)
    busy, found = torch.randn(2048, 2048, device=gpu), []
    config = on_device(make_config(num_workers))
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))  # as on a GPU
    batches = start(config, source, device=gpu)
    for batch in islice(batches, 15):
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ busy)
        found.append({name: group.clone() for name, group in batch.views.items()})
        del batch
    batches.close()
    for views, want in zip(found, take(15, config, source), strict=True):
        for name, group in want.views.items():
            off = (views[name].cpu().float() - group.float()).abs().mean().item()
            assert off < 0.1 / 57, f"{name}: {off * 57:.3f} gray levels"  # 57: their deviation in ImageNet


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_resumed_exactly(tmp_path: Path, precision: Literal["fp32", "bf16"]) -> None:
    """Through the trainer, with another number of workers."""
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    for i in range(16):
        image = Image.fromarray(rng.integers(0, 256, (50 + i, 60, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{i:02d}.jpg")

    def run(name: str, epochs: int, num_workers: int) -> dict[str, torch.Tensor]:
        config = Config(
            model=ModelConfig(arch="vit_nano", patch_size=8),
            head=HeadConfig(num_prototypes=32, hidden_dim=32, bottleneck_dim=16),
            views=ViewsConfig(global_size=32, local_size=16, num_local=2),
            data=DataConfig(root=str(tmp_path / "images"), num_workers=num_workers, views="device", max_side=64),
            optim=OptimConfig(warmup_epochs=0, schedule="constant"),
            engine=EngineConfig(name="torch", device="cpu", precision=precision),
            run=RunConfig(dir=tmp_path / name, epochs=epochs, local_batch=8, log_every=1, knn_every=0),
        )
        fastdino.train(config)
        return load_file(export_run(config.run.dir))

    whole = run("whole", 2, 0)
    run("halves", 1, 1)
    resumed = run("halves", 2, 2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
