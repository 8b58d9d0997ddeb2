"""What each switch gives: alone, when all others are off, and last, when all others are on.

A variant is built, measured and freed by itself, so that the memory of no other counts, and large networks fit. All are
measured twice, the second time in the reverse order, so that what disturbs or slows the machine for a while has not the
last word on any. Those that say most come first: what is stopped has measured them.
"""

import dataclasses
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdino.config import Config, UserError
from fastdino.data import Batch
from fastdino.distributed import Ranks
from fastdino.engine import zero_stage
from fastdino.model.packing import is_packed
from fastdino.training.flops import peak_memory, reset_peak_memory
from fastdino.training.throughput.timing import step_seconds, warm_up
from fastdino.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Switch:
    """A setting that changes how a step is computed and not what, but for rounding."""

    setting: str
    on: Any
    """Where the recipe has not another value."""
    off: Any
    runs: Callable[[Trainer], object]
    """What runs, of a trainer: it is the same on and off where the switch has no effect."""

    def value(self, config: Config) -> Any:
        """What the config says of it."""
        group, name = self.setting.split(".")
        return getattr(getattr(config, group), name)

    def set(self, config: Config, on: bool) -> Config:
        """The config with it on, which is the recipe's own value unless that is off, or with it off."""
        group, name = self.setting.split(".")
        given = self.value(config)
        value = (self.on if given == self.off else given) if on else self.off
        return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


def _attention(trainer: Trainer) -> str:
    return str(trainer.engine.student_network.backbone.implementation)  # type: ignore[union-attr]


def _packed(trainer: Trainer) -> bool:
    return is_packed(trainer.config.model.packed, trainer.ranks.device)


SWITCHES = (  # one that another refuses comes after it
    Switch("model.attention", "auto", "sdpa", _attention),
    Switch("model.packed", "auto", "off", lambda t: t.config.model.is_vit and t.config.views.num_local and _packed(t)),
    Switch("engine.compile", "auto", "off", lambda t: t.compiled),
    Switch("engine.zero_stage", "auto", 0, lambda t: t.engine.sharded and zero_stage(t.config, t.ranks)),
    Switch("engine.cuda_graphs", "auto", "off", lambda t: t.captures),
    Switch("engine.teacher_stream", True, False, lambda t: t.method.beside.stream),
    Switch("engine.checkpointing", "selective", "none", lambda t: t.config.engine.checkpointing),
    Switch("engine.fp8", True, False, lambda t: t.config.engine.fp8),
)

On = frozenset[str]
"""The switches of a variant that are on."""


@dataclass(frozen=True)
class Cost:
    """Of a variant's step."""

    seconds: float
    """By the faster of its two measurements: other programs disturb but never help."""
    spread: float
    """How much longer the slower one was, as a share of the faster; 0 until there are two."""
    peak_memory: int
    """Bytes, of the rank that needs most."""


@dataclass(frozen=True)
class Ablation:
    """What steps cost with some of the switches on."""

    global_batch: int
    skipped: dict[str, str]
    """Switches without effect here, and why."""
    switches: list[str]
    """The others."""
    costs: dict[On, Cost | str]
    """Or why a variant does not run. Those that were measured so far."""

    def table(self) -> str:
        """A line for each switch: images/s, how many times those without it, and memory."""
        lines = [f"{name} is left out: {why}" for name, why in self.skipped.items()]
        if not self.switches:
            return "\n".join(lines)
        everything, nothing = frozenset(self.switches), On()
        head = f"{'images/s':>12}{'gain':>8}{'GB':>8}"
        lines += [f"{'':20}{'it alone':>28}{'all but it':>28}", f"{'':20}{head}{head}"]
        lines += [f"{'all off':20}{self._cells(nothing, nothing, nothing)}"]
        for name in self.switches:
            one, rest = On({name}), everything - {name}
            lines.append(f"{name:20}{self._cells(one, one, nothing)}{self._cells(rest, everything, rest)}")
        lines.append(f"{'all on':20}{self._cells(everything, everything, nothing)}")
        spread = max((cost.spread for cost in self.costs.values() if isinstance(cost, Cost)), default=0.0)
        lines.append(
            f"gain: times as many images/s as without it; the faster of two measurements, {spread:.1%} apart at most"
        )
        refused = {on: why for on, why in self.costs.items() if isinstance(why, str)}
        return "\n".join([*lines, *(f"{_name(on)} does not run: {why}" for on, why in refused.items())])

    def _cells(self, shown: On, with_it: On, without: On) -> str:
        cost, slow, fast = self.costs[shown], self.costs[without], self.costs[with_it]
        if isinstance(cost, str):
            return f"{'does not run':>28}"
        gain = f"{slow.seconds / fast.seconds:.2f}x" if isinstance(slow, Cost) and isinstance(fast, Cost) else "-"
        return f"{self.global_batch / cost.seconds:12.1f}{gain:>8}{cost.peak_memory / 1e9:8.2f}"


