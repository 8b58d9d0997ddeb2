"""Retrieval: whole images as DINO v1 sees them, whole commands against literal loops, and what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from fastdino.cli import main
from fastdino.data.sources.folder import FolderSource
from fastdino.data.views import center_view, normalize
from fastdino.eval import EvaluationError, Retrieval, Subject
from fastdino.eval.controls import RawPixels
from fastdino.eval.features import Part, gem
from fastdino.eval.retrieve.pooling import Described, Look, describe
from fastdino.eval.retrieve.strips import COLOURS, extremes
from fastdino.eval.retrieve.whitening import Whitening
from fastdino.model import ViT
from tests.data.benchmarks.layouts import (
    TRUE,
    copydays,
    google,
    ground_truth,
    revisited,
    table,
    write_mat,
    write_pickle,
)
from tests.data.pictures import photo, write
from tests.eval.retrieve.networks import CONFIG, vit

THREE = (1.0, 1 / 2 ** (1 / 2), 1 / 2)  # DINO v1's scales


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 things on 4 photographs each, of several shapes, and one thing on one."""
    root = tmp_path_factory.mktemp("instances")
    for thing in range(6):
        for i in range(4 if thing < 5 else 1):
            write(root / f"thing{thing}" / f"{i}.png", photo(48 + 4 * i, 60, seed=thing).rotate(12 * i))
    return root


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What the command ``fastdino eval retrieval`` prints."""
    flags = ["--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--device", "cpu", "--num-workers", 0]
    main(["eval", "retrieval", *map(str, arguments), *map(str, flags)])
    return json.loads(capsys.readouterr().out)


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, capsys, *arguments)
    said = capsys.readouterr()
    assert not said.out
    assert not (tmp_path / "out").exists()
    return said.err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------- whole images


def thumbnail(path: Path, side: int) -> Tensor:
    """(1, 3, h, w) as torchvision's ToTensor and Normalize make of Pillow's thumbnail."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((x - mean) / std).unsqueeze(0)


def v1(model: ViT, path: Path, side: int, scales: tuple[float, ...]) -> Tensor:
    """DINO v1's descriptor; its convolution drops the remainder that fills no patch."""
    total = torch.zeros(96)
    for scale in scales:
        x = thumbnail(path, side)
        x = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        height, width = (n // 8 * 8 for n in x.shape[-2:])
        kept = F.conv2d(x, model.patch_embed.proj.weight, stride=8).shape[-2:]
        assert (height // 8, width // 8) == tuple(kept)
        total += model(x[..., :height, :width])[0].detach()
    return F.normalize(total / len(scales), dim=0)


@pytest.mark.parametrize("scales", [(1.0,), THREE], ids=["one scale", "three scales"])
def test_descriptors_are_those_of_dino_v1(tmp_path: Path, scales: tuple[float, ...]) -> None:
    for i, size in enumerate([(70, 50), (50, 70), (70, 50), (30, 25), (50, 70)]):
        write(tmp_path / f"{i}.png", photo(*size, seed=i))
    model, source = vit(), FolderSource(tmp_path)
    found = describe(model, source, Look(side=47, scales=scales), batch=2, num_workers=2)
    want = torch.stack([v1(model, tmp_path / f"{i}.png", 47, scales) for i in range(5)])
    torch.testing.assert_close(F.normalize(found.vectors, dim=1), want, rtol=1e-4, atol=1e-5)
    assert found.places.tolist() == list(range(5))
    alone = describe(model, source, Look(side=47, scales=scales), batch=1, num_workers=0)
    torch.testing.assert_close(alone.vectors, found.vectors, rtol=1e-4, atol=1e-5)
    parts = [describe(model, source, Look(side=47, scales=scales), part=Part(rank, 3)) for rank in range(3)]
    torch.testing.assert_close(torch.cat([part.vectors for part in parts]), found.vectors, rtol=1e-4, atol=1e-5)
    assert torch.cat([part.places for part in parts]).tolist() == list(range(5))


def test_tokens_and_squeezed_images(tmp_path: Path) -> None:
    write(tmp_path / "a.png", photo(70, 50))
    model, source = vit(), FolderSource(tmp_path)
    image = Image.open(tmp_path / "a.png").resize((32, 32), Image.Resampling.BICUBIC)
    x = normalize(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0), "imagenet")
    cls, pooled = model(x)[0].detach(), gem(model.patch_tokens(x).detach().flatten(1, 2), 4)[0]
    wanted = {"cls": cls, "gem": pooled, "cls+gem": torch.cat([cls, pooled])}
    for tokens, want in wanted.items():
        look = Look(side=32, squeezed=True, tokens=tokens, power=4.0)  # type: ignore[arg-type]
        torch.testing.assert_close(describe(model, source, look).vectors[0], want, rtol=1e-4, atol=1e-5)
    assert describe(RawPixels(), source, Look(side=40, tokens="gem")).vectors.shape == (1, 3072)


def test_what_is_left_out_and_what_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, size in (("a", (50, 40)), ("c", (300, 20)), ("d", (40, 50))):
        write(tmp_path / f"{name}.png", photo(*size))
    (tmp_path / "b.jpg").write_bytes(b"nothing")
    found = describe(vit(), FolderSource(tmp_path), Look(side=40))
    assert found.places.tolist() == [0, 3]
    assert "left out: cannot read image b.jpg" in caplog.text
    assert "left out: c.png, 40 x 3 pixels, is narrower than a patch" in caplog.text
    (tmp_path / "c.png").unlink()
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 4))
    with pytest.raises(EvaluationError, match="the backbone cannot take images of 40 x 32 pixels"):
        describe(fixed, FolderSource(tmp_path), Look(side=40))
    with pytest.raises(EvaluationError, match="needs one of our ViTs"):
        describe(fixed, FolderSource(tmp_path), Look(side=40, tokens="gem"))


