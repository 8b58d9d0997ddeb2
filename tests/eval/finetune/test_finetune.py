"""``fastdino eval finetune``, whole: what each mode writes and keeps, and what it never sees."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fastdino.cli import main
from fastdino.config import Config, ConfigError, ModelConfig
from fastdino.distributed import Ranks
from fastdino.eval import EvaluationError, Features, Subject, extract
from fastdino.eval.classify.classification import held_out
from fastdino.eval.classify.logreg import solver
from fastdino.eval.controls import RawPixels
from fastdino.eval.finetune import finetune as room
from fastdino.eval.finetune.finetune import FineTune
from fastdino.eval.finetune.tuning import STRENGTHS, BalancedLoss, solve
from fastdino.eval.result import Found
from fastdino.model import ViT, build_backbone, export_backbone, restore_backbone
from fastdino.recipes import get

CONFIG = get("demo")
OURS = {"patch_size": 6, "img_size": 36, "embed_dim": 96, "depth": 4, "num_heads": 4, "mlp_ratio": 4}
MODES = ("head", "bias", "lora", "lp-ft", "full")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ of 60 pictures of stripes and noise, in three classes by their direction: 48 and 12."""
    root, generator = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    down, right = np.mgrid[:36, :36]
    for name, places in {"both": down + right, "columns": right, "rows": down}.items():
        for number in range(20):
            folder = root / ("test" if number % 5 == 0 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            waves = np.sin(places / 2 + generator.uniform(0, 6, size=())) + generator.normal(size=(36, 36))
            picture = (128 + 40 * waves).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).convert("RGB").save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    vit = ViT("nano", patch_size=6, image_size=36, pos_embed="sincos", init="xavier", seed=1)
    export_backbone(vit, path, {"config": CONFIG.to_json()})
    return path


def run(weights: Path, data: Path, out: Path, *flags: str) -> dict[str, Any]:
    """The whole command, without baselines; what it wrote."""
    common = ["--num-workers", "0", "--baselines", "no", "--no-cache", "--out", str(out), "--device", "cpu"]
    main(["eval", "finetune", str(weights), "--data", str(data), *common, *flags])
    return json.loads((out / "finetune.json").read_text())


def told(out: Path) -> list[int]:
    return np.load(out / "finetune.npz")["predictions"].tolist()