def ablate(
    config: Config,
    ranks: Ranks,
    views: list[Batch],
    seconds: float,
    *,
    only: Sequence[str] = (),
    save: Callable[[Ablation, str], None] = lambda found, turn: None,
) -> Ablation:
    """Measures the step with every switch that has an effect here, on ``views`` that are on the device.

    Every rank calls it. Other trainers are used no more.

    Args:
        only: these switches, the others as the config has them; all where none is named.
        save: takes what was found so far and how far that is, after every measurement.
    """
    _free(ranks)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))  # they read no image
    asked = [switch for switch in SWITCHES if not only or switch.setting in only]
    switches, skipped = _sorted_out(config, asked, ranks)
    everything = On(switches)
    variants = [everything, *(everything - {name} for name in switches), On(), *(On({name}) for name in switches)]
    variants = [*dict.fromkeys(variants)] if switches else []
    measured: dict[On, list[tuple[float, int] | str]] = {on: [] for on in variants}
    found = Ablation(len(views) * config.run.local_batch * ranks.world_size, skipped, switches, {})
    for turn, on in enumerate([*variants, *reversed(variants)], 1):
        how_far = f"{turn} of {2 * len(variants)}"
        if ranks.is_main:
            log.info("ablation, %s: %s", how_far, _name(on))
        measured[on].append(_measure(_with(config, on, asked), ranks, views, seconds / 2))
        _free(ranks)
        found = dataclasses.replace(found, costs={on: _cost(each) for on, each in measured.items() if each})
        save(found, how_far)
    return found


def _name(on: On) -> str:
    return ", ".join(sorted(on)) or "all off"


def _with(config: Config, on: On, asked: Sequence[Switch]) -> Config:
    """The config with the switches ``on`` on, the others of ``asked`` off."""
    for switch in asked:
        config = switch.set(config, switch.setting in on)
    return config


def _sorted_out(config: Config, asked: Sequence[Switch], ranks: Ranks) -> tuple[list[str], dict[str, str]]:
    """The switches that have an effect here, one after the other, and why the rest have none."""
    on, skipped = On(), dict[str, str]()
    before = _running(_with(config, on, asked), asked, ranks)
    for switch in asked:
        name = switch.setting
        try:
            one_more = _with(config, on | {name}, asked)
            running = _running(one_more, asked, ranks)
        except UserError as error:
            skipped[name] = str(error)
            continue
        if running[name] == before[name]:
            skipped[name] = f"{switch.value(one_more)} runs what {switch.off} runs, for this recipe on this device"
        else:
            on, before = on | {name}, running
    return [switch.setting for switch in asked if switch.setting in on], skipped


def _running(config: Config, asked: Sequence[Switch], ranks: Ranks) -> dict[str, object]:
    """What runs, by switch."""
    try:
        trainer = _trainer(config, ranks)
        return {switch.setting: switch.runs(trainer) for switch in asked}
    finally:
        _free(ranks)


def _trainer(config: Config, ranks: Ranks) -> Trainer:
    """A variant's, that reads no images and says only what is wrong: the rest is what the others say."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.INFO))
    try:
        trainer = Trainer(config, ranks)
    finally:
        logging.disable(disabled)
    trainer.batches.close()
    return trainer


def _measure(config: Config, ranks: Ranks, views: list[Batch], seconds: float) -> tuple[float, int] | str:
    """Seconds of a step, and bytes; or why there are none."""
    try:
        trainer = _trainer(config, ranks)

        def step() -> None:
            trainer.train_step(views)

        warm_up(step, ranks, seconds)
        reset_peak_memory(ranks.device)
        taken = step_seconds(step, ranks, seconds)
    except (torch.OutOfMemoryError, UserError) as error:
        if isinstance(error, torch.OutOfMemoryError) and ranks.world_size > 1:  # the others wait for this one
            raise
        return str(error).splitlines()[0]
    return max(ranks.gather((taken, peak_memory(ranks.device))))


def _cost(measured: list[tuple[float, int] | str]) -> Cost | str:
    """Of a variant that was measured once or twice."""
    for found in measured:
        if isinstance(found, str):
            return found
    seconds, peaks = zip(*(found for found in measured if not isinstance(found, str)), strict=True)
    return Cost(min(seconds), max(seconds) / min(seconds) - 1, max(peaks))


def _free(ranks: Ranks) -> None:
    """Gives back what trainers held, their compiled code too; an engine and its hooks hold each other."""
    ranks.release()
    torch.compiler.reset()
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
