"""The schedules against DINO v1's formulas, written out as arrays, and against DINOv2's own numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdino.config import Config, LossConfig, OptimConfig, RunConfig
from fastdino.engine.schedules import Schedules

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "dinov2_schedules.json").read_text())
V2 = Config(
    optim=OptimConfig(lr=4e-3, lr_rule="sqrt_1024", teacher_momentum=0.992, freeze_last_layer=1),
    loss=LossConfig(warmup_teacher_temp_epochs=30, teacher_temp=0.07, temp_warmup_by="step"),
)


def warmup_then_cosine(base: float, final: float, total: int, warmup: int = 0) -> np.ndarray:
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(0, base, warmup), cosine])


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "warmup"), [(10, 7, 3), (4, 5, 0), (3, 4, 1.5), (5, 1, 1), (2, 3, 2)]
)
def test_schedules(epochs: int, steps_per_epoch: int, warmup: float) -> None:
    optim = OptimConfig(
        lr=5e-4, min_lr=2e-6, warmup_epochs=warmup, weight_decay=0.04, weight_decay_end=0.4, teacher_momentum=0.99,
        freeze_last_layer=2,
    )  # fmt: skip
    warmer = min(3, epochs)
    loss = LossConfig(warmup_teacher_temp=0.02, teacher_temp=0.06, warmup_teacher_temp_epochs=warmer)
    config = Config(optim=optim, loss=loss, run=RunConfig(epochs=epochs))
    schedules = Schedules(config, steps_per_epoch, global_batch=1024)
    total = epochs * steps_per_epoch
    values = [schedules(step) for step in range(total)]

    lr = warmup_then_cosine(5e-4 * 1024 / 256, 2e-6, total, int(warmup * steps_per_epoch))
    np.testing.assert_allclose([now.lr for now in values], lr, rtol=1e-12, atol=1e-18)
    decay, momentum = warmup_then_cosine(0.04, 0.4, total), warmup_then_cosine(0.99, 1, total)
    np.testing.assert_allclose([now.weight_decay for now in values], decay, rtol=1e-12)
    np.testing.assert_allclose([now.momentum for now in values], momentum, rtol=1e-12)
    temps = np.concatenate([np.linspace(0.02, 0.06, warmer), np.full(epochs, 0.06)])
    np.testing.assert_allclose([now.teacher_temp for now in values], temps[np.arange(total) // steps_per_epoch])
    assert [now.freeze_last_layer for now in values] == list(np.arange(total) < 2 * steps_per_epoch)
    assert all(type(x) is float for x in (values[0].lr, values[-1].weight_decay, values[0].momentum))


def test_the_peak_comes_twice_and_the_end_holds() -> None:
    config = Config(optim=OptimConfig(warmup_epochs=2), run=RunConfig(epochs=4))
    schedules = Schedules(config, steps_per_epoch=5, global_batch=512)
    assert schedules(9).lr == schedules(10).lr == 1e-3, "v1's linspace has the end point, and the cosine starts there"
    assert schedules(0).lr == 0
    assert schedules(20) == schedules(10**6), "beyond the end"
    assert schedules(20).lr == schedules(19).lr


def test_freezing_and_the_temperature_may_end_within_an_epoch():
    config = Config(
        loss=LossConfig(teacher_temp=0.07, warmup_teacher_temp_epochs=0.5, temp_warmup_by="step"),
        optim=OptimConfig(freeze_last_layer=0.3),
    )
    schedules = Schedules(config, steps_per_epoch=10, global_batch=256)
    assert [schedules(step).freeze_last_layer for step in range(5)] == [True, True, True, False, False]
    assert [schedules(step).teacher_temp for step in (0, 2, 4, 5)] == pytest.approx([0.04, 0.055, 0.07, 0.07])


@pytest.mark.parametrize("by", ["epoch", "step"])
@pytest.mark.parametrize("epochs", [0.29, 2.25, 2.5, 2.8, 8.1])
def test_a_temperature_that_warms_up_for_part_of_an_epoch_ends_where_it_should(epochs: float, by: Any) -> None:
    loss = replace(V2.loss, warmup_teacher_temp_epochs=epochs, temp_warmup_by=by)
    for steps_per_epoch in (7, 100, 463):
        schedules = Schedules(replace(V2, loss=loss), steps_per_epoch, 1024)
        temps = [schedules(step).teacher_temp for step in range(9 * steps_per_epoch)]
        assert temps == sorted(temps)
        assert temps[-1] == 0.07
        reached = round(epochs * steps_per_epoch) if by == "step" else round(epochs) * steps_per_epoch
        assert all(temp == 0.07 for temp in temps[reached:])
        assert sum(temp < 0.07 - 1e-9 for temp in temps) == max(reached - (1 if by == "step" else steps_per_epoch), 0)


def test_frozen_steps_are_the_nearest_whole_number() -> None:
    """0.07 of 100 steps are 7, although their product in floating point is a little more."""
    config = replace(V2, optim=replace(V2.optim, freeze_last_layer=0.07))
    assert [Schedules(config, 100, 256)(step).freeze_last_layer for step in range(9)] == 7 * [True] + 2 * [False]


@pytest.mark.parametrize("name", OFFICIAL["schedules"])
def test_schedules_of_dinov2(name: str) -> None:
    """All steps of 100 epochs of 40; the record of the temperature ends with its warm-up."""
    official = OFFICIAL["schedules"][name]
    schedules = Schedules(V2, OFFICIAL["epoch_length"], global_batch=2048)
    values = [getattr(schedules(step), name) for step in range(official["n"])]
    for step, want in official["at"].items():
        assert values[int(step)] == pytest.approx(want, rel=1e-12), step
    assert sum(values) == pytest.approx(official["sum"], rel=1e-12)
    if name == "teacher_temp":
        assert schedules(official["n"]).teacher_temp == schedules(3999).teacher_temp == official["beyond"]


def test_the_temperature_rises_at_each_step_or_once_per_epoch() -> None:
    by_epoch = replace(V2, loss=replace(V2.loss, temp_warmup_by="epoch"))
    steps, epochs = (
        [Schedules(config, 40, 2048)(step).teacher_temp for step in range(1240)] for config in (V2, by_epoch)
    )
    assert len(set(steps)) == 1200
    assert len(set(epochs)) == 30
    assert steps[0] == epochs[0] == 0.04
    assert steps[1199] == pytest.approx(epochs[1160]) == pytest.approx(0.07)


def test_rates_by_batch() -> None:
    def peak(rule: str, batch: int) -> float:
        optim = OptimConfig(lr=1e-3, lr_rule=rule, warmup_epochs=0)  # type: ignore[arg-type]
        return Schedules(Config(optim=optim), 10, batch)(0).lr

    assert peak("linear_256", 256) == peak("sqrt_1024", 1024) == 1e-3
    assert peak("linear_256", 1024) == pytest.approx(4e-3)
    assert peak("sqrt_1024", 4096) == pytest.approx(2e-3)
    assert peak("sqrt_1024", 256) == pytest.approx(5e-4)


def test_constant_after_the_warm_up() -> None:
    """Whatever the length of the run, so that it can be made longer without a bend."""
    optim = replace(V2.optim, schedule="constant", warmup_epochs=2)
    short, long = (
        Schedules(replace(V2, optim=optim, run=RunConfig(epochs=epochs)), 5, global_batch=1024) for epochs in (30, 90)
    )
    values = [short(step) for step in range(150)]
    assert values == [long(step) for step in range(150)]
    np.testing.assert_allclose([now.lr for now in values], [*np.linspace(0, 4e-3, 10), *140 * [4e-3]], rtol=1e-12)
    assert {now.weight_decay for now in values} == {0.04}
    assert {now.momentum for now in values} == {0.992}
    assert short(10**6).lr == 4e-3