class Two:
    """One of two ranks, whose gather returns ``parts``, or what it is given."""

    world_size = 2

    def __init__(self, rank: int, *parts: Described) -> None:
        self.rank, self.parts = rank, parts

    def everywhere(self, work: Callable[[], Any]) -> Any:
        return work()

    def gather(self, mine: Described) -> list[Described]:
        self.mine = mine
        return [*self.parts] or [mine]


def test_ranks_describe_a_part_each(tmp_path: Path) -> None:
    """The only image of the first of them cannot be read."""
    (tmp_path / "a.png").write_bytes(b"nothing")
    for name in "bc":
        write(tmp_path / f"{name}.png", photo(50, 40, seed=ord(name)))
    source, look, evaluation = FolderSource(tmp_path), Look(side=32), Retrieval(num_workers=0)
    alone = Subject(vit(), CONFIG, tmp_path)
    want = evaluation.described(alone, source, look)
    first, second = Two(0), Two(1)
    with pytest.raises(EvaluationError, match="none of the images could be read"):
        evaluation.described(replace(alone, ranks=first), source, look)  # type: ignore[arg-type]
    evaluation.described(replace(alone, ranks=second), source, look)  # type: ignore[arg-type]
    for rank in range(2):
        ranks: Any = Two(rank, first.mine, second.mine)
        got = evaluation.described(replace(alone, ranks=ranks), source, look)
        assert got.places.tolist() == [1, 2]
        torch.testing.assert_close(got.vectors, want.vectors, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ whole commands


def test_a_folder_of_instances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path, instances: Path
) -> None:
    told = run(tmp_path, capsys, weights, "--data", instances)
    source, model = FolderSource(instances), vit()
    views = torch.stack([center_view(source.read(i)[0], 32) for i in range(21)])
    labels = np.array([source.label(i) for i in range(21)])
    vectors = F.normalize(model(normalize(views, "imagenet")).detach(), dim=1)
    similar = (vectors @ vectors.T).numpy()
    precision, recall = [], []
    for i in range(20):  # thing5 is on one photograph
        others = np.arange(21) != i
        right = labels[others] == labels[i]
        precision.append(average_precision_score(right, similar[i, others]))
        recall.append(right[np.argsort(-similar[i, others])[:5]].any())
    scores = told["scores"]
    assert list(scores) == ["map", "recall_1", "recall_5", "recall_10", "map_at_r"]
    assert scores["map"]["value"] == pytest.approx(100 * np.mean(precision), abs=1e-3)
    assert scores["recall_5"]["value"] == pytest.approx(100 * np.mean(recall), abs=1e-3)
    assert 20 < scores["map"]["value"] < 99
    assert scores["map"]["low"] < scores["map"]["value"] < scores["map"]["high"]
    assert told["data"] | {"root": ""} == {
        "root": "", "name": "", "split": "all images", "queries": 20, "database": 21, "images": 21, "left_out": 1,
        "unreadable": 0,
    }  # fmt: skip
    assert told["notes"][0] == "1 queries were left out: nothing is right for them"
    assert set(told["baselines"]) == {"pixels", "random_init"}
    with np.load(tmp_path / "out" / "retrieval.npz") as arrays:
        assert arrays["part"].tolist() == pytest.approx(precision)
        assert arrays["top"].shape == (21, 5)
    picture = np.asarray(Image.open(tmp_path / "out" / "retrieval.png").convert("RGB"))
    for colour in COLOURS.values():
        assert (picture == colour).all(axis=2).sum() > 500


