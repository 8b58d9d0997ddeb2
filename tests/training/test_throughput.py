"""The throughput gate that needs no GPU: exact counts of a training step, and one ratio of processor time.

Counts are compared with bench/results/counts.json, the ratio with bench/results/cpu_ratio.json; a failure says which
figure changed and how to record a change that is meant.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.gates import counts, ratio
from bench.record import ROOT
from bench.workload import nano_config
from fastdino import distributed
from fastdino.distributed import Ranks
from fastdino.training.trainer import Trainer
from tests.children import environment

PLAIN = nano_config(engine="torch")
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_counts_are_as_recorded() -> None:
    """In a process of its own, because DeepSpeed keeps the process group that it saw first."""
    command = [sys.executable, "-m", "bench.gates.counts", "--check"]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr[-2000:]}"


def test_a_step_keeps_pace_with_the_peer(one_thread: None) -> None:
    recorded = json.loads(ratio.RATIO.read_text())["ratio"]
    assert not ratio_problems(recorded, attempts=2)


def ratio_problems(recorded: float, attempts: int) -> list[str]:
    """Of the last attempt; the first one that finds nothing ends it, since other programs disturb but never help."""
    problems: list[str] = []
    with distributed.init("cpu") as ranks:
        for _ in range(attempts):
            problems = ratio.problems(ratio.measure(ranks), recorded)
            if not problems:
                break
    return problems


def with_extra(original: Callable[..., Any], extra: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function, and then ``extra`` with its result."""

    def slower(*args: Any) -> Any:
        result = original(*args)
        extra(result)
        return result

    return slower


@pytest.mark.parametrize(
    ("method", "extra", "counters"),
    [
        ("_normalized", lambda batch: batch.views["global"].double().float(), {"aten_calls", "aten_bytes"}),
        ("train_step", lambda figures: figures["loss"].item(), {"host_syncs", "aten_calls", "aten_bytes"}),
    ],
    ids=["an extra copy", "an item()"],
)
@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_counts_see(
    method: str, extra: Callable[[Any], Any], counters: set[str], as_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = counts.count(PLAIN, ALONE, as_on_gpu)
    again = counts.count(PLAIN, ALONE, as_on_gpu)
    assert not counts.differences({"": before}, {"": again}), "not even equal to themselves"
    monkeypatch.setattr(Trainer, method, with_extra(getattr(Trainer, method), extra))
    found = counts.differences({"": before}, {"": counts.count(PLAIN, ALONE, as_on_gpu)})
    assert {line.split()[1] for line in found} == counters
    assert all(" was " in line and " is " in line for line in found)


def test_the_counts_see_what_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    before = counts.count(PLAIN, ALONE, as_on_gpu=True)
    monkeypatch.setattr(
        "fastdino.method.dino.dino_loss", lambda student, *args, **kwargs: counted_loss(student.sin(), *args, **kwargs)
    )
    found = counts.differences({"": before}, {"": counts.count(PLAIN, ALONE, as_on_gpu=True)})
    assert any(line.startswith(": saved_bytes") for line in found)


def counted_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
    from fastdino_kernels import dino_loss

    return dino_loss(*args, **kwargs)


def test_the_counts_see_launches_and_collectives() -> None:
    """A kernel or a collective more than recorded is named."""
    recorded = json.loads(counts.COUNTS.read_text())["cases"]
    changed = json.loads(json.dumps(recorded))
    changed["gpu, ZeRO 1"]["triton_launches"]["_gradient_kernel"] += 1
    changed["gpu, ZeRO 2"]["collectives"]["allreduce_"] += 2
    found = counts.differences(recorded, changed)
    assert len(found) == 2
    assert "gpu, ZeRO 1: triton_launches was" in found[0]
    assert "_gradient_kernel 1 -> 2" in found[0]
    assert "gpu, ZeRO 2: collectives was" in found[1]


def busy(_: object) -> None:
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(
    ("extra", "message"),
    [(lambda loss: time.sleep(0.001), "sleeps or waits"), (busy, "times the peer's processor time")],
    ids=["a sleep", "busy work"],
)
def test_the_ratio_sees(
    extra: Callable[[Any], Any], message: str, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = json.loads(ratio.RATIO.read_text())["ratio"]
    monkeypatch.setattr(ratio, "ROUNDS", 5)
    monkeypatch.setattr(Trainer, "train_step", with_extra(Trainer.train_step, extra))
    found = ratio_problems(recorded, attempts=1)
    assert any(message in problem for problem in found), found
