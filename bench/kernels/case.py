"""One call to measure: its inputs, its alternatives, the bytes that it cannot do without."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdino_kernels.testing import assert_no_worse

OURS, PLAIN = "fastdino", "reference"
# Beyond it a variant computes something else. lightly's losses need room in bf16: autocast rounds log-probabilities.
PEER_ERROR = 0.05
# Deviation of the random logits: cosines, as a head with frozen norms gives. Of four times as much many of the
# teacher's probabilities would be subnormal, which slows many a CPU.
LOGITS_STD = 0.25

Bound = Callable[[], list[Tensor]]  # one call on given inputs; returns what is judged


@dataclass(frozen=True)
class Variant:
    """A way to compute a case: ours, the reference, torch.compile, or a peer's."""

    bind: Callable[[Any], Bound]
    """Given inputs, the call: nothing that a caller would do only once may happen in it."""
    restore: Callable[[Any], object] | None = None
    """Makes inputs fit for the next call, untimed, where a call consumes them."""
    judge: Callable[[Any, list[Tensor]], list[Tensor]] = lambda inputs, results: results
    """What the exact results are compared with, where results differ in form."""


@dataclass(frozen=True)
class Case:
    """``variants`` has ours under OURS and the definition in plain torch under PLAIN."""

    operation: str
    shape: str
    make: Callable[[int], Any]
    """Random inputs from a seed; the same seed gives the same inputs."""
    exact: Callable[[Any], list[Tensor]]
    """Results in float64 on the same inputs."""
    variants: dict[str, Variant]
    bytes: int
    """What any implementation has to read and write at least."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}"


def without_failing(case: Case) -> tuple[Case, dict[str, str]]:
    """The case without the peers that raise, and why each does: what a peer cannot do costs no figure of ours."""
    problems = {}
    for name in case.variants:
        if not (name.startswith(OURS) or name == PLAIN):
            try:
                _results(case, name)
            except Exception as error:  # Inductor, Triton and the peers have errors of many kinds
                problems[name] = first_line(error)
    kept = {name: variant for name, variant in case.variants.items() if name not in problems}
    return replace(case, variants=kept), problems


def first_line(error: Exception) -> str:
    """The error's type and what it says, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check(case: Case) -> dict[str, float]:
    """Judges every variant on the same inputs; returns the error of each, norm(got - exact) / norm(exact).

    Raises AssertionError for ours when it is worse than plain torch by more than the tolerance, and for a peer that
    computes something else. No variant is timed before.
    """
    exact = case.exact(case.make(0))
    plain = _results(case, PLAIN)
    errors = {}
    for name in case.variants:
        results = _results(case, name)
        if name.startswith(OURS):
            for got, ref, want in zip(results, plain, exact, strict=True):
                assert_no_worse(got, ref, want)
        errors[name] = max(_error(got, want) for got, want in zip(results, exact, strict=True))
        assert errors[name] <= PEER_ERROR, f"{case.name}: {name} is off by {errors[name]:.2g}: it is something else"
    return errors


def _results(case: Case, name: str) -> list[Tensor]:
    variant, inputs = case.variants[name], case.make(0)
    return variant.judge(inputs, variant.bind(inputs)())


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def parse_shape(text: str) -> tuple[list[int], torch.dtype]:
    """``10,2,64,65536,bf16`` -> sizes and dtype (fp32 when none is named)."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    parts = text.split(",")
    dtype = dtypes[parts.pop()] if parts[-1] in dtypes else torch.float32
    return [int(part) for part in parts], dtype