def test_scores_do_not_depend_on_the_batch_or_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path, instances: Path
) -> None:
    flags = (weights, "--data", instances, "--baselines", "no", "--tokens", "cls+gem")
    scores = [
        run(tmp_path, capsys, *flags, *more)["scores"]
        for more in ((), ("--no-cache", "--batch", 1), ("--no-cache", "--batch", 13))
    ]
    assert scores[0] == scores[1] == scores[2]


def literal(order: list[int], right: set[int], junk: set[int]) -> float:
    kept = [place for place in order if place not in junk]
    area, found = 0.0, 0
    for rank, place in enumerate(kept):
        if place in right:
            before = found / rank if rank else 1.0
            found += 1
            area += (before + found / (rank + 1)) / 2 / len(right)
    return area


def rankings_of(folder: Path, crop: bool, side: int = 32, scales: tuple[float, ...] = (1.0,)) -> list[list[int]]:
    """By :func:`v1`, one image after the other; queries are cropped by Pillow."""
    told, model, cut = ground_truth(), vit(), folder / "cut.png"
    database = torch.stack([v1(model, folder / "jpg" / f"{name}.jpg", side, scales) for name in told["imlist"]])
    orders = []
    for name, query in zip(told["qimlist"], TRUE, strict=True):
        image = Image.open(folder / "jpg" / f"{name}.jpg")
        (image.crop(query["bbx"]) if crop else image).save(cut)
        orders.append((database @ v1(model, cut, side, scales)).argsort(descending=True).tolist())
    return orders


@pytest.mark.parametrize("crop", [True, False], ids=["cropped", "whole"])
def test_oxford(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path, crop: bool) -> None:
    folder = revisited(tmp_path)
    (write_mat if crop else write_pickle)(folder)
    flags = () if crop else ("--no-crop-queries", "--baselines", "no")
    told = run(tmp_path, capsys, weights, "--data", folder, *flags)
    orders = rankings_of(folder, crop)
    easy, hard, junk = ([{*query[kind]} for query in TRUE] for kind in ("easy", "hard", "junk"))
    medium = [literal(order, easy[i] | hard[i], junk[i]) for i, order in enumerate(orders)]
    scores = told["scores"]
    assert scores["map_medium"]["value"] == pytest.approx(100 * np.mean(medium), abs=1e-3)
    assert scores["map_hard"]["value"] == pytest.approx(100 * literal(orders[0], hard[0], junk[0] | easy[0]), abs=1e-3)
    assert told["headline"] == "map_medium"
    assert told["published"] is None
    assert told["also"]["queries_of"]["map_hard"] == 1  # nothing is hard for the second query
    assert told["protocol"]["crop_queries"] is crop
    assert told["data"]["name"] == "roxford5k"
    assert (told["data"]["queries"], told["data"]["database"], told["data"]["images"]) == (2, 6, 8)
    assert set(told["baselines"]) == ({"pixels", "random_init"} if crop else set())


