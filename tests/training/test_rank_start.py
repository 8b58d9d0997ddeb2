"""RankMe while training: measured before the first step, kept with the run, compared with at each k-NN."""

import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastdino
from fastdino.config import Config
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.eval import Reading, extract
from fastdino.eval.unlabelled.rank import rankme
from fastdino.model import build_network
from fastdino.training import checkpoint, online_knn
from fastdino.training.preemption import Preempted
from tests.training.knn_cases import config
from tests.training.test_online_knn import images, make


def lines(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, those of evaluations."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "rankme" in line]


def at_start_set_to(run: Path, value: float) -> None:
    """As if the run had begun with another RankMe."""
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [line | {"rankme_at_start": value} if "rankme_at_start" in line else line for line in told]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def longer(settings: Config, epochs: int, **run: Any) -> Config:
    return replace(settings, run=replace(settings.run, epochs=epochs, **run))


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return config(tmp_path / "run", make(tmp_path / "knn"), world_size=1)


def test_a_run_keeps_its_start(settings: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the weights that it starts from; a resumption compares with it, and says so where it has fallen."""
    caplog.set_level(logging.INFO)
    run = settings.run.dir
    fastdino.train(longer(settings, 1))
    first, second = lines(run)
    backbone = build_network(settings, teacher=True).backbone
    bank = bank_and_test(settings.run.knn_root, settings.data).bank
    start = rankme(extract(backbone, bank, Reading(size=32, normalize="image"), num_workers=0).vectors)
    assert (first["step"], first["rankme"]) == (0, pytest.approx(start, rel=1e-6))
    assert second["step"] == 2
    assert second["rankme"] != first["rankme"] == first["rankme_at_start"] == second["rankme_at_start"]
    gauges = dict(line.rsplit(" ", 1) for line in (run / "metrics.prom").read_text().splitlines() if line[0] != "#")
    assert float(gauges[f'fastdino_rankme{{run="{run}"}}']) == second["rankme"]
    assert float(gauges[f'fastdino_rankme_at_start{{run="{run}"}}']) == first["rankme"]
    assert "epoch 0: RankMe" in caplog.text
    caplog.clear()
    at_start_set_to(run, 1000.0)
    fastdino.train(longer(settings, 3))
    assert [line["step"] for line in lines(run)] == [0, 2, 4, 6]
    assert [line["rankme_at_start"] for line in lines(run)] == [1000.0] * 4
    alarm = f"epoch 2: RankMe of the teacher is {lines(run)[2]['rankme']:.1f}, and was 1000.0 before the first step"
    assert caplog.text.count("before the first step") == 1
    assert alarm in caplog.text
    caplog.clear()
    images(tmp_path / "other/cat", 8)
    images(tmp_path / "other/kitten", 8)
    fastdino.train(longer(settings, 4, knn_root=str(tmp_path / "other")))
    assert "rankme_at_start" not in lines(run)[-1], "of other images"
    assert "before the first step" not in caplog.text


def test_the_start_is_measured_once(settings: Config) -> None:
    """A process that was killed before its first checkpoint has measured it; one that was stopped meanwhile has not."""
    run, original = settings.run.dir, online_knn.rankme

    def stopped(features: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_knn, "rankme", stopped)
        with pytest.raises(Preempted, match="before step 1"):
            fastdino.train(longer(settings, 1))
    assert not checkpoint.Folder(run / "checkpoints").steps()
    fastdino.train(longer(settings, 1))
    shutil.rmtree(run / "checkpoints")
    at_start_set_to(run, 1000.0)
    fastdino.train(longer(settings, 1))
    assert [(line["step"], line["rankme_at_start"]) for line in lines(run)] == [(0, 1000.0), (2, 1000.0)]


def test_rankme_is_of_images_of_all_classes(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large bank, whose classes lie one after the other, it takes some of each."""
    monkeypatch.setattr(online_knn, "RANKED", 5)
    fastdino.train(longer(settings, 1))
    first, second = lines(settings.run.dir)
    assert 1 < first["rankme"] < 5
    assert 1 < second["rankme"] < 5, "of the same five"
    bank = bank_and_test(settings.run.knn_root, settings.data).bank
    backbone = build_network(settings, teacher=True).backbone
    vectors = extract(backbone, bank, Reading(size=32, normalize="image"), num_workers=0).vectors
    assert first["rankme"] == pytest.approx(rankme(vectors[[0, 5, 10, 15, 20]]), rel=1e-6)


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_on_a_folder_hears_of_knn_root(
    settings: Config, every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless it does without on purpose."""
    caplog.set_level(logging.INFO)
    folder = longer(settings, 1, knn_root="", knn_every=every)
    fastdino.train(replace(folder, data=replace(folder.data, root=str(tmp_path / "knn/train"), max_bad=1.0)))
    assert caplog.text.count("--run.knn-root") == every
