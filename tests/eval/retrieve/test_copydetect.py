"""Copy detection: whole commands against a literal loop, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdino.cli import main
from fastdino.data.views import normalize
from fastdino.eval.features import gem
from fastdino.eval.retrieve.copydetect import _ranked
from fastdino.eval.retrieve.whitening import Whitening
from fastdino.model import ViT
from tests.data.benchmarks.layouts import copydays
from tests.data.pictures import photo, write
from tests.eval.retrieve.networks import vit


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What the command ``fastdino eval copydetect`` prints."""
    flags = ["--out", tmp_path / "out", "--no-cache", "--device", "cpu", "--num-workers", 0]
    main(["eval", "copydetect", *map(str, arguments), *map(str, flags)])
    return json.loads(capsys.readouterr().out)


def literal(model: ViT, files: list[Path], side: int) -> Tensor:
    """CLS and the generalised mean of squeezed images, one after the other."""
    found = []
    for file in files:
        image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        x = normalize(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0), "imagenet")
        found.append(torch.cat([model(x)[0], gem(model.patch_tokens(x).flatten(1, 2), 4)[0]]).detach())
    return torch.stack(found).double()


def test_ranks_by_hand() -> None:
    """Three images, a query whose original comes second: (0 + 1/2) / 2."""
    images = torch.eye(3)
    query = torch.tensor([[0.6, 0.8, 0.0]])
    scores, first = _ranked(query, images, np.array([0]), torch.arange(3))
    assert scores.tolist() == [0.25]
    assert first.order.tolist() == [[1, 0, 2]]
    assert first.right.tolist() == [[False, True, False]]
    scores, first = _ranked(query, images, np.array([0]), torch.tensor([1, 2, 3]))  # the original could not be read
    assert np.isnan(scores).all()
    assert first.order.tolist() == [[2, 1, 3]]


def test_only_the_top_is_searched() -> None:
    images = F.normalize(torch.stack([torch.linspace(1, 0, 30), torch.linspace(0, 1, 30)], dim=1), dim=1)
    scores, _ = _ranked(images[:1], images, np.array([19]), torch.arange(30))
    assert scores.tolist() == pytest.approx([1 / 40])
    assert _ranked(images[:1], images, np.array([20]), torch.arange(30))[0].tolist() == [0]


@pytest.mark.parametrize("moment", [False, True], ids=["covariance", "second moment"])
def test_copydays(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weights: Path,
    moment: bool,
) -> None:
    """Whitened by 8 images, with 3 distractors, at 40 pixels. Of the strong copies one cannot be read, and three show
    something else, so that they are found anywhere."""
    root, more, white = copydays(tmp_path / "data"), tmp_path / "more", tmp_path / "white"
    (root / "strong" / "200000.jpg").write_bytes(b"nothing")
    for i in range(1, 4):
        write(root / "strong" / f"20{i:02d}01.jpg", photo(44, 33, seed=90 + i))
    for folder, count, seed in ((more, 3, 50), (white, 8, 70)):
        for i in range(count):
            write(folder / f"{i}.png", photo(50, 40, seed=seed + i))
    fit, asked = Whitening.fit, list[bool]()

    def watched(features: Tensor, centered: bool) -> Whitening:  # of 8 images, both whitenings rank alike
        asked.append(centered)
        return fit(features, centered)

    monkeypatch.setattr(Whitening, "fit", watched)
    flags = ["--data", root, "--size", 40, "--whiten", white, "--distractors", more, "--baselines", "no"]
    told = run(tmp_path, capsys, weights, *flags, *(["--second-moment"] if moment else []))
    model = vit()
    files = [sorted(folder.iterdir()) for folder in (root / "original", more, root / "strong", white)]
    del files[2][0]
    originals, others, strong, learned = (literal(model, some, 40) for some in files)
    mean = learned.mean(0)
    x = learned if moment else learned - mean
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    turn = vectors / values.clamp(min=1e-5 * values.max()).sqrt()
    database = F.normalize((torch.cat([originals, others]) - mean) @ turn, dim=1)
    area = []
    for query, of in zip(F.normalize((strong - mean) @ turn, dim=1), (0, 0, 1, 2, 3), strict=True):
        rank = (database @ query).argsort(descending=True).tolist().index(of)
        area.append(((1.0 if rank == 0 else 0.0) + 1 / (rank + 1)) / 2)
    assert told["headline"] == "map_strong"
    assert list(told["scores"]) == ["map_strong", "map_jpegqual_10", "map_crops_50"]
    assert told["scores"]["map_strong"]["value"] == pytest.approx(100 * np.mean(area), abs=1e-3)
    with np.load(tmp_path / "out" / "copydetect.npz") as arrays:
        assert arrays["part"].tolist() == pytest.approx(area)
        assert arrays["items"][1] == "strong/200002.jpg"
    assert told["data"]["name"] == "copydays"
    assert asked == [not moment]
    assert (told["data"]["queries"], told["data"]["originals"], told["data"]["distractors"]) == (13, 4, 3)
    assert told["data"]["unreadable"] == 1
    assert told["notes"] == [
        "1 images could not be read and were left out",
        "Copydays has 157 images in each block, and 229 in strong; here: original 4, strong 6, jpegqual/10 4, "
        "crops/50 4",
    ]


def test_synthetic_copies_are_never_called_copydays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    for i in range(6):
        write(tmp_path / "data" / f"{i}.png", photo(60, 40, seed=i))
    flags = (weights, "--make-copies", tmp_path / "data", "--size", 32)
    told = run(tmp_path, capsys, *flags)
    assert told["headline"] == "map_synthetic_copies"
    assert told["data"]["name"] == "synthetic copies"
    assert told["data"]["root"] == str(tmp_path / "data")
    assert "copydays" not in json.dumps(told).lower().replace("not to be compared with scores of copydays", "")
    assert told["data"]["queries"] == 42
    each = [score["value"] for name, score in told["scores"].items() if name != "map_synthetic_copies"]
    assert len(each) == 7
    assert told["scores"]["map_synthetic_copies"]["value"] == pytest.approx(np.mean(each), abs=1e-3)
    assert told["scores"]["map_jpeg_10"]["value"] == 100
    assert set(told["baselines"]) == {"pixels", "random_init"}
    assert run(tmp_path, capsys, *flags, "--baselines", "no", "--batch", 4)["scores"] == told["scores"]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path) -> None:
    write(tmp_path / "one" / "a.png")
    for flags, says in [
        ((), "shapes have no copies"),
        (("--data", tmp_path / "one"), "is not laid out as Copydays: found a.png; looked for original/"),
        (("--make-copies", tmp_path / "one"), "--make-copies needs 2 images or more, and there is 1"),
        (("--make-copies", tmp_path / "one", "--data", tmp_path), "must be left out: --make-copies names the images"),
        (("--data", tmp_path, "--second-moment"), "must be beside --whiten"),
        (("--data", tmp_path, "--crop-ratio", 1), "--crop-ratio=1.0 must be left out: images are seen whole"),
        (("--data", copydays(tmp_path / "d"), "--whiten", tmp_path / "one"), "2 images or more, and there is 1"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, capsys, weights, *flags)
        assert says in capsys.readouterr().err.splitlines()[-1], flags
        assert not (tmp_path / "out").exists()
