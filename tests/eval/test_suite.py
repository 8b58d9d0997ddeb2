"""Results as files, the report of all kinds, and comparisons."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.cli import main
from fastdino.commands import evaluate
from fastdino.eval.published import IMAGENET, published


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Dark and bright noise in class folders: 20 images to learn from, 20 that are judged."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, low in (("dark", 0), ("bright", 120)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                pixels = generator.integers(low, low + 130, (28, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def command(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """What is printed."""
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as end:
            main([*map(str, words)])
        assert end.value.code == code
        return capsys.readouterr().err
    main([*map(str, words)])
    return capsys.readouterr().out


@pytest.fixture
def flags(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDINO_CACHE", str(tmp_path / "cache"))
    return "--data", pictures, "--num-workers", 0, "--normalize", "imagenet"


def test_a_result_and_its_files(tmp_path, pictures, flags, capsys):
    told = json.loads(command(capsys, "eval", "knn", "random:small", *flags, "--neighbors", 3))
    folder = Path(told["out"])
    assert folder == Path(f"eval/knn-{tmp_path.name}-pictures")
    assert json.loads((folder / "knn.json").read_text()) == {k: v for k, v in told.items() if k != "out"}
    assert told.keys() >= {"kind", "headline", "scores", "baselines", "protocol", "data", "weights", "made_by"}
    assert told["baselines"].keys() == {"pixels", "random_init"}
    assert told["baselines"]["random_init"] == told["scores"]["accuracy"], "the subject itself has not learned"
    assert any("random init does as well" in note for note in told["notes"])
    assert len(told["weights"]["sha256"]) == 64
    with np.load(folder / "knn.npz") as arrays:
        assert arrays["labels"].tolist() == [0] * 10 + [1] * 10
        hits = arrays["predictions"] == arrays["labels"]
        assert 100 * hits.mean() == told["scores"]["accuracy"]["value"]
        assert arrays["images"][0] == "bright/0.png"
    assert (folder / "knn.png").read_bytes()[:4] == b"\x89PNG"


def test_poisoned_test_labels_change_nothing_but_the_score(tmp_path, pictures, flags, capsys):
    command(capsys, "eval", "knn", "pixels", *flags, "--neighbors", 3, "--out", tmp_path / "a")
    for i in range(10):  # the folders change places
        (pictures / f"test/dark/{i}.png").rename(pictures / f"test/{i}.png")
        (pictures / f"test/bright/{i}.png").rename(pictures / f"test/dark/{i}.png")
        (pictures / f"test/{i}.png").rename(pictures / f"test/bright/{i}.png")
    command(capsys, "eval", "knn", "pixels", *flags, "--neighbors", 3, "--out", tmp_path / "b")
    first, second = (np.load(tmp_path / name / "knn.npz") for name in "ab")
    assert first["predictions"].tolist() == [*second["predictions"][10:], *second["predictions"][:10]]
    assert (first["predictions"] == first["labels"]).mean() == 1 - (second["predictions"] == second["labels"]).mean()


def test_compare(tmp_path, flags, capsys):
    for weights, folder in (("pixels", "a"), ("random:small", "b")):
        command(
            capsys, "eval", "knn", weights, *flags, "--neighbors", 3, "--baselines", "no", "--out", tmp_path / folder
        )
    files = [tmp_path / name / "knn.json" for name in "ab"]
    scores = [json.loads(file.read_text())["scores"]["accuracy"]["value"] for file in files]
    there, back, same = (
        json.loads(command(capsys, "eval", "compare", *pair)) for pair in (files, files[::-1], files[:1] * 2)
    )
    assert there["scores"] == scores
    assert there["difference"]["value"] == pytest.approx(scores[0] - scores[1], abs=1e-3)
    assert there["difference"]["value"] == -back["difference"]["value"]
    assert there["protocol_differs"] == ["crop", "size"]
    assert {same["difference"][name] for name in ("value", "low", "high")} == {0}
    assert "no difference" in same["verdict"]
    (tmp_path / "a/knn.npz").unlink()
    assert "knn.npz does not say what each image adds" in command(capsys, "eval", "compare", *files, code=2)
    files[0].write_text("[]")
    assert "is no result of fastdino eval" in command(capsys, "eval", "compare", *files, code=2)


def test_the_suite(tmp_path, flags, capsys):
    table = command(
        capsys, "eval", "suite", "random:small", *flags, "--out", tmp_path / "out", "--only", "knn", "attention"
    )
    assert re.search(r"\| knn \| accuracy \| [\d.]+ \| [\d.]+ to [\d.]+ \| [\d.]+ \| [\d.]+ \|  \|", table)
    told = json.loads((tmp_path / "out/report.json").read_text())
    assert told["knn"]["scores"].keys() >= {"accuracy", "balanced_accuracy", "macro_f1"}
    assert table.strip() in (tmp_path / "out/report.md").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<td>knn</td>" in page


def test_what_the_data_has_no_labels_for_is_left_out(tmp_path, pictures, flags, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, file in enumerate(pictures.rglob("*.png")):
        file.rename(plain / f"{i}.png")
    where = ("--data", plain, *flags[2:], "--out", tmp_path / "out")
    command(capsys, "eval", "suite", "random:small", *where, "--only", "knn", "attention")
    told = json.loads((tmp_path / "out/report.json").read_text())
    assert "labels are needed" in told["knn"]["left_out"]
    assert "labels are needed" in (tmp_path / "out/report.html").read_text()
    assert "has labels for no evaluation" in command(
        capsys, "eval", "suite", "random:small", *where, "--only", "knn", code=2
    )
    assert "--only='nearest' must be one of" in command(
        capsys, "eval", "suite", "random:small", *where, "--only", "nearest", code=2
    )


def test_the_cache_is_listed_and_emptied(flags, capsys):
    command(capsys, "eval", "knn", "pixels", *flags, "--neighbors", 3)
    lines = command(capsys, "eval", "cache").splitlines()
    assert len(lines) == 2
    assert all("pixels on" in line for line in lines)
    command(capsys, "eval", "cache", "--remove", lines[0].split()[0])
    assert len(command(capsys, "eval", "cache").splitlines()) == 1
    assert "removed" in command(capsys, "eval", "cache", "--remove", "all")
    assert command(capsys, "eval", "cache") == ""


def test_the_list_names_every_kind(capsys, monkeypatch):
    from fastdino.eval import EVALUATIONS

    monkeypatch.setattr(evaluate, "TIMED", 2)  # one batch that warms up, and one that is timed
    text = command(capsys, "eval", "list")
    assert all(re.search(rf"^{kind} ", text, re.MULTILINE) for kind in EVALUATIONS)
    assert "class folders" in text
    text = command(capsys, "eval", "list", "random:small", "--data", "shapes")
    assert re.search(r"features of 1,000 images at 28 pixels: about \d+\.\d minutes here", text)
    assert "give WEIGHTS and --data" in command(capsys, "eval", "list", "random:small", code=2)


@pytest.mark.parametrize(
    ("file", "score"),
    [
        ("dino_deitsmall16_pretrain.pth", 74.5),
        ("vit_base_patch8_224.dino.safetensors", 77.4),
        ("dino-vits8", 78.3),
        ("dinov2_vitl14_pretrain.pth", 83.5),
        ("dinov2-giant", 83.5),
    ],
)
def test_released_weights_have_their_published_score(file, score):
    found = published("knn", "accuracy", file, IMAGENET)
    assert found is not None
    assert found.score == score
    assert published("knn", "accuracy", file, "") is None, "of other data nothing is published"
    assert published("knn", "accuracy", f"my_{file[:4]}.pth", IMAGENET) is None
