"""Runs in bf16 on a GPU, by every engine: nothing in a step waits, a stopped run goes on, the engines agree.

The same runs are made on a CPU, so that only the calls of CUDA itself wait for a GPU. They are made in processes of
their own, for a GPU by ``python tests/training/test_gpu.py DEVICE FOLDER [ENGINE ..]``, because DeepSpeed is imported
for one kind of device.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastdino
from fastdino.config import Config
from fastdino.data import Batch
from fastdino.engine import graphs
from fastdino.training.preemption import Preempted
from fastdino.training.trainer import Trainer
from tests.children import environment, forked
from tests.engine.engine_cases import SyncCount
from tests.training.test_trainer import tiny

ENGINES = {"torch": ("torch", 1), **{f"deepspeed {stage}": ("deepspeed", stage) for stage in (0, 1, 2)}}
PARTITIONED = {"deepspeed 3": ("deepspeed", 3)}  # in a process of its own: what it breaks on a GPU is no other's fault
CAPTURED = {"torch, captured": ("torch", 1), "deepspeed 0, captured": ("deepspeed", 0)}  # on a GPU
NUM_STEPS, STOP_AT, LOG_EVERY = 10, 5, 4
WARM_UP = 2  # steps in which kernels are compiled and what depends on shapes alone is copied to the device
# Relative, of a loss. A GPU's attention sums its gradients in any order, which bf16 weights make visible.
ROUNDING = {"cpu": 1e-3, "cuda": 1e-2}

Losses = dict[str, float]
"""Of every step that a run took, by its number as JSON has it."""


def main(device: str, folder: Path, *names: str) -> None:
    """Writes FOLDER/losses.json: {engine: {"straight", "stopped", "resumed": {step: loss}}}."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Losses]] = {}
    for name in names or [*ENGINES, *(CAPTURED if device == "cuda" else {})]:
        engine, stage = (ENGINES | CAPTURED | PARTITIONED)[name]
        settings = {"engine__name": engine, "engine__zero_stage": stage, "engine__precision": "bf16"}
        settings |= {"engine__device": device, "optim__lr": 0.002, "run__log_every": LOG_EVERY}
        captured = name in CAPTURED
        settings |= {"engine__cuda_graphs": "on" if captured else "off", "engine__teacher_stream": captured}
        straight, stopped = (tiny(folder / f"{name} {kind}", **settings) for kind in ("straight", "stopped"))
        found[name] = {"straight": run(straight), "stopped": run(stopped, STOP_AT), "resumed": run(stopped)}
    (folder / "losses.json").write_text(json.dumps(found))


def run(config: Config, stop_at: int | None = None) -> Losses:
    """Trains in this process to the end, or until a signal that comes at ``stop_at`` has ended the run."""
    losses: dict[int, Tensor] = {}
    original = Trainer.train_step

    def train_step(trainer: Trainer, batches: list[Batch]) -> dict[str, Tensor]:
        step = trainer.step + 1
        captured = trainer.captures  # a capture waits, once
        may_wait = captured or len(losses) < WARM_UP or step % LOG_EVERY == 0 or step == NUM_STEPS
        with nullcontext() if may_wait else no_waits(trainer.ranks.device):
            figures = original(trainer, batches)
        losses[step] = figures["loss"].clone()  # the next captured step overwrites it
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return figures

    def fall_back(text: str, *why: object) -> None:
        raise AssertionError(text % why)  # what stands in for a step that is not compiled or captured has its losses

    with mock.patch.object(Trainer, "train_step", train_step), mock.patch.object(graphs.log, "warning", fall_back):
        try:
            fastdino.train(config)
        except Preempted:
            assert stop_at is not None
    return {str(step): loss.item() for step, loss in losses.items()}


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Fails where the host waits for ``device``: CUDA raises; what it lets pass, and a CPU's calls, are counted."""
    on_gpu = device.type == "cuda"
    with SyncCount() as waits, mock.patch("torch.cuda.synchronize", waits.noting("synchronize", lambda *_: None)):
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    assert not waits.found, waits.found  # a plain process: pytest does not write out what is asserted


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The device, and the losses of all runs on it."""
    return request.param, trained(request.param, tmp_path_factory.mktemp(request.param))


def trained(device: str, folder: Path, *names: str) -> dict[str, Any]:
    if device == "cpu":
        done = forked(main, device, folder, *names)
    else:  # what such forks come from has asked whether there is a GPU, so that they can have none
        command = [sys.executable, __file__, device, str(folder), *names]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "losses.json").read_text())


def largest_difference(ours: Losses, theirs: Losses) -> float:
    """Relative, over the steps of ``ours``, which ``theirs`` took too."""
    return max(abs(loss - theirs[step]) / theirs[step] for step, loss in ours.items())


def test_every_engine_trains_the_same_in_bf16(runs: tuple[str, dict[str, Any]]) -> None:
    device, losses = runs
    expected = losses["torch"]["straight"]
    assert len(expected) == NUM_STEPS
    for name in ENGINES:
        assert losses[name]["straight"].keys() == expected.keys(), name
        assert largest_difference(losses[name]["straight"], expected) < ROUNDING[device], name


def test_a_captured_step_is_an_eager_one(runs: tuple[str, dict[str, Any]]) -> None:
    """With the teacher beside the student."""
    device, losses = runs
    assert losses.keys() >= (CAPTURED.keys() if device == "cuda" else set())
    for name in losses.keys() & CAPTURED.keys():
        assert largest_difference(losses[name]["straight"], losses["torch"]["straight"]) < ROUNDING[device], name
        assert (
            largest_difference(losses[name]["stopped"] | losses[name]["resumed"], losses[name]["straight"])
            < (ROUNDING[device])
        ), name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_as_if_it_had_not(runs: tuple[str, dict[str, Any]], engine: str) -> None:
    check_resumption(runs[0], runs[1][engine])


@pytest.mark.parametrize("device", DEVICES)
def test_zero_3_trains_the_same_and_goes_on(device: str, tmp_path: Path) -> None:
    """It waits for no other engine's runs, so that a worker of its own can make these beside them."""
    losses = trained(device, tmp_path, "torch", *PARTITIONED)
    for name in PARTITIONED:
        assert largest_difference(losses[name]["straight"], losses["torch"]["straight"]) < ROUNDING[device]
        check_resumption(device, losses[name])


def check_resumption(device: str, losses: dict[str, Losses]) -> None:
    straight, stopped, resumed = (losses[kind] for kind in ("straight", "stopped", "resumed"))
    assert len(stopped) == STOP_AT + 1, "told at one step, it stops at the next"
    assert [*stopped, *resumed] == [*straight], "no step twice, none left out"
    difference = largest_difference(stopped | resumed, straight)
    assert difference == 0 if device == "cpu" else difference < ROUNDING[device]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
