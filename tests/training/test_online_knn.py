"""The k-NN of a run: the same at every world size and stage, never the end of a run, refused before the run begins."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastdino
from fastdino import status
from fastdino.config import ConfigError
from fastdino.distributed import Ranks
from fastdino.eval.unlabelled.rank import rankme
from fastdino.training import checkpoint
from fastdino.training.online_knn import OnlineKnn
from fastdino.training.preemption import PreemptionNotice
from fastdino.training.watchdog import Pulse
from tests.children import forked
from tests.engine.engine_cases import ENGINES
from tests.training import knn_cases
from tests.training.knn_cases import GOING_ON, config


def images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    seed = [*f"{folder.parent.name} {folder.name}".encode()]
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
    for i in range(count):
        Image.fromarray(pixels[i]).save(folder / f"{i}.png")


def make(root: Path) -> Path:
    """25 and 9 images, of which one in the last part cannot be read: at no world size as many for each rank."""
    for split, counts in {"train": (12, 13), "val": (4, 5)}.items():
        for name, count in zip(("cat", "kitten"), counts, strict=True):
            images(root / split / name, count)
    (root / "train/kitten/7.png").write_bytes(b"")
    return root


@pytest.fixture
def knn_root(tmp_path: Path) -> Path:
    return make(tmp_path / "knn")


def scores(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["knn"] for line in lines if "knn" in line]


def test_a_folder_of_classes(tmp_path: Path, knn_root: Path) -> None:
    result = fastdino.train(config(tmp_path / "run", knn_root, world_size=1))
    assert len(scores(result.dir)) == 2
    assert result.knn == scores(result.dir)[-1]


@pytest.mark.parametrize("fault", ["a class that val lacks", "a stray image", "nothing readable"])
def test_refused_before_the_run_begins(tmp_path: Path, knn_root: Path, fault: str) -> None:
    if fault == "a class that val lacks":
        images(knn_root / "train" / "bird", 2)
    elif fault == "a stray image":
        images(knn_root / "val" / "stray", 1)
        (knn_root / "val" / "stray" / "0.png").rename(knn_root / "val" / "0.png")
        (knn_root / "val" / "stray").rmdir()
    else:
        for file in knn_root.glob("val/*/*.png"):
            file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"knn"):
        fastdino.train(config(tmp_path / "run", knn_root))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_teacher_sees_what_a_run_says_and_k_is_what_can_be_read(tmp_path: Path, knn_root: Path) -> None:
    """As much of an image as in training, as many at a time; and files that go bad meanwhile are no fault."""
    shown: list[tuple[int, ...]] = []

    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shown.append(tuple(x.shape))
            return x.mean((-2, -1))

    settings = config(tmp_path / "run", knn_root, world_size=1)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, eval_crop=1.0))
    online = OnlineKnn(settings, Ranks(0, 1, 0, torch.device("cpu")), Pulse(0.0))
    assert online.reading.crop == 1.0
    assert online(Means(), PreemptionNotice())[0]["knn_neighbors"] == 20
    assert shown == [(count, 3, 32, 32) for count in (8, 8, 7, 1, 8, 1)]
    for i in range(4, 13):
        (knn_root / f"train/kitten/{i}.png").write_bytes(b"")
    assert online(Means(), PreemptionNotice())[0]["knn_neighbors"] == 16


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Figures of knn_cases.py by world size."""
    folder, found = tmp_path_factory.mktemp("knn"), {}
    make(folder / "images")
    for size in (1, 2):
        done = forked(knn_cases.compare, folder, folder / "images", ranks=size)
        assert done.returncode == 0, done.stderr[-6000:]
        found[size] = torch.load(folder / f"{size}.pt")
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 2])
def test_scores_do_not_depend_on_ranks_and_engines(results: Any, size: int, engine: str) -> None:
    """Nor on the batch, which is 8 of one process and 4 of each of two."""
    got, want = results[size][engine], results[1]["torch"]
    score = got["score"]
    assert score == pytest.approx(want["score"], rel=1e-4)
    assert (score["knn"], score["knn_neighbors"]) == (want["score"]["knn"], 20)
    assert got["said"] == f"k-NN of the teacher {score['knn']:.1f} %, RankMe {score['rankme']:.1f} of 96"
    assert got["start"] == pytest.approx(want["start"], rel=1e-4)
    assert got["start"].keys() == {"rankme"}
    assert got["start"] != pytest.approx({"rankme": score["rankme"]}, rel=1e-4), "two steps have moved it"
    assert score["rankme"] == pytest.approx(rankme(got["features"][0][0])), "of all 24: the bank has no more"
    for mine, theirs, count in zip(got["features"], want["features"], (24, 9), strict=True):
        assert torch.equal(mine[1], theirs[1])
        assert mine[0].shape == (count, 96)
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*ENGINES, "timm"])
def test_every_rank_calls_the_teacher_as_often(results: Any, case: str) -> None:
    """Of 12 and 13 images, of which one cannot be read, in batches of 4; of 4 and 5."""
    assert results[2][case]["calls"] == [4 + 2] * 2


