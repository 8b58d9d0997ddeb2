"""multi_crop: the kernels against their reference, step by step; tests/data holds the reference against Pillow."""

from collections.abc import Iterator
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels import multi_crop
from fastdino_kernels._backend import INTERPRETED
from fastdino_kernels.views import multi_crop as module
from fastdino_kernels.views.multi_crop import multi_crop_reference

DEVICE = "cpu" if INTERPRETED else "cuda"
JITTER = ("brightness", "contrast", "saturation", "hue")
NEUTRAL = {"flip": 0.0, "rotate": 0.0, "order": 0.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0,
           "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}  # fmt: skip
STEPS: dict[str, dict[str, float]] = {
    "crop": {},
    "flip": {"flip": 1},
    "rotate": {"rotate": 30},
    "brightness": {"brightness": 1.37},
    "darker": {"brightness": 0.6},
    "contrast": {"contrast": 1.4},
    "flatter": {"contrast": 0.55},
    "saturation": {"saturation": 1.8},
    "duller": {"saturation": 0.3},
    "hue": {"hue": 0.21},
    "hue back": {"hue": -0.43},
    "grayscale": {"grayscale": 1},
    "blur, 7 taps": {"blur": 0.7},
    "blur, 13 taps": {"blur": 2.0},
    "least blur": {"blur": 0.1},
    "solarize": {"solarize": 1},
    "blur and solarize": {"blur": 1.4, "solarize": 1},
    "contrast, grayscale, blur": {"contrast": 1.3, "grayscale": 1, "blur": 1.9},
    "rotate, contrast, solarize": {"rotate": -75, "contrast": 0.7, "solarize": 1, "flip": 1},
    "all": {"flip": 1, "rotate": 12, "order": 15, "brightness": 0.8, "contrast": 1.2, "saturation": 1.2, "hue": -0.08,
            "blur": 1.1, "solarize": 1},
}  # fmt: skip


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs, which the interpreter runs one after another."""
    original = module.launch_config

    def larger(size: int) -> Any:
        config = original(size)
        tile = {"ROWS": 64, "COLUMNS": 64}
        return {
            **config,
            "crop": {**config["crop"], **tile, "CHUNK_COLUMNS": 64},
            "rotate": {**config["rotate"], **tile},
        }

    if INTERPRETED:
        monkeypatch.setattr(module, "launch_config", larger)


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """uint8 (height, width, 3): noise over colours that change slowly, some of them saturated."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for height, width in sizes:
        coarse = torch.randint(-80, 336, (1, 3, 3, 4), generator=generator).float()
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        noise = torch.randint(-25, 26, (height, width, 3), generator=generator)
        found.append((smooth[0].permute(1, 2, 0) + noise).clamp(0, 255).to(torch.uint8))
    return found


def packed(pictures: list[Tensor], gap: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """pixels, starts, widths, with bytes between the images that no view may show."""
    starts, parts, end = [], [], 0
    for picture in pictures:
        parts += [torch.full((gap,), 123, dtype=torch.uint8), picture.flatten()]
        starts.append(end + gap)
        end += gap + picture.numel()
    widths = torch.tensor([picture.shape[1] for picture in pictures], dtype=torch.int32)
    return torch.cat(parts).to(DEVICE), torch.tensor(starts).to(DEVICE), widths.to(DEVICE)


def tables(views: list[list[dict[str, float]]], boxes: list[list[tuple[int, ...]]]) -> tuple[Tensor, Tensor, Tensor]:
    """boxes, params, turns of each image's views; what a view does not name does nothing."""
    params = torch.tensor([[[float("nan")] * 4 + list({**NEUTRAL, **view}.values()) for view in row] for row in views])
    radians = torch.deg2rad(params[..., 5])
    turns = torch.stack([radians.cos(), radians.sin()], -1)
    return torch.tensor(boxes, dtype=torch.int32).to(DEVICE), params.to(DEVICE), turns.to(DEVICE)


def judge(pictures: list[Tensor], views: list[list[dict[str, float]]], boxes: Any, size: int, rotates: bool) -> None:
    """Few bytes differ from the reference's by one: a weight in fp16, a rounding; where the hue turns, by a few."""
    source, (box, params, turns) = packed(pictures), tables(views, boxes)
    got = multi_crop(*source, box, params, turns if rotates else None, size)
    want = multi_crop_reference(*source, box, params, turns if rotates else None, size)
    assert got.shape == (box.shape[1], len(pictures), 3, size, size)
    assert got.dtype == torch.uint8
    off, faults = (got.int() - want.int()).abs(), []
    for v, b in product(range(box.shape[1]), range(len(pictures))):
        mean, most, view = off[v, b].float().mean().item(), int(off[v, b].max()), views[b][v]
        allowed = 0.15 if view.get("blur") else 0.03  # fp16 weights: by 1 / 8 before the byte is rounded
        if mean > allowed and abs(mean_luma(pictures[b], view, boxes[b][v], size) % 1 - 0.5) < 0.005:
            # Contrast starts from the mean rounded: a few bytes decide which way, and the whole view moves with it.
            allowed += abs(1 - view.get("contrast", 1)) * max(1, view.get("brightness", 1))
        if mean > allowed or (most > 8 and not view.get("hue")):
            faults.append(
                f"view {v} of image {b}, {boxes[b][v]} of {tuple(pictures[b].shape)} to {size} pixels, {view}: off by "
                f"{mean:.3f} gray levels where {allowed:.3f} are allowed, a byte by {most}"
            )
    assert not faults, "\n".join(faults)


def mean_luma(picture: Tensor, view: dict[str, float], box: tuple[int, ...], size: int) -> float:
    """Of the reference's view, as contrast finds it."""
    order = list(permutations(JITTER))[int(view.get("order", 0))]
    kept = ("flip", "rotate", "order", *order[: order.index("contrast")])
    before = {name: value for name, value in view.items() if name in kept}
    made = multi_crop_reference(*packed([picture]), *tables([[before]], [[box]]), size)
    return module._luma(made[0, 0].float()).double().mean().item()


@pytest.mark.parametrize("name", STEPS)
def test_each_step(name: str, large_tiles: None, poisoned_memory: None) -> None:
    step = STEPS[name]
    judge(images((50, 61)), [[step]], [[(3, 5, 55, 41)]], 33, rotates="rotate" in step)


def test_every_order_of_the_jitter(large_tiles: None, poisoned_memory: None) -> None:
    """Contrast needs the whole view, wherever in the order it comes."""
    jitter = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.5, "hue": 0.1}
    views: list[dict[str, float]] = [{**jitter, "order": float(k)} for k in range(24)]
    (picture,) = images((24, 31))
    judge([picture], [views], [[(0, 0, 31, 24)] * 24], 17, rotates=False)
    source, (box, params, _) = packed([picture]), tables([views], [[(0, 0, 31, 24)] * 24])
    found = multi_crop(*source, box, params, None, 17)
    assert len({tuple(view.flatten().tolist()) for view in found}) == 24, "two orders give one view"
    assert list(permutations(range(4)))[1] == (0, 1, 3, 2)  # what the index means


@pytest.mark.parametrize("shift", [0.21, -0.43, 0.5])
def test_the_hue_of_any_colour(shift: float, large_tiles: None) -> None:
    """Byte by byte, gray and saturated ones among them: where it wraps around the circle too."""
    picture = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    picture[:8, :, 1:] = picture[:8, :, :1]
    picture[8:16, :, 2], picture[16:24, :, 0] = 0, 255
    source, (box, params, _) = packed([picture]), tables([[{"hue": shift}]], [[(0, 0, 64, 64)]])
    off = (
        multi_crop(*source, box, params, None, 64).int() - multi_crop_reference(*source, box, params, None, 64)
    ).abs()
    assert off.max() <= 1
    assert off.float().mean() <= 1e-3


@pytest.mark.parametrize(
    ("image", "box", "size"),
    [
        ((1, 1), (0, 0, 1, 1), 20),
        ((3, 2), (0, 1, 2, 2), 33),
        ((40, 400), (7, 3, 391, 37), 16),
        ((300, 20), (19, 0, 1, 300), 18),
        ((64, 64), (32, 32, 32, 32), 32),
        ((90, 70), (0, 0, 70, 90), 7),
    ],
    ids=["one pixel", "enlarged", "wide", "a column", "as it is", "tiny"],
)
def test_boxes_of_any_shape(
    image: tuple[int, int], box: tuple[int, ...], size: int, large_tiles: None, poisoned_memory: None
) -> None:
    view = {"flip": 1.0, "blur": 1.0, "brightness": 0.9}
    judge(images(image), [[{}, view]], [[box, box]], size, rotates=False)


def test_a_box_of_its_size_is_copied() -> None:
    (picture,) = images((40, 50))
    source, (box, params, _) = packed([picture]), tables([[{}]], [[(11, 4, 32, 32)]])
    (view,) = multi_crop(*source, box, params, None, 32)
    assert torch.equal(view[0].cpu(), picture[4:36, 11:43].permute(2, 0, 1))


def test_several_tiles_as_launched(poisoned_memory: None) -> None:
    """Two images of other sizes, views of several programs in both directions, the last of them ragged."""
    first: list[dict[str, float]] = [
        {"flip": 1, "contrast": 1.4, "blur": 1.7},
        {"rotate": 20, "contrast": 0.6, "order": 9},
    ]
    second: list[dict[str, float]] = [{"rotate": -5, "blur": 0.6, "solarize": 1}, {"hue": 0.3, "grayscale": 1}]
    boxes = [[(2, 1, 70, 52), (0, 0, 80, 60)], [(5, 5, 30, 90), (0, 20, 41, 41)]]
    judge(images((60, 80), (100, 41)), [first, second], boxes, 53, rotates=True)


def test_a_blur_of_several_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    config = module.launch_config(40)
    small = {**config, "blur": {**config["blur"], "ROWS": 20, "STRIP": 16}}
    monkeypatch.setattr(module, "launch_config", lambda size: small)
    judge(images((40, 40)), [[{"blur": 2.0}]], [[(0, 0, 40, 40)]], 40, rotates=False)


def drawn() -> Iterator[tuple[list[Tensor], list[list[dict[str, float]]], list[list[tuple[int, ...]]], int]]:
    """What :func:`judge` takes: 64 images, first 2 views of 224 pixels of each, then 8 of 96, drawn at random."""
    generator = torch.Generator().manual_seed(1)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    pictures = images(*[(375, 500), (500, 333), (600, 800), (96, 96)] * 16)
    for num, size in ((2, 224), (8, 96)):
        views: list[list[dict[str, float]]] = []
        boxes: list[list[tuple[int, ...]]] = []
        for picture in pictures:
            height, width = picture.shape[:2]
            views.append([
                {"flip": float(uniform(0, 1) < 0.5), "rotate": uniform(-30, 30) * (uniform(0, 1) < 0.3),
                 "order": float(int(uniform(0, 24))), "brightness": uniform(0.6, 1.4), "contrast": uniform(0.6, 1.4),
                 "saturation": uniform(0.8, 1.2), "hue": uniform(-0.1, 0.1), "grayscale": float(uniform(0, 1) < 0.2),
                 "blur": uniform(0.1, 2) * (uniform(0, 1) < 0.5), "solarize": float(uniform(0, 1) < 0.2)}
                for _ in range(num)
            ])  # fmt: skip
            sides = [(int(uniform(1, width + 0.99)), int(uniform(1, height + 0.99))) for _ in range(num)]
            boxes.append([(int(uniform(0, width - w)), int(uniform(0, height - h)), w, h) for w, h in sides])
        yield pictures, views, boxes, size


@pytest.mark.gpu
def test_on_a_gpu_at_its_sizes() -> None:
    for pictures, views, boxes, size in drawn():
        judge(pictures, views, boxes, size, rotates=True)


def test_contrast_from_half_a_gray_level(large_tiles: None) -> None:
    """Of those views: its mean luma is 7 / 9216 below a half, which the kernel's weights in fp16 make up for."""
    *_, (pictures, views, boxes, size) = drawn()
    picture, view, box = pictures[63], views[63][5], boxes[63][5]
    assert 134.49 < mean_luma(picture, view, box, size) < 134.5
    judge([picture], [[view]], [[box]], size, rotates=True)


@pytest.mark.gpu
def test_the_references_blur_knows_no_tf32() -> None:
    """Which would move it by more than 0.06 gray levels."""
    views: list[dict[str, float]] = [{"blur": 1.7}, {"blur": 1.9, "flip": 1}]
    given = (*packed(images((375, 500))), *tables([views], [[(0, 0, 500, 375), (40, 30, 300, 200)]]))
    for size in (224, 96):
        on_gpu, on_cpu = (multi_crop_reference(*(x.to(d) for x in given), size).cpu() for d in (DEVICE, "cpu"))
        off = (on_gpu.int() - on_cpu.int()).abs()
        assert off.max() <= 1
        assert off.float().mean() <= 0.005


@pytest.mark.parametrize("normalised", [False, True], ids=["bytes", "normalised"])
@pytest.mark.parametrize("patch", [0, 8])
def test_what_a_network_reads(patch: int, normalised: bool, large_tiles: None, poisoned_memory: None) -> None:
    """Of views that each of the launches writes: patches are a convolution's, bytes are scaled and shifted."""
    views: list[dict[str, float]] = [{"brightness": 0.8}, {"contrast": 1.3, "solarize": 1}, {"blur": 1}, {"rotate": 9}]
    source, (box, params, turns) = packed(images((40, 50))), tables([views], [[(0, 0, 50, 40)] * 4])
    normal = torch.tensor([[0.5, 0.25, 2.0], [-1.0, 0.5, 3.0]], device=DEVICE) if normalised else None
    want = multi_crop(*source, box, params, turns, 24)
    if normal is not None:
        want = (want * normal[0, :, None, None] + normal[1, :, None, None]).to(torch.bfloat16)
    if patch:
        unfolded = torch.nn.functional.unfold(want.flatten(0, 1).float(), patch, stride=patch)
        want = unfolded.mT.reshape(4, 1, 3, 3, 3 * patch**2).to(want.dtype)
    got = multi_crop(*source, box, params, turns, 24, patch=patch, normal=normal)
    assert got.dtype == want.dtype
    # The interpreter truncates to bf16 where hardware rounds.
    torch.testing.assert_close(got, want, rtol=2**-7 if INTERPRETED and normalised else 0, atol=0)
    reference = multi_crop_reference(*source, box, params, turns, 24, patch=patch, normal=normal)
    assert reference.shape == got.shape
    assert (reference.float() - got.float()).abs().mean() < (0.2 if normalised else 0.05)


def test_strided_tables() -> None:
    """Of some views among all, as a caller has them who makes views of two sizes."""
    source, (box, params, turns) = packed(images((30, 40))), tables([[{}, {"flip": 1}]], [[(0, 0, 40, 30)] * 2])
    whole = multi_crop(*source, box, params, turns, 16)
    assert torch.equal(multi_crop(*source, box[:, 1:], params[:, 1:], turns[:, 1:], 16), whole[1:])


def test_rotation_only_where_turns_are_given() -> None:
    source, (box, params, turns) = packed(images((30, 40))), tables([[{"rotate": 40}]], [[(0, 0, 40, 30)]])
    plain, turned = (multi_crop(*source, box, params, x, 16) for x in (None, turns))
    unrotated = tables([[{}]], [[(0, 0, 40, 30)]])[1]
    assert torch.equal(plain, multi_crop(*source, box, unrotated, turns, 16))
    assert not torch.equal(plain, turned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": lambda x: x.float()}, "pixels"),
        ({"pixels": lambda x: x[::2]}, "pixels"),
        ({"starts": lambda x: x.int()}, "starts"),
        ({"widths": lambda x: x[:0]}, "widths"),
        ({"boxes": lambda x: x[..., :3]}, "boxes"),
        ({"boxes": lambda x: x[:, :0]}, "boxes"),
        ({"params": lambda x: x.double()}, "params"),
        ({"params": lambda x: x[:, :1]}, "params"),
        ({"turns": lambda x: x[..., :1]}, "turns"),
        ({"size": lambda x: 0}, "size"),
        ({"patch": lambda x: 3}, "size"),
        ({"normal": lambda x: torch.zeros(3, device=DEVICE)}, "normal"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    box, params, turns = tables([[{}, {}]], [[(0, 0, 4, 4)] * 2])
    given = dict(zip(("pixels", "starts", "widths"), packed(images((4, 4))), strict=True))
    given |= {"boxes": box, "params": params, "turns": turns, "size": 8, "patch": 0, "normal": None}
    for name, function in change.items():
        given[name] = function(given[name])
    with pytest.raises(ValueError, match=f"expected {message}"):
        multi_crop(**given)
