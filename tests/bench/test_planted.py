"""Regressions planted in the product, one kind after another: the gate's report names each, and is silent without.

A plant changes what the product does, never what the gate sees; the gate that runs is the one of CI.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gates import counts, ratio
from bench.gates.changes import BETTER, WORSE, Change, as_markdown, differences, in_lines, unmatched
from bench.workload import nano_config
from fastdino import distributed
from fastdino.distributed import Ranks
from fastdino.engine import optimizer
from fastdino.method import dino
from fastdino.training.trainer import Trainer
from fastdino_kernels import AdamWHyper, adamw_ema_, dino_loss, ema_update_
from tests.bench.conftest import Python

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
CONFIGS = {"cpu": nano_config(engine="torch"), "gpu": nano_config(engine="torch", precision="bf16")}
Plant = Callable[[pytest.MonkeyPatch], None]


def count(on: str) -> dict[str, Any]:
    return counts.count(CONFIGS[on], ALONE, as_on_gpu=on == "gpu")


SOUND: dict[str, Any] = {}


@pytest.fixture
def sound() -> dict[str, Any]:
    """Counters of the step as it is, on a CPU and as on a GPU; counted once, as the product runs outside tests."""
    SOUND.update({on: count(on) for on in CONFIGS if on not in SOUND})
    return SOUND


def after(original: Callable[..., Any], extra: Callable[[Any], object]) -> Callable[..., Any]:
    """The function, and then ``extra`` with its result."""

    def slower(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        extra(result)
        return result

    return slower


def on_the_loss(work: Callable[[Tensor], object]) -> Plant:
    """Does ``work`` with the loss at the end of every step."""
    return lambda patch: patch.setattr(Trainer, "train_step", after(Trainer.train_step, lambda f: work(f["loss"])))


def on_logits(work: Callable[[Tensor], Tensor]) -> Plant:
    """Gives what ``work`` makes of the student's logits to the loss."""
    return lambda patch: patch.setattr(
        dino, "dino_loss", lambda student, *args, **options: dino_loss(work(student), *args, **options)
    )


def not_in_place(patch: pytest.MonkeyPatch) -> None:
    """What is added in place is made anew and copied to where it belongs."""
    patch.setattr(Tensor, "add_", lambda x, y, **options: x.copy_(x.add(y, **options)))


def unfused_ema(average: Callable[[Tensor, Tensor, float], object]) -> Plant:
    """The moving average is a pass of its own over the weights."""

    def two_passes(
        param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: Tensor,
        hyper: AdamWHyper, *, ema_lp: Tensor | None = None, **options: Any,
    ) -> None:  # fmt: skip
        still = AdamWHyper(hyper.lr, hyper.weight_decay, 1.0, hyper.betas)
        adamw_ema_(param, grad, exp_avg, exp_avg_sq, ema, step, still, **options)
        average(ema, param, hyper.momentum)

    return lambda patch: patch.setattr(optimizer, "adamw_ema_", two_passes)


def by_torch(ema: Tensor, param: Tensor, momentum: float) -> None:
    torch._foreach_lerp_([ema], [param], 1 - momentum)


COPY, READ = {"aten_calls", "aten_bytes"}, {"host_syncs"}
PLANTS: dict[str, tuple[Plant, list[str], set[str], str]] = {  # where it shows: on, counters, and a name in the report
    "an extra fp32 copy": (on_logits(Tensor.float), ["gpu"], COPY, "aten::_to_copy"),
    "a copy that autograd keeps": (on_logits(Tensor.sin), ["cpu", "gpu"], COPY | {"saved_bytes"}, "aten::sin"),
    "a round trip through fp64": (on_logits(lambda x: x.double().to(x)), ["cpu", "gpu"], COPY, "aten::_to_copy"),
    "a clone": (on_logits(Tensor.clone), ["cpu", "gpu"], COPY, "aten::clone"),
    "an item()": (on_the_loss(Tensor.item), ["cpu", "gpu"], READ, "_local_scalar_dense"),
    "a branch on a value": (on_the_loss(lambda loss: loss > 0 or loss), ["cpu", "gpu"], READ, "_local_scalar_dense"),
    "a mask": (on_the_loss(lambda loss: (x := loss.view(1))[x > 0]), ["cpu", "gpu"], READ, "index 0 -> 1"),
    "a list": (on_the_loss(Tensor.tolist), ["cpu", "gpu"], READ, "tolist"),
    "a copy to the host": (on_the_loss(Tensor.cpu), ["cpu", "gpu"], READ, "cpu 0 -> 1"),
    "an array": (on_the_loss(Tensor.numpy), ["cpu", "gpu"], READ, "numpy"),
    "a lost in-place": (not_in_place, ["cpu", "gpu"], COPY, "aten::copy_"),
    "an unfused EMA, as a kernel": (unfused_ema(ema_update_), ["gpu"], {"triton_launches"}, "_ema_kernel 0 -> 3"),
    "an unfused EMA, as torch's": (unfused_ema(by_torch), ["gpu"], COPY, "aten::_foreach_lerp_"),
}  # fmt: skip
CASES = [(name, on) for name, (_, where, _, _) in PLANTS.items() for on in where]


@pytest.mark.parametrize("on", CONFIGS)
def test_nothing_is_found_where_nothing_is_planted(on: str, sound: dict[str, Any]) -> None:
    again = {on: count(on)}
    assert not differences({on: sound[on]}, again)
    assert in_lines({on: sound[on]}, again) == "1 cases, every counter as recorded"


