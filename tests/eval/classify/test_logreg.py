"""Logistic regression against scikit-learn's own, and what its penalty is chosen on."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from fastdino.config import ConfigError
from fastdino.data.benchmarks.class_folders import Sets, bank_and_test
from fastdino.eval import EvaluationError, Features, intervals
from fastdino.eval.classify import logreg as room
from fastdino.eval.classify.classification import held_out
from fastdino.eval.classify.logreg import LogReg, fit, solver, standardized, told_by
from tests.eval.classify.class_images import CONFIG, Poisoned, folders, subject


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 20)


def clouds(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, 4, generator=torch.Generator().manual_seed(9))
    return (centers[y] + torch.randn(n, 4, generator=generator)).double(), y


@pytest.mark.parametrize("classes", [2, 3])
def test_coefficients_are_those_of_a_fit_from_nothing(classes: int) -> None:
    """Started from the fit with another penalty, it ends where scikit-learn ends."""
    x, y = clouds(60, classes)
    model = solver()
    for c in (1e-3, 0.1, 10.0):
        assert fit(model, x, y, c)
        plain = LogisticRegression(C=c, max_iter=10_000, tol=1e-10).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-4)
        np.testing.assert_allclose(model.intercept_, plain.intercept_, atol=1e-4)
    queries, _ = clouds(20, classes, seed=1)
    logits = told_by(model, queries, classes)
    np.testing.assert_allclose(logits.softmax(1), plain.predict_proba(queries.numpy()), atol=1e-4)
    more = told_by(model, queries, classes + 1)
    torch.testing.assert_close(more.softmax(1)[:, :classes], logits.softmax(1))
    assert more.softmax(1)[:, classes].max() < 1e-40, "a class without training images"


def test_weights_are_scikit_learns_balanced() -> None:
    x, y = clouds(60, 3)
    keep = (y > 0) | (torch.arange(60) < 12)
    model = solver("weights")
    fit(model, x[keep], y[keep], 1.0)
    share = torch.tensor([1 / (y[keep] == c).sum() for c in range(3)])
    plain = LogisticRegression(max_iter=10_000, tol=1e-10)
    plain.fit(x[keep].numpy(), y[keep].numpy(), sample_weight=(share[y[keep]] * keep.sum() / 3).numpy())
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-4)


def test_standardized() -> None:
    """By the training images: 0, 2 and 4 have the mean 2 and the deviation 1.633; a constant becomes 0."""
    of = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    assert standardized(torch.tensor([[4.0, 5.0]]), of).tolist() == [[pytest.approx(2 / 1.632993), 0.0]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp("images"))


def evaluation(data: Path, **flags: Any) -> LogReg:
    return LogReg(data=str(data), num_workers=0, **{"baselines": "no", "cache": False, "c_values": 5, **flags})


def test_the_whole_evaluation(data: Path, tmp_path: Path) -> None:
    told = evaluation(data, baselines="yes", c_values=12)(subject(tmp_path)).write(tmp_path)
    scores, also = told["scores"], told["also"]
    assert [*also["values"]] == [f"{10.0**power:.3g}" for power in range(-6, 6)]
    assert scores["published_style"]["value"] >= scores["accuracy"]["value"] > 50
    assert also["values"][also["C"]]["test"] == pytest.approx(scores["accuracy"]["value"], abs=1e-3)
    assert also["held_out"] == max(pair["held_out"] for pair in also["values"].values())
    assert told["baselines"].keys() == {"pixels", "random_init"}
    assert {"logreg.png", "logreg-reliability.png"} <= {*told["files"]}


def test_the_choice_on_digits() -> None:
    """scikit-learn's digits: the same C and predictions as by scikit-learn, step by step."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    bank, test = (Features(x[at].float(), y[at], torch.arange(len(y[at]))) for at in (slice(0, 200), slice(200, 400)))
    picked = LogReg(c_values=4).choose(bank, test, 10)
    learn, choose = held_out(bank.labels)
    right, order = {}, {}
    for c in np.logspace(-6, 5, 4):
        plain = LogisticRegression(C=c, max_iter=1000).fit(x[:200][learn].numpy(), y[:200][learn].numpy())
        right[c] = plain.score(x[:200][choose].numpy(), y[:200][choose].numpy())
        order[c] = right[c], -log_loss(y[:200][choose].numpy(), plain.predict_proba(x[:200][choose].numpy()))
    best = max(order, key=lambda c: order[c])
    assert picked.also["C"] == f"{best:.3g}"
    assert picked.also["held_out"] == pytest.approx(100 * right[best], abs=1e-4)
    plain = LogisticRegression(C=best, max_iter=1000).fit(x[:200].numpy(), y[:200].numpy())
    assert (picked.logits.argmax(1).numpy() == plain.predict(x[200:400].numpy())).mean() > 0.98


