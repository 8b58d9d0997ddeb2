"""What each switch gives: every variant is measured with exactly the switches that it names, and then freed."""

import dataclasses
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.workload import nano_config, random_batch
from fastdino import distributed
from fastdino.config import Config
from fastdino.data import Batch
from fastdino.distributed import Ranks
from fastdino.training.throughput import ablation, timing
from fastdino.training.throughput.ablation import SWITCHES, Ablation, Cost, On, Switch, ablate
from fastdino.training.trainer import Trainer

CPU = torch.device("cpu")
# Stand-ins with an effect on a CPU, which is that of `paces` below: A saves 20 ms of 70, B 40 ms.
A, B = "run.log_every", "run.keep_every"
STAND_INS = (
    Switch(A, 7, 8, lambda trainer: trainer.config.run.log_every),
    Switch(B, 7, 8, lambda trainer: trainer.config.run.keep_every),
    Switch("run.keep", 7, 8, lambda trainer: "the same"),
    Switch("model.attention", "xformers", "sdpa", lambda trainer: trainer.config.model.attention),
)
made: list["weakref.ref[torch.nn.Module]"] = []  # networks, which an engine's hooks hold in cycles


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with distributed.init("cpu") as ranks:
        yield ranks


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 10 ms, and 20 or 40 more for a switch that is off, on a clock that nothing else moves."""
    now = 0.0

    def train_step(trainer: Trainer, batches: list[Batch]) -> None:
        made.extend(map(weakref.ref, (trainer.engine.teacher, trainer.engine.student)))
        nonlocal now
        run = trainer.config.run
        now += 0.01 + 0.02 * (run.log_every == 8) + 0.04 * (run.keep_every == 8)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(ablation, "SWITCHES", STAND_INS)


def run(ranks: Ranks, engine: str = "torch", **options: Any) -> Ablation:
    config = nano_config(engine=engine)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="sdpa"))
    return ablate(config, ranks, [random_batch(config, CPU, 0)], 0.2, **options)


@pytest.mark.usefixtures("paces")
def test_each_switch_alone_and_last(ranks: Ranks) -> None:
    found = run(ranks)
    assert found.switches == [A, B]
    wanted = {On(): 0.07, On({A}): 0.05, On({B}): 0.03, On({A, B}): 0.01}
    assert found.costs.keys() == wanted.keys(), "alone and last are the same variants when there are two"
    for on, seconds in wanted.items():
        cost = found.costs[on]
        assert isinstance(cost, Cost)
        assert cost.seconds == pytest.approx(seconds)
    assert found.skipped.keys() == {"run.keep", "model.attention"}
    assert found.skipped["run.keep"] == "3 runs what 8 runs, for this recipe on this device"
    assert "needs a GPU" in found.skipped["model.attention"], "a switch that is refused is no end"


@pytest.mark.usefixtures("paces")
def test_named_switches_alone_are_measured(ranks: Ranks) -> None:
    """The recipe has the other on, as in the faster two of four variants."""
    found = run(ranks, only=[B])
    assert found.skipped == {}
    assert {on: cost.seconds for on, cost in found.costs.items() if isinstance(cost, Cost)} == {
        On({B}): pytest.approx(0.01), On(): pytest.approx(0.05),
    }  # fmt: skip


@pytest.mark.usefixtures("paces")
def test_what_was_found_so_far_is_handed_over(ranks: Ranks) -> None:
    """After every measurement, those first that say most of a switch: all on, and all but it."""
    saved: list[tuple[Ablation, str]] = []
    found = run(ranks, save=lambda *so_far: saved.append(so_far))
    assert [turn for _, turn in saved] == [f"{turn} of 8" for turn in range(1, 9)]
    order = [On({A, B}), On({B}), On({A}), On()]
    assert [list(each.costs) for each, _ in saved] == [order[:1], order[:2], order[:3], *[order] * 5]
    assert saved[-1][0] == found
    assert all(isinstance(cost, Cost) and cost.spread == 0 for cost in saved[3][0].costs.values())


@pytest.mark.usefixtures("paces")
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_variant_is_freed_before_the_next(ranks: Ranks, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    original = ablation._free

    def free(ranks: Ranks) -> None:
        original(ranks)
        alive.append(sum(network() is not None for network in made))

    monkeypatch.setattr(ablation, "_free", free)
    made.clear()
    run(ranks, engine)
    assert len(alive) >= 8
    assert not any(alive)


@pytest.mark.usefixtures("paces")
def test_what_does_not_fit_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train_step

    def train_step(trainer: Trainer, batches: list[Batch]) -> Any:
        if trainer.config.run.log_every == 8:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB")
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    found = run(ranks)
    assert [on for on, cost in found.costs.items() if cost == "Tried to allocate 9 GiB"] == [On({B}), On()]
    table = found.table().splitlines()
    assert next(line for line in table if line.startswith("all off")).split() == ["all", "off", "does", "not", "run"]
    assert " - " in next(line for line in table if line.startswith(A)), "no ratio to what does not run"
    assert "all off does not run: Tried to allocate 9 GiB" in table


def cost(seconds: float, gigabytes: float = 1.0) -> Cost:
    return Cost(seconds, 0.03, int(gigabytes * 1e9))


def test_the_table_has_ratios_alone_and_last() -> None:
    costs = {On(): cost(0.8), On({A}): cost(0.4, 3.5), On({B}): cost(0.5), On({A, B}): cost(0.1, 2.25)}
    table = Ablation(8, {"x.y": "it is off"}, [A, B], costs).table()
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()}
    assert rows["all off"] == ["10.0", "1.00x", "1.00"]
    assert rows[A] == ["20.0", "2.00x", "3.50", "16.0", "5.00x", "1.00"], "last: all on against all but it"
    assert rows[B] == ["16.0", "1.60x", "1.00", "20.0", "4.00x", "3.50"]
    assert rows["all on"] == ["80.0", "8.00x", "2.25"]
    assert "x.y is left out: it is off" in table
    assert "3.0% apart at most" in table


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.setting)
def test_every_switch_is_one_of_a_setting(switch: Switch, ranks: Ranks) -> None:
    """It sets what it names, nothing else, and its effect can be read off a trainer."""
    config = nano_config(engine="torch", precision="bf16")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, device="auto"))
    group, name = switch.setting.split(".")

    def value(of: Config) -> object:
        return getattr(getattr(of, group), name)

    on, off = switch.set(config, True), switch.set(config, False)
    assert value(on) != switch.off == value(off)
    assert switch.set(on, False) == off
    switch.runs(Trainer(off, ranks))


def test_on_is_what_the_recipe_has() -> None:
    zero = next(switch for switch in SWITCHES if switch.setting == "engine.zero_stage")
    config = nano_config()
    chosen = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=2))
    assert zero.set(chosen, True) == chosen
    assert zero.set(zero.set(chosen, False), True).engine.zero_stage == "auto"


def test_what_a_device_cannot_run_is_left_out(ranks: Ranks) -> None:
    """Of the real switches: a CPU has no graphs, no streams and no fp8; what it has is measured."""
    config = nano_config(engine="torch")
    found = ablate(config, ranks, [random_batch(config, CPU, 0)], 0.1)
    assert found.switches == ["model.packed", "engine.checkpointing"]
    assert found.skipped.keys() == {switch.setting for switch in SWITCHES} - {*found.switches}
    assert "runs what off runs" in found.skipped["engine.cuda_graphs"]
    assert all(isinstance(cost, Cost) for cost in found.costs.values())