@pytest.mark.parametrize(("name", "on"), CASES)
def test_the_counts_name(name: str, on: str, sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plant, _, counters, named = PLANTS[name]
    plant(monkeypatch)
    now = {on: count(on)}
    found = {change.counter: change for change in differences({on: sound[on]}, now)}
    assert counters <= {counter for counter, change in found.items() if change.verdict == WORSE}
    assert named in " ".join(change.why for change in found.values())
    for report in (in_lines, as_markdown):
        assert named in report({on: sound[on]}, now)
        assert WORSE in report({on: sound[on]}, now)


def test_an_improvement_is_named_too(sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was a fault when the record was made is gone now."""
    PLANTS["a clone"][0](monkeypatch)
    before = {"cpu": count("cpu")}
    found = {change.counter: change for change in differences(before, {"cpu": sound["cpu"]})}
    assert {change.verdict for change in found.values()} == {BETTER}
    assert "aten::clone" in found["aten_calls"].why
    assert " 0 worse" not in as_markdown(before, {"cpu": sound["cpu"]})


def test_a_launch_and_a_collective_more_than_recorded_are_named() -> None:
    recorded = json.loads(counts.COUNTS.read_text())["cases"]
    now = json.loads(json.dumps(recorded))
    now["gpu, ZeRO 1"]["triton_launches"]["_gradient_kernel"] += 1
    now["gpu, ZeRO 2"]["collectives"]["allreduce_"] += 2
    now["gpu, ZeRO 2"]["aten_bytes"] -= 8
    first, second, third = differences(recorded, now)
    assert (first.case, first.counter, first.verdict) == ("gpu, ZeRO 1", "triton_launches", WORSE)
    assert (second.case, second.counter, second.verdict) == ("gpu, ZeRO 2", "collectives", WORSE)
    assert (third.counter, third.verdict, third.names) == ("aten_bytes", BETTER, {})
    assert first.names == {"_gradient_kernel": (1, 2)}
    assert f"{len(now)} cases, 2 worse, 1 better" in in_lines(recorded, now)


def test_one_call_for_another_is_a_difference() -> None:
    """The same number of calls, of which one is another: neither better nor worse, and not as recorded."""
    (change,) = differences({"a": {"aten_calls": {"add": 2, "mul": 1}}}, {"a": {"aten_calls": {"add": 1, "mul": 2}}})
    assert change == Change("a", "aten_calls", 3, 3, {"add": (2, 1), "mul": (1, 2)})
    assert change.verdict == "other"


def test_a_case_or_a_counter_that_is_gone_is_no_silence() -> None:
    recorded: dict[str, Any] = {"a": {"bytes": 1, "calls": {"add": 1}}, "b": {"bytes": 1}}
    now: dict[str, Any] = {"a": {"bytes": 1}, "c": {"bytes": 1}}
    assert unmatched(recorded, now) == ["b: is recorded, but measured no more", "c: is not recorded"]
    assert [str(change) for change in differences(recorded, now)] == ["a: better, calls was 1, is 0 (add 1 -> 0)"]
    for report in (in_lines, as_markdown):
        assert "b: is recorded, but measured no more" in report(recorded, now)
        assert "2 cases, 1 better, 2 unmatched" in report(recorded, now)


EAGER = """
import torch
from fastdino.model import block
whole = block.Attention.forward
def forward(self, *args):
    torch._dynamo.graph_break()
    return whole(self, *args)
block.Attention.forward = forward
"""
ANEW = """
from bench.gates import compiled
from fastdino.model import head, vit
from fastdino.training.trainer import Trainer
vit.ViT.regions, compiled.WARMUP_STEPS = lambda self: [], 1  # a head alone is compiled, and not often: that is quick
steps, project, train_step = [0], head.Head.project, Trainer.train_step
def counted(self, batches):
    steps[0] += 1
    return train_step(self, batches)
def scaled(self, x):
    return project(self, x * steps[0])
Trainer.train_step, head.Head.project = counted, scaled
"""


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (EAGER, ["worse, fallbacks was 0, is 1 (Block.forward 0 -> 1)", "aten::native_layer_norm ", "cpp_fused_gelu"]),
        (ANEW, ["worse, recompilations was 0, is ", "scaled in "]),
    ],
    ids=["a compiled block that falls back to eager", "a recompilation per step"],
)
def test_the_counts_of_the_compiled_step_name(plant: str, words: list[str], python: Python) -> None:
    """The whole gate, in a process of its own."""
    run = "import sys\nfrom bench.gates import counts\nsys.exit(counts.main())"
    done = python("-c", plant + run, "--check", "--only", counts.COMPILED)
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    for word in words:
        assert word in done.stdout


def busy(_: object) -> None:
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(
    ("extra", "message"),
    [(lambda loss: time.sleep(0.001), "sleeps or waits"), (busy, "times the peer's processor time")],
    ids=["a sleep", "busy work"],
)
def test_the_ratio_names(extra: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = json.loads(ratio.RATIO.read_text())["ratio"]
    monkeypatch.setattr(ratio, "ROUNDS", 5)
    monkeypatch.setattr(Trainer, "train_step", after(Trainer.train_step, extra))
    with distributed.init("cpu") as ranks:
        found, wrong = ratio.judge(ranks, recorded, attempts=1)
    assert any(message in problem for problem in wrong), wrong
    assert message in ratio.as_markdown(found, recorded, wrong)
