"""Attention maps: thresholds and overlap on maps made by hand, pictures, and the whole evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastdino.eval.dense.attention_maps as room
from fastdino.config import Config, ConfigError, DataConfig, ModelConfig, ViewsConfig
from fastdino.data.benchmarks.masks import VOID, ShapeMasks, open_objects
from fastdino.data.draws import sample
from fastdino.data.sources.decode import BadImage
from fastdino.data.sources.shapes import ShapesSource
from fastdino.eval import AttentionMaps, Reading, Subject, head_maps, keep_mass
from fastdino.eval.dense.attention_maps import draw_sheet, jaccard, object_ious
from fastdino.eval.dense.pictures.sheets import over
from fastdino.eval.dense.tokens import Shown
from fastdino.eval.features import EvaluationError
from fastdino.eval.result import read_shares
from fastdino.model import ViT
from tests.children import forked, python

READING = Reading(size=32)
CONFIG = Config(
    model=ModelConfig(arch="vit_nano", patch_size=8),
    views=ViewsConfig(global_size=32, local_size=16),
    data=DataConfig(image_size=48),
)


def vit() -> ViT:
    return ViT("nano", patch_size=8, image_size=32)


@pytest.mark.parametrize(
    ("mass", "kept"),
    [(0.3, [0, 0, 0, 1]), (0.45, [0, 0, 1, 1]), (0.6, [0, 0, 1, 1]), (0.75, [0, 1, 1, 1]), (0.95, [1, 1, 1, 1])],
)
def test_keep_mass(mass: float, kept: list[int]) -> None:
    maps = 7 * torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 1, 2, 2)  # the scale does not matter
    assert keep_mass(maps, mass).flatten().int().tolist() == kept


def test_keep_mass_is_the_smallest_set() -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 2, 5, 4).double()
    kept = keep_mass(maps, 0.6)
    share = (maps * kept).sum((-2, -1)) / maps.sum((-2, -1))
    least = maps.masked_fill(~kept, torch.inf).amin((-2, -1)) / maps.sum((-2, -1))
    assert (share >= 0.6).all()
    assert (share - least < 0.6).all()
    assert torch.equal(kept, maps >= maps.masked_fill(~kept, torch.inf).amin((-2, -1), keepdim=True))


def test_iou_by_hand() -> None:
    """2 x 2 patches on 4 x 4 pixels. Head 0 looks at the left column, head 1 at the upper left patch alone."""
    left, corner = torch.tensor([[0.4, 0.1], [0.4, 0.1]]), torch.tensor([[0.97, 0.01], [0.01, 0.01]])
    mask = np.zeros((4, 4), np.uint8)
    mask[:3, :2] = 9  # 6 pixels; the left column covers them and 2 more
    found = object_ious(torch.stack([left, corner]), mask)
    assert found.tolist() == [[6 / 8] * 2, [4 / 6] * 2]
    mask[2, :2] = 4  # two objects, of 4 and 2 pixels; the first comes last, for values go up
    mask[:, 3] = VOID
    found = object_ious(torch.stack([left, corner]), mask)
    assert found.tolist() == [[6 / 8, 2 / 8, 4 / 8], [4 / 6, 0, 1]]
    assert object_ious(torch.stack([left, corner]), np.full((4, 4), VOID, np.uint8)).tolist() == [[0], [0]]


def test_iou_of_a_mask_that_patches_do_not_tile() -> None:
    """Half of 5 columns: those whose middle lies in the left patch, 2, or on the border, 1."""
    mask = np.array([[1, 1, 1, 0, 0]] * 2, np.uint8)
    assert object_ious(torch.tensor([[[0.9, 0.1]]]), mask).tolist() == [[2 / 3, 2 / 3]]


class Seen:
    """Images with masks whose attention is known."""

    def __init__(self, masks: list[np.ndarray]) -> None:
        self.masks, self.classes = masks, ["0", "1"]

    def __len__(self) -> int:
        return len(self.masks)

    def read(self, index: int, room: Any = None) -> tuple[np.ndarray, int]:
        return np.full((*self.masks[index].shape, 3), index, np.uint8), -1

    def mask(self, index: int) -> np.ndarray:
        return self.masks[index]

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return "seen"


def test_both_conventions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head for the whole set; and for every object of every image the head that covers it best."""
    a, b = torch.tensor([[0.97, 0.01], [0.01, 0.01]]), torch.tensor([[0.01, 0.01], [0.01, 0.97]])
    maps = torch.stack([torch.stack([a, b]), torch.stack([b, a]), torch.stack([a, b]), torch.stack([a, b])])
    corner, both = np.array([[1, 0], [0, 0]], np.uint8), np.array([[1, 0], [0, 2]], np.uint8)
    monkeypatch.setattr(room, "_maps", lambda _vit, pixels, _reading: maps[pixels[:, 0, 0, 0].long()])
    source = Seen([corner, corner, both, np.zeros((2, 2), np.uint8)])
    found = jaccard(vit(), source, Reading(size=2), batch=3)
    assert (found.head, found.without_object, found.names) == (0, 1, ["image 0", "image 1", "image 2"])
    assert found.one_head.tolist() == [1, 0, 0.5]
    assert found.best_head_per_object.tolist() == [1, 1, 1]
    with pytest.raises(EvaluationError, match="none of the 2 masks shows an object"):
        jaccard(vit(), Seen([np.zeros((2, 2), np.uint8)] * 2), Reading(size=2))


