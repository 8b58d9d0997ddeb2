"""What test_online_knn.py compares: k-NNs of teachers at this world size, and what becomes of runs where they fail."""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import fastdino
from fastdino import distributed
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    UserError,
    ViewsConfig,
)
from fastdino.data import BadImage, FolderSource
from fastdino.data.benchmarks.class_folders import Sets, bank_and_test
from fastdino.distributed import Ranks
from fastdino.eval import Features, Knn
from fastdino.training import online_knn
from fastdino.training.online_knn import OnlineKnn
from fastdino.training.preemption import PreemptionNotice
from fastdino.training.trainer import Trainer
from fastdino.training.watchdog import Pulse
from tests.engine.engine_cases import ENGINES, whole

GLOBAL_BATCH = 8
GOING_ON = ("torch", "zero1", "zero3")


def config(folder: Path, knn_root: Path, engine: str = "torch", world_size: int = 2, **settings: Any) -> Config:
    """Two steps of 8 images an epoch, then a k-NN."""
    name, stage = ENGINES[engine]
    arch, epochs = settings.pop("arch", "vit_nano"), settings.pop("epochs", 2)
    return Config(
        model=ModelConfig(arch=arch, patch_size=8, drop_path=0.0),
        head=HeadConfig(num_prototypes=32, hidden_dim=16, bottleneck_dim=8),
        views=ViewsConfig(global_size=32, local_size=16, num_local=1),
        data=DataConfig(
            root="shapes", num_images=16, image_size=32, num_workers=settings.pop("num_workers", 0), normalize="image"
        ),
        optim=OptimConfig(lr=0.01, warmup_epochs=0),
        engine=EngineConfig(device="cpu", name=name, zero_stage=stage, **settings),  # type: ignore[arg-type]
        run=RunConfig(
            dir=folder, epochs=epochs, local_batch=GLOBAL_BATCH // world_size, log_every=1, knn_every=1,
            knn_root=str(knn_root),
        ),
    )  # fmt: skip


class Watched(OnlineKnn):
    """Keeps the features that rank 0 compares, and counts calls of the backbone."""

    def __call__(
        self, backbone: nn.Module, notice: PreemptionNotice, rank_alone: bool = False
    ) -> tuple[dict[str, float], str]:
        self.calls = 0

        def count(*_: Any) -> None:
            self.calls += 1

        handle = backbone.register_forward_pre_hook(count)
        try:
            return super().__call__(backbone, notice, rank_alone)
        finally:
            handle.remove()

    def _score(self, bank: Features, test: Features) -> tuple[dict[str, float], str]:
        self.features = bank, test
        return super()._score(bank, test)


def figures(ranks: Ranks, settings: Config, goes_on: bool = False) -> dict[str, Any]:
    """RankMe before the first step and the k-NN after two; where it ``goes_on``, whether these two steps and the next
    are those without."""
    ends, found = [], dict[str, Any]()
    for evaluates in (True, False)[: 1 + goes_on]:
        trainer, losses = Trainer(settings, ranks), []
        backbone: Any = trainer.engine.teacher.backbone
        if evaluates:
            online = Watched(settings, ranks, Pulse(0.0))
            found["start"], _ = online(backbone, PreemptionNotice(), rank_alone=True)
        for step in range(4 if goes_on else 2):
            losses.append(trainer.train_step([next(trainer.batches)])["loss"].clone())
            if step == 1 and evaluates:
                for _ in range(2):  # the second time DeepSpeed expects what it does not get
                    found["score"], found["said"] = online(backbone, PreemptionNotice())
                calls = ranks.gather(online.calls)
                if ranks.is_main:
                    found |= {"calls": calls, "features": [tuple(f) for f in online.features]}
        trainer.engine.wait_teacher()
        student, teacher = (whole(network) for network in (trainer.engine.student_network, trainer.engine.teacher))
        ends.append([torch.stack(losses), *student.values(), *teacher.values()])
        ranks.release()
    return found | {"undisturbed": goes_on and all(torch.equal(a, b) for a, b in zip(*ends, strict=True))}


