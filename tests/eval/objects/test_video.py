"""Objects through videos: whole commands, the score from the masks that are written, sizes, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import cli
from fastdino.config import ConfigError, UserError
from fastdino.data.benchmarks.davis import mask_png, open_videos
from fastdino.eval.evaluation import Subject
from fastdino.eval.objects.contours import outline_f, region
from fastdino.eval.objects.discover import Discover
from fastdino.eval.objects.video import VideoObjects
from fastdino.eval.result import read_shares
from fastdino.model import ViT
from fastdino.recipes import get
from tests.data.benchmarks.moving_shapes import write_davis, write_video

CONFIG = get("demo")  # patches of 6 pixels


def subject(tmp_path: Path, patch: int = 6) -> Subject:
    return Subject(ViT("nano", patch_size=patch, image_size=6 * patch).eval(), CONFIG, tmp_path)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    cli.main(["eval", "video", "random:demo", *arguments])
    return json.loads(capsys.readouterr().out)


def values(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def test_davis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The score is that of the masks that are written, of all frames but the first and the last; objects count once."""
    write_davis(tmp_path / "data")
    out = tmp_path / "out"
    told = run("--data", str(tmp_path / "data"), "--size", "48", "--out", str(out), capsys=capsys)
    expected = []
    for name in ("one", "two"):
        truth, found = tmp_path / "data/Annotations/480p" / name, out / "video-masks" / name
        assert np.array_equal(values(found / "00000.png"), values(truth / "00000.png"))
        assert len([*found.iterdir()]) == 6
        for number in (1, 2):
            pairs = [[values(x / f"{i:05d}.png") == number for x in (found, truth)] for i in range(1, 5)]
            measured = [(region(*pair), outline_f(*pair)) for pair in pairs]
            expected.append(np.mean(measured, axis=0))
    j, f = 100 * np.mean(expected, axis=0)
    assert told["scores"]["j"]["value"] == pytest.approx(j, abs=1e-3)
    assert told["scores"]["f"]["value"] == pytest.approx(f, abs=1e-3)
    assert told["scores"]["j_and_f"]["value"] == pytest.approx((j + f) / 2, abs=1e-3)
    assert told["headline"] == "j_and_f"
    assert told["scores"]["j_and_f"]["low"] <= told["scores"]["j_and_f"]["value"] <= told["scores"]["j_and_f"]["high"]
    assert list(told["baselines"]) == ["random_init"]
    assert set(told["also"]) == {"j_recall", "j_decay", "f_recall", "f_decay", "masks"}
    assert told["data"] == {"root": str(tmp_path / "data"), "name": "", "videos": 2, "images": 12, "objects": 4}
    shares = read_shares(out / "video.json")
    assert shares.items == ["one/1", "one/2", "two/1", "two/2"]
    assert shares.value() == pytest.approx(told["scores"]["j_and_f"]["value"], abs=1e-3)
    assert (out / "video.png").stat().st_size > 20_000


def test_frames_with_one_mask(tmp_path: Path) -> None:
    """There is nothing to compare with: masks and a picture, no score, and no baseline is tried."""
    write_video(tmp_path / "frames", tmp_path / "masks", 3)
    first = tmp_path / "masks/00000.png"
    result = VideoObjects(data=str(tmp_path / "frames"), masks=first, size=24)(subject(tmp_path))
    assert result.baselines == {}
    told = result.write(tmp_path / "out")
    assert told["scores"] == {}
    assert "nothing is judged" in told["notes"][0]
    found = [values(path) for path in sorted((tmp_path / "out/video-masks/frames").iterdir())]
    assert [x.shape for x in found] == [(48, 64)] * 3
    assert {*np.unique(found[1])} <= {0, 1, 2}
    assert (found[1] == 1).any()


