"""One call to measure: its inputs, its alternatives, the bytes that it cannot do without."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdino_kernels.testing import assert_no_worse

OURS, PLAIN, COMPILED = "fastdino", "reference", "torch.compile"
# Beyond it a variant computes something else. lightly's losses need room in bf16: autocast rounds log-probabilities.
PEER_ERROR = 0.05
# Deviation of the random logits: cosines, as a head with frozen norms gives. Of four times as much many of the
# teacher's probabilities would be subnormal, which slows many a CPU.
LOGITS_STD = 0.25

Function = Callable[..., Any]
"""A computation on an operation's inputs, but for ``grad``; returns a tensor or several."""
Bound = Callable[[], list[Tensor]]  # one call on given inputs; returns what is judged


class Shape(NamedTuple):
    """``10,2,64,65536,bf16`` on a device."""

    text: str
    device: torch.device

    @property
    def sizes(self) -> list[int]:
        return [int(part) for part in self.text.split(",") if part.isdigit()]

    @property
    def dtype(self) -> torch.dtype:
        """The last part, or fp32 when none is named."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes.get(self.text.split(",")[-1], torch.float32)

    def random(self, seed: int) -> Callable[..., Tensor]:
        """torch.randn from this seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return lambda *size: torch.randn(*size, generator=generator, device=self.device)


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
    rounds: int | None = None
    """Most that are worth their time."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}"


def with_gradients(function: Function, leaves: Sequence[str] = ()) -> Callable[[Any], Bound]:
    """The call of ``function`` on a tuple of inputs, and the gradients of its result for the inputs named ``leaves``.

    The inputs' ``grad``, if they have one, is the gradient that comes back. What the function is given is no leaf, like
    the output of a layer.
    """

    def bind(inputs: Any) -> Bound:
        names = [name for name in inputs._fields if name != "grad"]

        def call() -> list[Tensor]:
            given = (getattr(inputs, name) for name in names)
            result = function(*(x.view_as(x) if name in leaves else x for name, x in zip(names, given, strict=True)))
            if not leaves:
                return [result] if isinstance(result, Tensor) else list(result)
            wanted = [getattr(inputs, name) for name in leaves]
            return [result.detach(), *torch.autograd.grad(result, wanted, getattr(inputs, "grad", None))]

        return call

    return bind


def widened(inputs: Any) -> Any:
    """The same inputs in float64, numbers on the device apart."""

    def widen(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim:
            return [widen(y) for y in x] if isinstance(x, list) else x
        return x.detach().double().requires_grad_(x.requires_grad)

    return type(inputs)(*map(widen, inputs))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An operation: its usual shapes by device, the headline first, and how a shape becomes a case."""

    name: str
    shapes: dict[str, list[str]]
    make: Callable[[Shape, int], Any]
    """Random inputs, a NamedTuple in the order of the functions' arguments."""
    bytes: Callable[[Shape], int]
    ours: Function
    reference: Function
    others: Callable[[Shape], dict[str, Variant | Function]] = lambda shape: {}
    compiled: Callable[[Shape], Function | None] | None = None
    """What torch.compile is given, None for nothing; the reference by default."""
    leaves: tuple[str, ...] = ()
    restore: Callable[[Any], object] | None = None
    """After a call of ours."""
    judge: Callable[[Any, list[Tensor]], list[Tensor]] = lambda inputs, results: results
    rounds: int | None = None

    def bind(self, function: Function) -> Callable[[Any], Bound]:
        return with_gradients(function, self.leaves)

    def case(self, text: str, device: torch.device, compiled: bool) -> Case:
        shape = Shape(text, device)
        functions: dict[str, Variant | Function] = {PLAIN: self.reference, **self.others(shape)}
        compile_it = self.reference if self.compiled is None else self.compiled(shape)
        if compiled and compile_it is not None:
            functions[COMPILED] = torch.compile(compile_it, dynamic=False)
        variants = {OURS: Variant(self.bind(self.ours), self.restore, self.judge)}
        for name, x in functions.items():
            variants[name] = x if isinstance(x, Variant) else Variant(self.bind(x), judge=self.judge)

        def exact(inputs: Any) -> list[Tensor]:
            return self.judge(inputs, self.bind(self.reference)(widened(inputs))())

        return Case(
            self.name, text, lambda seed: self.make(shape, seed), exact, variants, self.bytes(shape), self.rounds
        )


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