def test_oxford_with_images_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    """A wrong one, and one of the two that are right for the second query: what comes behind them moves up."""
    folder = revisited(tmp_path)
    write_pickle(folder)
    orders = rankings_of(folder, True)
    for lost in (2, 3):
        (folder / "jpg" / f"all_souls_{lost:06d}.jpg").write_bytes(b"nothing")
    told = run(tmp_path, capsys, weights, "--data", folder, "--baselines", "no")
    left = [[place for place in order if place not in (2, 3)] for order in orders]
    want = [literal(left[0], {0, 1, 4}, set()), literal(left[1], {5}, set())]
    with np.load(tmp_path / "out" / "retrieval.npz") as arrays:
        assert arrays["part"].tolist() == pytest.approx(want)
        assert arrays["top"].tolist() == [[place for place in order if place != 2][:4] for order in left]
    assert (told["data"]["database"], told["data"]["unreadable"]) == (4, 2)
    assert "2 images could not be read and were left out" in told["notes"]


@pytest.mark.parametrize(("name", "side"), [("roxford5k", 224), ("rparis6k", 512)])
def test_as_dino_v1_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path, name: str, side: int
) -> None:
    """Images are smaller than that here, so they stay as they are."""
    folder, scales = revisited(tmp_path, name), THREE if name == "rparis6k" else (1.0,)
    write_pickle(folder)
    known = shutil.copy(weights, tmp_path / "dino_deitsmall16_pretrain.safetensors")
    told = run(tmp_path, capsys, known, "--data", folder, "--published", "v1", "--baselines", "no")
    orders = rankings_of(folder, False, side, scales)
    easy = [literal(order, {*q["easy"]}, {*q["hard"], *q["junk"]}) for q, order in zip(TRUE, orders, strict=True)]
    assert told["scores"]["map_easy"]["value"] == pytest.approx(100 * np.mean(easy), abs=1e-3)
    assert told["protocol"]["size"] == side
    assert told["protocol"]["scales"] == pytest.approx(scales)
    assert told["protocol"]["crop_queries"] is False
    assert told["published"]["score"] == {"roxford5k": 41.8, "rparis6k": 63.1}[name]


def test_whitening_is_learned_from_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path, instances: Path
) -> None:
    folder = revisited(tmp_path)
    write_pickle(folder)
    told = run(tmp_path, capsys, weights, "--data", folder, "--whiten", instances, "--baselines", "no")
    model, look = vit(), Look(side=32)
    learned = Whitening.fit(describe(model, FolderSource(instances), look).vectors)
    names = [f"{name}.jpg" for name in ground_truth()["imlist"]]
    images = FolderSource(folder / "jpg")
    found = describe(model, images, look)
    row = {images.name(i): vector for i, vector in zip(found.places.tolist(), found.vectors, strict=True)}
    database = F.normalize(learned(torch.stack([row[name] for name in names])), dim=1)
    (tmp_path / "query").mkdir()
    query = Image.open(folder / "jpg" / "all_souls_000091.jpg").crop(TRUE[0]["bbx"])
    query.save(tmp_path / "query" / "q.png")
    vector = learned(describe(model, FolderSource(tmp_path / "query"), look).vectors)[0]
    order = (database @ vector).argsort(descending=True).tolist()
    with np.load(tmp_path / "out" / "retrieval.npz") as arrays:
        assert arrays["part"][0] == pytest.approx(literal(order, {0, 1, 4}, {2}))
    assert told["protocol"]["whiten"] == str(instances)