@pytest.mark.parametrize("registers", [0, 3])
def test_registers_are_no_patches(registers: int) -> None:
    """Nor do they shift the patches: attention is drawn to the one that differs, whatever stands before it."""
    backbone = ViT("nano", patch_size=8, image_size=32, registers=registers, seed=3).eval()
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:24, 8:16] = 30
    maps = head_maps(backbone, images)
    assert maps.shape == (1, 4, 4, 4)
    assert (maps.sum((-2, -1)) < 1).all()
    spread = (maps - maps.flatten(2).median(dim=-1).values[..., None, None]).abs().amax(1)[0]
    assert spread.argmax().item() == 2 * 4 + 1


def test_maps_lie_on_the_image() -> None:
    """Rows and columns in place: attention is drawn to the one patch that differs."""
    backbone = vit().eval()
    images = torch.zeros(1, 3, 32, 48)
    images[..., 8:16, 32:40] = 30  # row 1, column 4 of 4 x 6
    maps = head_maps(backbone, images)
    assert maps.shape == (1, 4, 4, 6)
    spread = (maps - maps.flatten(2).median(dim=-1).values[..., None, None]).abs().amax(1)[0]
    assert spread.argmax().item() == 1 * 6 + 4
    torch.testing.assert_close(maps.flatten(2), backbone.attention_maps(images))


def looked_at(colours: list[str], size: tuple[int, int] = (32, 32)) -> Shown:
    pixels = [torch.from_numpy(np.array(Image.new("RGB", (32, 32), colour))).permute(2, 0, 1) for colour in colours]
    return Shown([*range(len(colours))], torch.stack(pixels), [size] * len(colours), [])


def test_sheet(tmp_path: Path) -> None:
    draw_sheet(tmp_path / "a.png", looked_at(["red", "blue"]), torch.rand(2, 3, 4, 4))
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    upper, lower = pixels[: height // 2, : width // 5], pixels[height // 2 :, : width // 5]
    assert (upper == (255, 0, 0)).all(-1).sum() > 1000
    assert (lower == (0, 0, 255)).all(-1).sum() > 1000
    assert width > 2 * height  # image, 3 heads and the mean side by side
    draw_sheet(tmp_path / "wide.png", looked_at(["red", "blue"], (64, 32)), torch.rand(2, 3, 4, 4))
    with Image.open(tmp_path / "wide.png") as sheet:
        assert sheet.width > 3 * sheet.height, "pictures have the shape of the image"


def test_an_overlay_shows_the_image_where_attention_is_low(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), 90, np.uint8)
    drawn = over(pixels, np.array([[0.0, 0], [0, 1]]))
    assert (drawn[:2, :2] == 90).all()
    assert np.abs(drawn[-1, -1] - np.array([220, 222, 150.0])).max() <= 1, "four fifths of the brightest"