@pytest.mark.parametrize("case", [*GOING_ON, "timm"])
def test_training_goes_on_as_without_a_score(results: Any, case: str) -> None:
    assert results[2][case]["undisturbed"]


GOES_ON = {
    "vanish:torch": "EvaluationError: none of the images could be read",
    "mistaken:zero3": "ValueError: a mistake of the source",
    "dies:zero3": "WorkerDied: a process that makes views was ended by exit status 3",
    "forward:zero2": "RuntimeError: no memory for it",
    "score:zero3": "MemoryError: no memory for it",
}
STOPS = ["noticed:zero3", "hangs:torch"]


REFUSED = {
    "refused:torch": ("UserError: rank 1 refused the run: its message says why", "ConfigError: no such folder here"),
    "differs:torch": ("ConfigError: run.knn_root=.* holds other images for rank 1 than for rank 0",) * 2,
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Runs with faults in one pair of processes; with the last they end."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(make(folder / "images"), folder / "gone")
    cases = [*REFUSED, *GOES_ON, *STOPS, "unreadable:zero3", "forward:zero3"]
    return folder, forked(knn_cases.fail_all, folder, folder / "images", cases, ranks=2)


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_refuses_ends_all_before_the_run_begins(faults: Any, case: str) -> None:
    folder, done = faults
    for rank, says in enumerate(REFUSED[case]):
        assert re.search(f"^{rank} {case} {says}$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert not (folder / case.replace(":", "-")).exists()


@pytest.mark.parametrize("case", GOES_ON)
def test_a_fault_of_one_rank_is_an_alarm_and_the_end_of_none(faults: Any, case: str) -> None:
    folder, done = faults
    for rank in range(2):
        assert f"{rank} {case} steps 4\n" in done.stdout, done.stderr
    where = 0 if case.startswith(("vanish", "score")) else 1
    says = f"^rank 0 epoch 2: the k-NN failed, training goes on: {GOES_ON[case]}.*\\(rank {where}\\)$"
    assert re.search(says, done.stderr, re.MULTILINE), done.stderr
    assert len(scores(folder / case.replace(":", "-"))) == 1


@pytest.mark.parametrize("case", STOPS)
def test_a_signal_to_one_rank_ends_the_evaluation_on_all(faults: Any, case: str) -> None:
    """Between batches, or in a read that hangs: all take the step at hand, save and leave."""
    folder, done = faults
    for rank in range(2):
        assert f"{rank} {case} Preempted: stopped by a signal at step 5" in done.stdout, done.stderr
    run = folder / case.replace(":", "-")
    assert len(scores(run)) == 1, "of the first evaluation"
    assert checkpoint.Folder(run / "checkpoints").steps()[-1] == 5
    told = status.read(run)
    assert (told["state"], told["exit"]) == ("preempted", 85)


def test_images_that_one_rank_cannot_read_are_left_out(faults: Any) -> None:
    folder, done = faults
    assert "1 unreadable:zero3 steps 4\n" in done.stdout, done.stderr
    assert len(scores(folder / "unreadable-zero3")) == 2


def test_a_forward_pass_that_fails_where_others_wait_in_it_ends_the_run(faults: Any) -> None:
    """And none hangs."""
    _, done = faults
    assert done.returncode == 1
    assert "RuntimeError: no memory for it" in done.stderr
    assert "forward:zero3" not in done.stdout