def test_google_landmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path) -> None:
    """Queries 0 and 2 show what index images 0 and 2 show; query 0 has 3 as well."""
    told = run(tmp_path, capsys, weights, "--data", google(tmp_path / "data"), "--baselines", "no")
    assert told["scores"]["map_100_public"]["value"] == 100
    with np.load(tmp_path / "out" / "retrieval.npz") as arrays:
        (score,) = arrays["part"].tolist()
        rank = arrays["top"][0].tolist().index(3)
    assert score == pytest.approx((1 + 2 / (1 + rank)) / 2)
    assert told["data"]["name"] == "gldv2"


def test_the_judged_part_of_a_folder_with_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, weights: Path
) -> None:
    """Whitening learns from the other part."""
    for split, count in (("train", 5), ("val", 2)):
        for thing in range(3):
            for i in range(count):
                write(tmp_path / "data" / split / str(thing) / f"{i}.png", photo(40, 40, seed=thing))
    (tmp_path / "data" / "train" / "0" / "0.png").write_bytes(b"nothing")  # of which whitening alone knows
    flags = ("--data", tmp_path / "data", "--whiten", tmp_path / "data", "--baselines", "no")
    told = run(tmp_path, capsys, weights, *flags)
    assert "left out of the evaluation: cannot read image 0/0.png" in caplog.text
    assert "whitening learns 96 directions from 14 images" in caplog.text
    assert told["data"]["split"] == "val/"
    assert told["data"]["unreadable"] == 0
    assert told["data"]["database"] == 6
    assert [name for name in told["scores"] if name.startswith("recall")] == ["recall_1"]  # of 5 others, 5 are all
    assert told["scores"]["map"]["value"] == 100


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path, instances: Path) -> None:
    one, singles, flat = (tmp_path / name for name in ("one", "singles", "flat"))
    for i in range(3):
        for path in (one / "a" / f"{i}.png", singles / str(i) / "0.png", flat / f"{i}.png"):
            write(path, photo(20, 20, seed=i))
    folder = revisited(tmp_path)
    bad = folder / "gnd_roxford5k.pkl"
    bad.write_bytes(pickle.dumps({"imlist": print}))
    for flags, says in [
        (("--data", one), "are of one class, so any ranking is right"),
        (("--data", singles), "has two images: there is nothing to find"),
        (("--data", flat), "has 3 images of no class, such as 0.png"),
        (("--data", folder), "it holds builtins.print, and ground truth holds numbers"),
        (("--data", tmp_path), "it holds builtins.print"),
        (("--data", copydays(tmp_path / "copies")), "is laid out as Copydays, whose folders are not instances"),
        (("--data", instances, "--published", "v1"), "--published v1 is of roxford5k and rparis6k"),
        (("--data", folder, "--published", "v1", "--size", 64), "--size=64 must be None, or left out"),
        (("--data", instances, "--multi-scale"), "--multi-scale is for landmarks"),
        (("--data", instances, "--distractors", one), "--distractors go with roxford5k and rparis6k"),
        (("--data", instances, "--whiten", tmp_path / "none"), "does not exist"),
    ]:
        assert says in refused(tmp_path, capsys, weights, *flags), flags
    write_pickle(folder)
    assert "landmarks are seen whole" in refused(tmp_path, capsys, weights, "--data", folder, "--crop-ratio", 0.9)
    bad.unlink()
    table(folder / "gnd_roxford5k.csv", [("a",)])
    assert "found gnd_roxford5k.csv, jpg; looked for jpg/ beside" in refused(
        tmp_path, capsys, weights, "--data", folder
    )


def test_best_and_worst_queries() -> None:
    scores = np.array([0.5, np.nan, 1.0, 0.0, 0.7])
    assert extremes(scores) == ([2, 4], [3, 0])
    assert extremes(scores[:1]) == ([0], [])
    best, worst = extremes(np.linspace(0, 1, 40))
    assert best == [39, 38, 37, 36, 35, 34, 33, 32]
    assert worst == [0, 1, 2, 3, 4, 5, 6, 7]