def compare(out: Path, images: Path) -> None:
    """Writes figures to ``out``/WORLD_SIZE.pt."""
    with distributed.init("cpu") as ranks:
        two = ranks.world_size == 2
        results = {
            engine: figures(ranks, config(out, images, engine, ranks.world_size), two and engine in GOING_ON)
            for engine in ENGINES
        }
        if two:
            timm = config(out, images, "zero3", arch="timm:test_vit", precision="bf16")
            results["timm"] = figures(ranks, timm, goes_on=True)
        if ranks.is_main:
            torch.save(results, out / f"{ranks.world_size}.pt")


def unreadable(index: int) -> None:
    if index > 12:  # all batches of the bank but the first
        raise BadImage(str(index), "broken")


def mistaken(index: int) -> None:
    raise ValueError("a mistake of the source")


def dies(index: int) -> None:
    if multiprocessing.current_process().daemon:  # a worker
        os._exit(3)


def hangs(index: int) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(600)


def forward(backbone: nn.Module, given: tuple[Any]) -> None:
    if isinstance(given[0], torch.Tensor):  # images, not the views of a step
        raise RuntimeError("no memory for it")


def noticed(backbone: nn.Module, given: tuple[Any]) -> None:
    """A signal that no read hears of, once."""
    if isinstance(given[0], torch.Tensor) and not backbone.__dict__.setdefault("heard", False):
        backbone.__dict__["heard"] = True
        os.kill(os.getpid(), signal.SIGUSR1)


READING = {f.__name__: f for f in (unreadable, mistaken, dies, hangs)}
CALLING = {f.__name__: f for f in (forward, noticed)}


def fail(out: Path, images: Path, fault: str, engine: str) -> str:
    """What becomes of a run whose last rank has a fault, most often in its second evaluation."""
    images = images.with_name("gone") if fault == "vanish" else images
    epochs = 3 if fault in ("noticed", "hangs") else 2
    settings = config(out / f"{fault}-{engine}", images, engine, num_workers=int(fault == "dies"), epochs=epochs)
    last, armed = os.environ["RANK"] == "1", False

    def encoded(self: FolderSource, index: int) -> bytes:
        if last and armed and fault in READING:
            READING[fault](index)
        return FolderSource_encoded(self, index)

    def step(self: Trainer, batches: Any) -> Any:
        nonlocal armed
        if self.step == 2:  # after the first evaluation
            armed = True
            if last and fault == "vanish":
                shutil.rmtree(images)
            if last and fault in CALLING:
                self.engine.teacher.backbone.register_forward_pre_hook(CALLING[fault])  # type: ignore[operator, union-attr]
        return Trainer_step(self, batches)

    def accuracy(self: Knn, *sets: Features) -> dict[str, float]:
        if armed and fault == "score":
            raise MemoryError("no memory for it")
        return Knn_accuracy(self, *sets)

    def opened(root: str, data: DataConfig) -> Sets:
        if last and fault == "refused":
            raise ConfigError("no such folder here")
        return bank_and_test(root, data)

    def fingerprint(self: FolderSource) -> str:
        return "another" if last and fault == "differs" else FolderSource_fingerprint(self)

    with (
        mock.patch.object(online_knn, "bank_and_test", opened),
        mock.patch.object(FolderSource, "fingerprint", fingerprint),
        mock.patch.object(FolderSource, "encoded", encoded),
        mock.patch.object(Trainer, "train_step", step),
        mock.patch.object(Knn, "accuracy", accuracy),
    ):
        try:
            return f"steps {fastdino.train(settings).steps}"
        except UserError as error:
            return f"{type(error).__name__}: {error}"


FolderSource_encoded, FolderSource_fingerprint = FolderSource.encoded, FolderSource.fingerprint
Trainer_step, Knn_accuracy = Trainer.train_step, Knn.accuracy


def fail_all(out: Path, images: Path, cases: list[str]) -> None:
    """Says on a line what a run with each FAULT:ENGINE came to."""
    logging.basicConfig(format=f"rank {os.environ['RANK']} %(message)s")
    for case in cases:
        said = fail(out, images, *case.split(":"))
        sys.stdout.write(f"{os.environ['RANK']} {case} {said}\n")  # in one piece, because ranks share a file
