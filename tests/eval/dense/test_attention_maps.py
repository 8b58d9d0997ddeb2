"""Attention maps: thresholds and overlap on maps made by hand, pictures, and the whole evaluation."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdino.config import Config, ConfigError, DataConfig, ModelConfig, ViewsConfig
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.folder import FolderSource
from fastdino.data.sources.shapes import ShapesSource
from fastdino.eval import AttentionMaps, Reading, Subject, best_head_iou, draw_sheet, head_maps, keep_mass
from fastdino.model import ViT

READING = Reading(size=32)
CONFIG = Config(
    model=ModelConfig(arch="vit_nano", patch_size=8),
    views=ViewsConfig(global_size=32, local_size=16),
    data=DataConfig(image_size=48),
)
SHAPES = bank_and_test("shapes", CONFIG.data).test


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
    maps = torch.stack([left, corner]).unsqueeze(0)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :3, :2] = True  # 6 pixels; the left column covers them and 2 more
    assert best_head_iou(maps, mask) == pytest.approx(6 / 8)
    assert best_head_iou(maps[:, 1:], mask) == pytest.approx(4 / 6)
    assert best_head_iou(maps, torch.zeros_like(mask)) == 0
    mask[:] = False
    mask[0, :2, :2] = True
    assert best_head_iou(maps, mask) == 1


def test_one_head_is_chosen_for_the_whole_set() -> None:
    a, b = torch.tensor([[0.97, 0.01], [0.01, 0.01]]), torch.tensor([[0.01, 0.01], [0.01, 0.97]])
    maps = torch.stack([torch.stack([a, b]), torch.stack([b, a]), torch.stack([a, b])])  # (3, 2, 2, 2)
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[:, 0, 0] = True
    assert best_head_iou(maps, mask) == pytest.approx(2 / 3)  # head by head and image by image it would be 1


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


def test_sheet(tmp_path: Path) -> None:
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    draw_sheet(tmp_path / "a.png", images, torch.rand(2, 3, 4, 4))
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    upper, lower = pixels[: height // 2, : width // 5], pixels[height // 2 :, : width // 5]
    assert (upper == (255, 0, 0)).all(-1).sum() > 1000
    assert (lower == (0, 0, 255)).all(-1).sum() > 1000
    assert width > 2 * height  # image, 3 heads and the mean side by side


def test_the_evaluation(tmp_path: Path) -> None:
    """Figures and protocol, and a sheet."""
    subject = Subject(vit(), CONFIG, tmp_path)
    evaluation = AttentionMaps(num_images=10)
    result = evaluation(subject)
    told = result.write(tmp_path / "out")
    want = 100 * evaluation.overlap(vit(), SHAPES, READING)["attention_iou"]
    assert told["scores"]["attention_iou"]["value"] == pytest.approx(want, abs=1e-3)
    assert told["protocol"] == {"size": 32, "normalize": "imagenet", "mass": 0.6}
    assert told["data"] == {"root": "shapes", "images": 10}
    assert told["files"] == ["attention.png"]
    assert (tmp_path / "out/attention.png").stat().st_size > 5000


def test_a_folder_of_images_has_no_masks(tmp_path: Path) -> None:
    Image.new("RGB", (50, 30), "red").save(tmp_path / "a.png")
    told = AttentionMaps(data=str(tmp_path), size=48)(Subject(vit(), CONFIG, tmp_path)).json()
    assert (told["scores"], told["data"]["images"], told["protocol"]["size"]) == ({}, 1, 48)


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patches of 8"):
        AttentionMaps(num_images=1, size=33)(Subject(vit(), CONFIG, tmp_path))
    assert not [*tmp_path.iterdir()]


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
    assert AttentionMaps(mass=0.99).overlap(seer, source, Reading(size=48))["attention_iou"] > 0.8


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png.*mend or delete it"):
        AttentionMaps().overlap(vit(), FolderSource(tmp_path), READING)


def test_a_backbone_without_cls_attention() -> None:
    with pytest.raises(ValueError, match=r"model\.arch=vit_.*not Flatten"):
        AttentionMaps().overlap(nn.Flatten(), ShapesSource(2, 32), READING)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.no_such_backend", "agg", ""])
def test_drawing_needs_no_backend_of_a_notebook(tmp_path: Path, backend: str) -> None:
    """matplotlib's import fails where MPLBACKEND names what is not installed, as it does below a notebook."""
    code = (
        "import os; from fastdino.eval.pictures import new_figure; "
        f"new_figure(1, 1).canvas.print_png({str(tmp_path / 'x.png')!r}); print(os.environ.get('MPLBACKEND'))"
    )
    env = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == backend, "the process's own setting is left as it was"
    assert (tmp_path / "x.png").is_file()