def subject_of(weights: Path, folder: Path) -> Subject:
    backbone, config = restore_backbone(weights)
    return Subject(backbone.eval(), config, folder, {"path": str(weights)})


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_as_a_command(
    mode: str, stripes: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file loads in timm, strictly, with the names of the classes, and gives our logits and what was judged."""
    kept, write = list[Any](), FineTune._write
    monkeypatch.setattr(FineTune, "_write", lambda self, model, *rest: (kept.append(model), write(self, model, *rest)))
    flags = [] if mode == "head" else ["--epochs", "2", "--lr", "1e-3", "--batch", "16"]
    found = run(weights, stripes, tmp_path, "--mode", mode, *flags)
    assert found["protocol"]["mode"] == mode
    assert [*found["scores"]] == ["accuracy", "balanced_accuracy", "macro_f1"]
    assert {*tmp_path.iterdir()} >= {tmp_path / name for name in ("finetune.png", "finetuned.safetensors")}
    assert found["protocol"]["learned_from"] + found["protocol"]["held_out"] == 48
    if mode != "head":
        assert (found["protocol"]["steps"], found["protocol"]["batch"]) == (3, 14)
        assert found["protocol"]["lr"] == pytest.approx(1e-3 * 14 / 256)
        assert len(found["also"]["held_out_loss"]) == 3
        assert (tmp_path / "finetune-loss.png").stat().st_size > 1000
    with safe_open(tmp_path / "finetuned.safetensors", "pt") as file:
        texts = file.metadata()
    assert json.loads(texts["classes"]) == ["both", "columns", "rows"]
    model = timm.create_model("vit_small_patch16_224", num_classes=3, **OURS)
    state = load_file(tmp_path / "finetuned.safetensors")
    model.load_state_dict(state, strict=True)
    images = torch.randn(4, 3, 36, 36)
    with torch.no_grad():
        assert torch.allclose(kept[0](images), model.eval()(images), atol=1e-4)
    changed = {name for name, x in load_file(weights).items() if not torch.equal(x, state[name])}
    assert ("blocks.0.attn.qkv.weight" in changed) == (mode in ("lora", "full"))
    assert ("blocks.0.mlp.fc1.weight" in changed) == (mode == "full")
    reading = FineTune().reading(CONFIG)
    assert json.loads(texts["reading"]) == dataclasses.asdict(reading)
    test = FineTune(data=str(stripes)).open(subject_of(weights, tmp_path)).test
    logits = extract(model, test, reading, num_workers=0).vectors
    assert logits.argmax(1).tolist() == told(tmp_path)


def test_poisoned_test_labels_change_nothing_but_the_score(stripes: Path, weights: Path, tmp_path: Path) -> None:
    """The classes of the test images are turned round; the classifier, and what it tells, stay to the bit."""
    poisoned = tmp_path / "poisoned"
    shutil.copytree(stripes, poisoned)
    for old, new in (("both", "x"), ("columns", "both"), ("rows", "columns"), ("x", "rows")):
        (poisoned / "test" / old).rename(poisoned / "test" / new)
    flags = ("--mode", "full", "--epochs", "3", "--lr", "2e-2", "--batch", "16")
    torch.manual_seed(1)
    clean = run(weights, stripes, tmp_path / "a", *flags)
    torch.manual_seed(2)
    found = run(weights, poisoned, tmp_path / "b", *flags)
    one, other = (load_file(tmp_path / x / "finetuned.safetensors") for x in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = found["also"]["held_out_loss"]
    assert losses == clean["also"]["held_out_loss"]
    assert losses[-1] < losses[0] - 0.01, "it learns"
    assert sorted(told(tmp_path / "a")) == sorted(told(tmp_path / "b"))
    assert found["scores"] != clean["scores"]
    run(weights, stripes, tmp_path / "c", *flags, "--seed", "1")
    assert not torch.equal(load_file(tmp_path / "c" / "finetuned.safetensors")["head.weight"], one["head.weight"])


def test_the_test_images_are_seen_once_and_last(stripes: Path, weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    evaluation = FineTune(data=str(stripes), mode="bias", epochs=2, num_workers=0, cache=False)
    subject = subject_of(weights, tmp_path)
    data, seen = evaluation.open(subject), list[tuple[str, int]]()
    sources = {"bank": data.bank.read, "test": data.test.read}
    for name in ("bank", "test"):

        def read(index: int, *room: Any, name: str = name, source: Any = sources[name]) -> Any:
            seen.append((name, index))
            return source(index, *room)

        monkeypatch.setattr(getattr(data, name), "read", read)
    evaluation.judge(subject, data)
    assert seen[-12:] == [("test", i) for i in range(12)]
    assert {name for name, _ in seen[:-12]} == {"bank"}
    labels = torch.tensor([data.bank.label(i) for i in range(48)])
    learn, held = held_out(labels, seed=0)
    counts = torch.tensor([i for _, i in seen[:-12]]).bincount(minlength=48)
    assert {*counts[learn].tolist()} == {2}, "once an epoch"
    assert {*counts[held].tolist()} == {3}, "before the first and after each"


def clouds(n: int, seed: int, classes: int = 3) -> Features:
    """Overlapping classes, of which the first is the largest; a feature that is always 7."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) ** 2 * classes).long()
    centers = torch.randn(classes, 5, generator=torch.Generator().manual_seed(9))
    x = centers[labels] + torch.randn(n, 5, generator=generator)
    return Features(torch.cat([3 + 10 * x, torch.full((n, 1), 7.0)], dim=1), labels, torch.arange(n))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("balance", ["none", "weights", "logit-adjust"])
def test_the_head_is_scikit_learns(balance: Any, classes: int) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    learn, held, fresh = (clouds(n, seed, classes) for seed, n in enumerate((120, 60, 40)))
    counts = learn.labels.bincount()
    found = solve(learn, held, BalancedLoss(counts, balance))
    x = learn.vectors.double().numpy()
    mean, std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    weight = "balanced" if balance == "weights" else None
    models = [linear.LogisticRegression(C=c, max_iter=1000, tol=1e-6, class_weight=weight) for c in STRENGTHS]
    theirs = {model.C: model.fit((x - mean) / std, learn.labels) for model in models}
    shares = theirs[found.c].predict_proba((fresh.vectors.double().numpy() - mean) / std)
    logits = torch.tensor(shares).log()
    if balance == "logit-adjust":
        logits = logits - (counts / counts.sum()).log()
    ours = fresh.vectors @ found.weight.T + found.bias
    assert torch.allclose(ours.softmax(1), logits.softmax(1).float(), atol=1e-3)
    losses = {}
    for c, model in theirs.items():
        each = model.predict_log_proba((held.vectors.double().numpy() - mean) / std)[np.arange(60), held.labels]
        of = np.ones(60) if weight is None else (1 / counts[held.labels]).numpy()
        losses[c] = -(each * of).sum() / of.sum()
    assert found.c == min(losses, key=lambda c: losses[c])


def test_lp_ft_begins_with_the_head_of_logistic_regression(stripes: Path, weights: Path, tmp_path: Path) -> None:
    """At a rate of nothing it tells what mode head tells, and what scikit-learn tells of the features itself."""
    head = run(weights, stripes, tmp_path / "head", "--mode", "head")
    found = run(weights, stripes, tmp_path / "lp-ft", "--mode", "lp-ft", "--epochs", "1", "--lr", "1e-30")
    heads = [load_file(tmp_path / mode / "finetuned.safetensors")["head.weight"] for mode in ("head", "lp-ft")]
    assert torch.allclose(*heads)
    assert found["also"]["held_out_loss"][0] == found["also"]["held_out_loss"][1]

    subject, evaluation = subject_of(weights, tmp_path), FineTune(data=str(stripes), num_workers=0, cache=False)
    sets = evaluation.open(subject)
    bank, test = evaluation.both(subject, sets)
    learn, _ = held_out(bank.labels, seed=0)
    std, mean = torch.std_mean(bank.vectors[learn].double(), dim=0, correction=0)
    model = solver().set_params(C=head["protocol"]["C"])
    model.fit(((bank.vectors[learn] - mean) / std).numpy(), bank.labels[learn].numpy())
    want = model.predict(((test.vectors - mean) / std).numpy()).tolist()
    assert told(tmp_path / "lp-ft") == told(tmp_path / "head") == want
    assert len({*want}) > 1


def test_what_does_not_help_is_not_kept(stripes: Path, weights: Path, tmp_path: Path) -> None:
    """A rate that ruins the weights: the head of the start stays, and a note says so."""
    found = run(weights, stripes, tmp_path, "--mode", "lp-ft", "--lr", "100", "--epochs", "9", "--patience", "2")
    assert found["also"]["best_epoch"] == 0
    assert len(found["also"]["held_out_loss"]) <= 3
    assert any("the head alone is kept" in note for note in found["notes"])
    kept, before = load_file(tmp_path / "finetuned.safetensors"), load_file(weights)
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_baselines_learn_in_the_same_way(stripes: Path, weights: Path, tmp_path: Path) -> None:
    """Pixels have a head; a random start is trained; neither writes a classifier."""
    evaluation = FineTune(data=str(stripes), mode="bias", epochs=1, num_workers=0, cache=False, out=tmp_path)
    result = evaluation(subject_of(weights, tmp_path))
    assert {name: found.protocol["mode"] for name, found in result.baselines.items()} == {
        "pixels": "head", "random_init": "bias"
    }  # fmt: skip
    kept = load_file(tmp_path / "finetuned.safetensors")
    assert torch.equal(kept["blocks.0.mlp.fc1.weight"], load_file(weights)["blocks.0.mlp.fc1.weight"])


def test_unequal_classes_are_judged_by_balanced_accuracy(stripes: Path, weights: Path, tmp_path: Path) -> None:
    """And a class with one image is learned from, and named."""
    few = tmp_path / "few"
    shutil.copytree(stripes, few)
    for path in sorted((few / "train" / "columns").iterdir())[1:]:
        path.unlink()
    found = run(weights, few, tmp_path / "out", "--mode", "head", "--balance", "logit-adjust")
    assert found["headline"] == next(iter(found["scores"])) == "balanced_accuracy"
    assert any("one training image, and none held out, of columns" in note for note in found["notes"])
    plain = run(weights, few, tmp_path / "plain", "--mode", "head")
    logits = [load_file(tmp_path / x / "finetuned.safetensors")["head.bias"] for x in ("out", "plain")]
    assert (logits[0] - logits[1]).argmax() == 1, "what is rare is told more often"
    assert plain["protocol"]["balance"] == "none"


def test_an_interrupted_run_leaves_nothing(stripes: Path, weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "tune", stopped)
    with pytest.raises(SystemExit):
        run(weights, stripes, tmp_path / "out", "--mode", "full")
    assert not (tmp_path / "out").exists()


def test_bf16_and_other_backbones(stripes: Path, tmp_path: Path) -> None:
    """A network of timm without numbered blocks: no decay by the layer, and its own name for the head."""
    evaluation = FineTune(
        data=str(stripes), mode="full", epochs=1, num_workers=0, cache=False, baselines="no", precision="bf16", size=32
    )
    config = Config(model=ModelConfig(arch="timm:resnet10t", drop_path=0.0))
    backbone = build_backbone(config.model, 32).eval()
    found = evaluation(Subject(backbone, config, tmp_path)).found
    assert (found.protocol["layer_decay"], found.protocol["drop_path"]) == (1.0, 0.0)
    file = next(tmp_path.glob("eval/*/finetuned.safetensors"))
    timm.create_model("resnet10t", num_classes=3).load_state_dict(load_file(file), strict=True)
    with pytest.raises(ConfigError, match=r"--layer-decay needs .* timm:resnet10t is none"):
        dataclasses.replace(evaluation, layer_decay=0.5).open(Subject(backbone, config, tmp_path))


def test_a_vit_in_bf16(stripes: Path, weights: Path, tmp_path: Path) -> None:
    found = run(weights, stripes, tmp_path, "--mode", "full", "--epochs", "1", "--precision", "bf16")
    assert found["protocol"]["precision"] == "bf16"
    assert found["protocol"]["drop_path"] == 0.1
    assert load_file(tmp_path / "finetuned.safetensors")["head.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"mode": "bias", "epochs": 0}, "--epochs=0 must be at least 1"),
        ({"mode": "bias", "lr": -1.0}, "--lr"),
        ({"mode": "bias", "layer_decay": 0.5}, "--layer-decay=0.5 must be left out with --mode bias"),
        ({"mode": "full", "layer_decay": 1.5}, "--layer-decay"),
        ({"mode": "head", "epochs": 5}, "--epochs=5 must be left out with --mode head"),
        ({"mode": "head", "lr": 0.1}, "--lr=0.1 must be left out with --mode head"),
        ({"mode": "lora", "lora_rank": 0}, "--lora-rank"),
        ({"patience": 0}, "--patience"),
    ],
)
def test_flags_that_cannot_work(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FineTune(**flags)


def test_what_cannot_be_trained_is_said_before_it_is_tried(stripes: Path, weights: Path, tmp_path: Path) -> None:
    subject, evaluation = subject_of(weights, tmp_path), FineTune(data=str(stripes))
    two = dataclasses.replace(subject, ranks=Ranks(0, 2, 0, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"trains in one process, on one device: start it without a launcher"):
        evaluation.open(two)
    pixels = dataclasses.replace(subject, backbone=RawPixels())
    with pytest.raises(ConfigError, match=r"--mode lp-ft trains weights, and pixels have none: use --mode head"):
        evaluation.open(pixels)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*file.* Name another folder with --out"):
        dataclasses.replace(evaluation, out=tmp_path / "file").open(subject)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"a": 4}, "2 or more are needed|labels are needed"),
        ({"a": 1, "b": 1}, "each class of .* has one training image, so that none can be held out"),
    ],
)
def test_data_that_cannot_work(counts: dict[str, int], says: str, weights: Path, tmp_path: Path, capsys: Any) -> None:
    for split in ("train", "test"):
        for name, count in counts.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (36, 36), (50 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    with pytest.raises(SystemExit) as error:
        run(weights, tmp_path, tmp_path / "out")
    assert error.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_without_scikit_learn_the_extra_is_named_before_anything_is_computed(
    stripes: Path, weights: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """The modes without a solved head do without it, and leave out the baseline that has one."""
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    subject = subject_of(weights, tmp_path)
    for mode in ("head", "lp-ft"):
        with pytest.raises(EvaluationError, match=r"scikit-learn: pip install 'fastdino\[eval\]'"):
            FineTune(data=str(stripes), mode=mode).open(subject)  # type: ignore[arg-type]
    evaluation = FineTune(data=str(stripes), mode="lora")
    evaluation.open(subject)
    with caplog.at_level("INFO"):
        assert [name for name, _ in evaluation.baseline_subjects(subject, Found(**NOTHING))] == ["random_init"]
    assert "left out the baseline of pixels" in caplog.text


NOTHING: dict[str, Any] = {"scores": {}, "protocol": {}, "data": {}}