def test_results_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    write_davis(tmp_path, ("one",))
    told = subject(tmp_path)
    found = []
    for batch, precision in ((1, "fp32"), (4, "fp32"), (64, "bf16")):
        evaluation = VideoObjects(data=str(tmp_path), size=48, batch=batch, precision=precision)
        found.append(evaluation.judge(told, evaluation.open(told)))
    scores = [{name: score.value for name, score in one.scores.items()} for one in found]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)  # a pixel may lie between two labels
    assert scores[0] == pytest.approx(scores[2], abs=5)


def test_what_stands_still_stays(tmp_path: Path) -> None:
    """Equal frames, a mask of whole patches, and each patch its own source: only the corners are rounded."""
    write_video(tmp_path / "frames", tmp_path / "masks", 5, height=48, width=66)
    mask = np.zeros((48, 66), np.uint8)
    mask[12:30, 24:60] = 1
    for index in range(5):
        image = (tmp_path / "frames/00000.png").read_bytes()
        (tmp_path / f"frames/{index:05d}.png").write_bytes(image)
        (tmp_path / f"masks/{index:05d}.png").write_bytes(mask_png(mask))
    evaluation = VideoObjects(data=str(tmp_path / "frames"), masks=tmp_path / "masks", size=48, radius=0, k=1)
    told = subject(tmp_path)
    scores = evaluation.judge(told, evaluation.open(told)).scores
    assert scores["j"].value > 96
    assert scores["f"].value > 96


def test_objects_smaller_than_a_patch(tmp_path: Path) -> None:
    write_video(tmp_path / "frames", tmp_path / "masks", 4)
    for path in (tmp_path / "masks").iterdir():
        mask = values(path).copy()
        mask[0, 0] = 3
        path.write_bytes(mask_png(mask))
    evaluation = VideoObjects(data=str(tmp_path / "frames"), masks=tmp_path / "masks", size=48)
    found = evaluation.judge(subject(tmp_path), evaluation.open(subject(tmp_path)))
    assert found.notes == ["smaller than a patch in the first frame, and so never found: frames/3"]
    assert found.arrays["j"][2] == 0


def test_sides(tmp_path: Path) -> None:
    vit = ViT("nano", patch_size=16, image_size=32)
    assert VideoObjects().sides(vit, 480, 854) == (480, 832)  # as DINO sees DAVIS
    assert VideoObjects().sides(vit, 1920, 1080) == (832, 480)
    assert VideoObjects(size=100).sides(vit, 480, 854) == (96, 176)
    assert VideoObjects().sides(ViT("nano", patch_size=14, image_size=28), 480, 854) == (476, 854)
    with pytest.raises(ConfigError, match="--size 8 is less than a patch of 16"):
        VideoObjects(size=8).sides(vit, 480, 854)


def test_v1_divides_red_by_another_number(tmp_path: Path) -> None:
    write_davis(tmp_path, ("one",))
    (video,) = open_videos(str(tmp_path), CONFIG.data)
    seen: list[torch.Tensor] = []
    told = subject(tmp_path)
    told.backbone.patch_embed.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for published in ("no", "v1"):
        evaluation = VideoObjects(size=24, normalize="imagenet", published=published)
        next(evaluation.spread(told.backbone, evaluation.reading(CONFIG), video))
    ratio = seen[1] / seen[0]
    torch.testing.assert_close(ratio[:, 0], torch.full_like(ratio[:, 0], 0.229 / 0.228))
    assert torch.equal(seen[1][:, 1:], seen[0][:, 1:])


def test_what_is_refused(tmp_path: Path) -> None:
    told = subject(tmp_path)
    with pytest.raises(ConfigError, match="--data has to hold videos"):
        VideoObjects().open(told)
    with pytest.raises(ConfigError, match="--published v1"):
        VideoObjects(published="v1", normalize="image").open(told)
    for flags in ({"context": -1}, {"radius": -1}, {"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="--" + next(iter(flags))):
            VideoObjects(**flags)


def test_scipy_is_missed_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    for evaluation in (Discover(), VideoObjects(data=str(tmp_path))):
        with pytest.raises(UserError, match=rf"eval {evaluation.kind} needs scipy: pip install 'fastdino\[eval\]'"):
            evaluation(subject(tmp_path))