def test_the_evaluation(tmp_path: Path) -> None:
    """Figures and protocol, a random start beside them, and a sheet."""
    subject = Subject(vit(), CONFIG, tmp_path)
    result = AttentionMaps(num_images=10)(subject)
    told = result.write(tmp_path / "out")
    source = open_objects("shapes", CONFIG.data, 10)
    assert source is not None
    want = jaccard(vit(), source, READING)
    for name in ("one_head", "best_head_per_object"):
        score = told["scores"][f"jaccard_{name}"]
        assert score["value"] == pytest.approx(100 * getattr(want, name).mean().item(), abs=1e-3)
        assert score["low"] < score["value"] < score["high"]
    assert told["baselines"].keys() == {"random_init"}
    assert told["also"] == {"head": want.head}
    assert told["protocol"] == {"size": 32, "normalize": "imagenet", "precision": "fp32", "mass": 0.6}
    assert (told["data"]["root"], told["data"]["images"]) == ("shapes", 10)
    assert told["files"] == ["attention.png", "attention.npz"]
    assert (tmp_path / "out/attention.png").stat().st_size > 5000
    shares = read_shares(tmp_path / "out/attention.json")
    assert (shares.items, shares.value()) == (want.names, pytest.approx(told["scores"]["jaccard_one_head"]["value"]))