def judged(sets: Sets, logreg: LogReg, tmp_path: Path) -> tuple[float, np.ndarray, dict[str, Any]]:
    found = logreg.judge(subject(tmp_path), sets)
    return found.scores["accuracy"].value, found.arrays["predictions"], found.also


@pytest.mark.parametrize("balance", ["none", "weights", "logit-adjust"])
def test_poisoned_test_labels_change_the_score_alone(data: Path, tmp_path: Path, balance: Any) -> None:
    sets = bank_and_test(str(data), CONFIG.data)
    clean, poisoned = (
        judged(sets._replace(test=test), evaluation(data, balance=balance), tmp_path)
        for test in (sets.test, Poisoned(sets.test))
    )
    assert np.array_equal(clean[1], poisoned[1])
    assert [clean[2][name] for name in ("C", "held_out")] == [poisoned[2][name] for name in ("C", "held_out")]
    assert clean[2]["calibration"]["temperature"] == poisoned[2]["calibration"]["temperature"]
    assert clean[0] > poisoned[0]


def test_poisoned_test_labels_do_not_move_the_choice() -> None:
    """Though the C that is best on the test images is another then."""
    bank, test = (Features(x.float(), y, torch.arange(len(y))) for x, y in (clouds(40, 3), clouds(60, 3, seed=1)))
    logreg = LogReg(c_values=5)
    clean, poisoned = (logreg.choose(bank, test._replace(labels=y), 3) for y in (test.labels, (test.labels + 1) % 3))
    assert clean.also["best_C_on_test"] != poisoned.also["best_C_on_test"]
    assert [clean.also[name] for name in ("C", "held_out")] == [poisoned.also[name] for name in ("C", "held_out")]
    assert torch.equal(clean.logits, poisoned.logits)
    assert clean.temperature == poisoned.temperature


def test_what_does_not_converge_is_named(data: Path, tmp_path: Path) -> None:
    found = evaluation(data, iterations=3).judge(subject(tmp_path), bank_and_test(str(data), CONFIG.data))
    assert len(found.notes) == 1
    assert found.notes[0].startswith("not converged after 3 iterations: C = ")
    assert found.protocol["iterations"] == 3


def test_the_sweep_ends_far_beyond_the_best() -> None:
    bank, test = (Features(x.float(), y, torch.arange(len(y))) for x, y in (clouds(200, 3), clouds(60, 3, seed=1)))
    tried = [float(c) for c in LogReg(c_values=45).choose(bank, test, 3).also["values"]]
    values = LogReg(c_values=45).choose(bank, test, 3).also["values"]
    best = next(float(c) for c, x in values.items() if x["held_out"] == max(y["held_out"] for y in values.values()))
    assert tried[-2] <= room.BEYOND * best < tried[-1] < 1e5


def test_a_basis_of_the_span_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three equal channels, as of grey pixels: a third of the numbers, the same logits."""
    (x, y), (queries, _) = clouds(60, 3), clouds(20, 3, seed=1)
    tripled, asked = x.repeat(1, 3), queries.repeat(1, 3)
    monkeypatch.setattr(room, "WIDE", 11)
    narrow, narrow_asked = room.within_span(tripled, asked)
    assert narrow.shape[1] == 4
    torch.testing.assert_close(narrow @ narrow.T, tripled @ tripled.T)
    models = solver(), solver()
    for model, features in zip(models, (tripled, narrow), strict=True):
        assert fit(model, features, y, 0.1)
    got, want = told_by(models[1], narrow_asked, 3), told_by(models[0], asked, 3)
    torch.testing.assert_close(got.softmax(1), want.softmax(1), atol=1e-4, rtol=0)
    assert room.within_span(x, queries)[0] is x, "narrow ones stay"
    few, few_asked = room.within_span(tripled[:3], asked)  # fewer images than numbers: another way to the same
    assert few.shape[1] == 3
    torch.testing.assert_close(few @ few.T, tripled[:3] @ tripled[:3].T)
    torch.testing.assert_close(few_asked @ few.T, asked @ tripled[:3].T)
    monkeypatch.setattr(room, "WIDE", 3)
    assert room.within_span(x, queries)[0] is x, "so do those that fill their space"


def test_what_would_take_hours_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST", 36 * 96 * 3)
    evaluation(data).open(subject(tmp_path))
    monkeypatch.setattr(room, "MOST", 36 * 96 * 3 - 1)
    with pytest.raises(EvaluationError, match=r"36 images, 96 numbers of each and 3 classes would .* linear"):
        evaluation(data).open(subject(tmp_path))


def test_without_scikit_learn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(EvaluationError, match=r"needs scikit-learn: pip install 'fastdino\[eval\]'"):
        evaluation(data).open(subject(tmp_path))


def test_flags_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="--c-values=0"):
        LogReg(c_values=0)
