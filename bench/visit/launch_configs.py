"""Launch configurations beside the one in the code, each number of it halved and doubled.

Correct first, as in bench.kernels, then timed in turns. ``python -m bench.visit.launch_configs`` prints them at the
headline shape of each operation, fastest first. No file is written: a winner belongs in the operation's launch_config.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import fastdino_kernels
from bench.kernels.case import OURS, PLAIN, Bound, Case
from bench.kernels.measure import BENCHES, measure
from bench.record import positive

# Those whose launcher asks for its configuration at every call.
OPERATIONS = ("dino_loss", "ibot_loss", "sinkhorn", "prototype_weight")
ROUNDS = 40
Config = dict[str, Any]
"""Numbers by name, or for each of several kernels."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.launch_configs", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "python -m bench.visit.launch_configs: torch sees no GPU, and a CPU launches no kernel\n")
    device, wrong = torch.device("cuda"), 0
    for name in options.only:
        case = with_alternatives(BENCHES[name].case(BENCHES[name].shapes["cuda"][0], device, compiled=False))
        print(case.name)
        try:
            found = measure(case, device, options.rounds).figures
        except AssertionError as error:
            print(f"  no figure, because a result is wrong: {error}", flush=True)
            wrong += 1
            continue
        for variant in sorted(found.keys() - {PLAIN}, key=lambda x: found[x]["milliseconds"]):
            figures = found[variant]
            print(
                f"  {variant:40} {figures['milliseconds']:9.4f} ms  {figures['times_ours']['median']:6.3f}x", flush=True
            )
    return int(bool(wrong))


def with_alternatives(case: Case) -> Case:
    """The case with its kernels launched in other ways, in the place of its peers."""
    module = sys.modules[getattr(fastdino_kernels, case.operation).__module__]
    ours = case.variants[OURS]
    config = configuration(module, ours.bind(case.make(0)))
    variants = {name: case.variants[name] for name in (OURS, PLAIN)}
    for name, other in alternatives(config):
        variants[name] = replace(ours, bind=launched_with(module, other, ours.bind))
    return replace(case, variants=variants)


def configuration(module: ModuleType, call: Bound) -> Config:
    """What ``module.launch_config`` says in ``call``."""
    original, said = module.launch_config, list[Config]()

    def asked(*sizes: int) -> Config:
        said.append(original(*sizes))
        return said[-1]

    with mock.patch.object(module, "launch_config", asked):
        call()
    assert said, f"{module.__name__} launches nothing"
    return said[0]


def alternatives(config: Config) -> Iterator[tuple[str, Config]]:
    """Every number halved and doubled; block and warps together too, which leaves a thread its share."""
    nested = all(isinstance(numbers, dict) for numbers in config.values())
    for kernel, numbers in config.items() if nested else [("", config)]:
        for names in [*((name,) for name in numbers), ("BLOCK_K", "num_warps")]:
            if not set(names) <= numbers.keys():
                continue
            for factor in (0.5, 2):
                other = numbers | {name: int(factor * numbers[name]) for name in names}
                if all(other.values()):
                    label = ", ".join(f"{name} {other[name]}" for name in names)
                    yield f"{kernel} {label}".strip(), config | {kernel: other} if nested else other


def launched_with(module: ModuleType, config: Config, bind: Callable[[Any], Bound]) -> Callable[[Any], Bound]:
    """``bind``, whose calls find ``config`` in the module."""

    def other(*sizes: int) -> Config:
        return config

    def bound(inputs: Any) -> Bound:
        call = bind(inputs)

        def run() -> list[torch.Tensor]:
            with mock.patch.object(module, "launch_config", other):
                return call()

        return run

    return bound


if __name__ == "__main__":
    sys.exit(main())