def folder_of_masks(root: Path, count: int) -> None:
    """Images of two shapes; of each the left half is the object."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        size = (50, 30) if i % 2 else (30, 50)
        mask = np.zeros(size[::-1], np.uint8)
        mask[:, : size[0] // 2] = 255
        Image.new("RGB", size, (40 * i % 256, 90, 0)).save(root / f"images/{i}.jpg")
        Image.fromarray(mask).save(root / f"masks/{i}.png")


def test_masks_of_a_folder(tmp_path: Path) -> None:
    """Of images of several shapes; a size that patches do not tile is rounded, which a note says."""
    folder_of_masks(tmp_path / "data", 5)
    told = AttentionMaps(data=str(tmp_path / "data"), size=45, num_images=4, overlay=True, precision="bf16")(
        Subject(vit(), CONFIG, tmp_path)
    ).write(tmp_path / "out")
    assert told["protocol"]["size"] == 48
    assert told["data"]["images"] == 4
    assert told["scores"].keys() == {"jaccard_one_head", "jaccard_best_head_per_object"}
    assert "size 48: 45 does not divide into patches of 8" in told["notes"]


def test_a_folder_of_images_has_no_masks(tmp_path: Path) -> None:
    Image.new("RGB", (50, 30), "red").save(tmp_path / "a.png")
    for data in (tmp_path, tmp_path / "a.png"):
        told = AttentionMaps(data=str(data), size=48)(Subject(vit(), CONFIG, tmp_path)).write(tmp_path / "out")
        assert (told["scores"], told["data"]["images"], told["protocol"]["size"]) == ({}, 1, 48)
        assert told["files"] == ["attention.png"]


def test_images_are_drawn_from_the_whole_folder(tmp_path: Path) -> None:
    """Neither those that are looked at nor those on the sheet are the first."""
    for i in range(60):
        Image.new("RGB", (8, 8), (4 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    subject = Subject(vit(), CONFIG, tmp_path)
    source, masked, _ = AttentionMaps(data=str(tmp_path), num_images=20).open(subject)
    assert masked is None
    names = [source.name(i) for i in range(len(source))]
    assert len({*names}) == 20
    assert max(names) > "45.png"
    other, *_ = AttentionMaps(data=str(tmp_path), num_images=20, seed=1).open(subject)
    assert names != [other.name(i) for i in range(20)]
    assert max(sample(0, 8, 20)) > 12


def test_frames_of_a_video(tmp_path: Path) -> None:
    """A PNG for each, at its size, in the order of names, beside the sheet."""
    (tmp_path / "frames").mkdir()
    for i in range(3):
        picture = np.full((30, 50, 3), 200, np.uint8)
        picture[10:20, 10 * i : 10 * i + 10] = (255, 0, 0)
        Image.fromarray(picture).save(tmp_path / f"frames/{i}.png")
    evaluation = AttentionMaps(data="shapes", num_images=2, video=tmp_path / "frames")
    told = evaluation(Subject(vit(), CONFIG, tmp_path)).write(tmp_path / "out")
    names = [f"attention-video/0000{i}.png" for i in range(3)]
    assert told["files"][1:4] == names
    frames = []
    for name in names:
        with Image.open(tmp_path / "out" / name) as frame:
            assert frame.size == (50, 30)
            frames.append(np.asarray(frame))
    assert not np.array_equal(frames[0], frames[1])
    dark = (frames[0].max(-1) < 100).mean()
    assert 0.1 < dark < 0.7, "what holds less than 60 % of the attention is dark"


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    subject = Subject(vit(), CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match=r"a\.png.*mend or delete it"):
        AttentionMaps(data=str(tmp_path))(subject).write(tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]
    with pytest.raises(ConfigError, match="nowhere"):
        AttentionMaps(video=tmp_path / "nowhere")(subject)


@pytest.mark.parametrize("flags", [{"num_images": 0}, {"mass": 1.0}, {"batch": 0}, {"size": 0}])
def test_flags_that_cannot_work(flags: dict[str, Any]) -> None:
    (name,) = flags
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        AttentionMaps(**flags)


def test_attention_on_the_object_scores_high() -> None:
    """The images' own masks, as attention of one head of three: the score nears 1, so image and mask lie alike."""
    source = ShapesSource(6, 48)
    masks = torch.stack([torch.from_numpy(source.mask(i)) for i in range(6)]).float()
    perfect = nn.functional.adaptive_avg_pool2d(masks[:, None], 24).flatten(2) + 1e-6

    class Seer(ViT):
        def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.rand_like(perfect), perfect, torch.rand_like(perfect)], dim=1)

    seer = Seer("nano", patch_size=2, image_size=48)
    found = jaccard(seer, ShapeMasks(source), Reading(size=48), mass=0.99)
    assert found.one_head.mean() > 0.8
    assert found.head == 1


def test_an_unreadable_mask_is_named(tmp_path: Path) -> None:
    class Torn(Seen):
        def mask(self, index: int) -> np.ndarray:
            raise BadImage("masks/7.png", "it is torn")

    with pytest.raises(EvaluationError, match=r"masks/7\.png: it is torn: mend or delete it"):
        jaccard(vit(), Torn([np.zeros((8, 8), np.uint8)]), READING)


def test_a_backbone_without_cls_attention(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval attention: this needs one of our ViTs .model\.arch=vit_.*not Flatten"):
        AttentionMaps()(Subject(nn.Flatten(), CONFIG, tmp_path))


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.no_such_backend", "of_another_matplotlib", "agg", ""])
def test_drawing_needs_no_backend_of_a_notebook(tmp_path: Path, backend: str) -> None:
    """matplotlib's import fails where MPLBACKEND names what is not installed, as it does below a notebook."""
    code = (
        "import os, sys; assert 'matplotlib' not in sys.modules; from fastdino.eval.pictures import new_figure; "
        f"new_figure(1, 1).canvas.print_png({str(tmp_path / 'x.png')!r}); print(os.environ.get('MPLBACKEND'))"
    )
    done = forked(python, "-c", code, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == backend, "the process's own setting is left as it was"
    assert (tmp_path / "x.png").is_file()
