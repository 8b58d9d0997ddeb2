"""How parameters start: each element is a function of (seed, name of the parameter, place in it), whoever asks for it.

Nothing else matters: not the rank, the stage of ZeRO, the device, the number of threads, nor what else is asked for. So
every rank makes its own share of a model that no rank can hold. Noise is only added, multiplied and divided, which
IEEE 754 rounds alike on every processor: replicas on two kinds of hosts start equal to the bit.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Array = np.ndarray[Any, np.dtype[np.float32]]
Rule = Callable[[int, int, Array], None]
"""(key, start, out): writes elements [start, start + len(out)) of a parameter into ``out``; ``key`` is of its noise."""

Values = Callable[[str, int, int], Tensor]
"""(name, start, stop) -> (stop - start,) fp32 on the CPU, elements of the flattened parameter of that name."""

CHUNK = 2**16  # elements that are made at a time, for a processor's cache
# x P(x^2) / Q(x^2) for x in [-1/2, 1/2] is sqrt(2) erfinv(2 x erf(sqrt(2))), the inverse of the normal distribution cut
# off at +-2, to 4e-6 of itself, by a weighted least squares fit; and the deviation that is left of 1.
P = (2.39258347, -15.64050652, 28.72863125, -11.31420533)
Q = (1.0, -7.49069179, 17.22946603, -11.447401)
DEVIATION = 0.87962566103423978


def constant(value: float) -> Rule:
    """``value`` everywhere."""

    def rule(key: int, start: int, out: Array) -> None:
        out.fill(value)

    return rule


def uniform(bound: float) -> Rule:
    """Uniform in [-bound, bound)."""

    def rule(key: int, start: int, out: Array) -> None:
        _noise(key, start, out)
        out *= np.float32(2 * bound)

    return rule


def trunc_normal(std: float) -> Rule:
    """Of deviation ``std``: a normal distribution cut off at two of its own, 2.27 of these.

    torch.nn.init.trunc_normal_ has this deviation too, for it cuts at +-2 by default, which is far out.
    """

    def rule(key: int, start: int, out: Array) -> None:
        _noise(key, start, out)
        square = out * out
        out *= _horner(P, square)
        out /= _horner(Q, square)
        out *= np.float32(std / DEVIATION)

    return rule


def table(make: Callable[[], Tensor]) -> Rule:
    """The elements of the tensor that ``make`` makes, whatever the seed."""

    def rule(key: int, start: int, out: Array) -> None:
        out[:] = make().flatten()[start : start + len(out)].float().numpy()

    return rule


def held(parts: Sequence[Tensor]) -> Rule:
    """The elements of tensors, one after another, whatever the seed; those alone that are asked for are read."""

    def rule(key: int, start: int, out: Array) -> None:
        for part in parts:
            wanted = part.flatten()[max(start, 0) : max(start + len(out), 0)].float().numpy()
            out[max(-start, 0) :][: len(wanted)] = wanted
            start -= part.numel()

    return rule


def values(seed: int, name: str, start: int, stop: int, rule: Rule) -> Tensor:
    """(stop - start,) fp32 on the CPU, elements [start, stop) of the flattened parameter ``name``.

    Philox (Salmon et al. 2011) keyed by seed and name, so that no element depends on another. It takes as many threads
    as torch does.
    """
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    out = np.empty(stop - start, np.float32)

    def make(offset: int) -> None:
        rule(key, start + offset, out[offset : offset + CHUNK])

    offsets = range(0, len(out), CHUNK)
    if len(offsets) < 4 * torch.get_num_threads() or torch.get_num_threads() == 1:
        for offset in offsets:
            make(offset)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(make, offsets))
    return torch.from_numpy(out)


def rules_of(network: nn.Module) -> dict[str, Rule]:
    """The rule of each parameter by its name: what its module's ``initial`` says, or that of a module around it."""
    found: dict[str, Rule] = {}
    for path, module in network.named_modules():
        if initial := getattr(module, "initial", None):
            found |= {f"{path}.{name}".lstrip("."): rule for name, rule in initial().items()}
    lacking = [name for name, param in network.named_parameters() if param.is_meta and name not in found]
    assert not lacking, f"no module says how these start: {', '.join(lacking)}"
    return found


def of_layers(module: nn.Module, init: str) -> dict[str, Rule]:
    """Rules of torch's layers in ``module``: linear ones by model.init without bias, norms as the identity."""
    found: dict[str, Rule] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            xavier = uniform(math.sqrt(6 / (layer.in_features + layer.out_features)))
            found[f"{path}.weight"] = xavier if init == "xavier" else trunc_normal(0.02)
        elif isinstance(layer, nn.LayerNorm | _BatchNorm):
            found[f"{path}.weight"] = constant(1.0)
        else:
            continue
        found[f"{path}.bias"] = constant(0.0)
    return found


def initialise(module: nn.Module, seed: int) -> None:
    """Gives every parameter of ``module`` its first values, unless it is on the meta device."""
    if next(module.parameters()).is_meta:
        return
    for name, rule in rules_of(module).items():
        param = module.get_parameter(name)
        param.data.copy_(values(seed, name, 0, param.numel(), rule).view_as(param))


def materialise(network: nn.Module, start: Values) -> None:
    """Gives the parameters on the meta device their first values, in fp32 on the CPU."""
    for name, param in network.named_parameters():
        if param.is_meta:
            whole = start(name, 0, param.numel()).view(param.shape)
            torch.utils.swap_tensors(param, nn.Parameter(whole, requires_grad=param.requires_grad))


def _noise(key: int, start: int, out: Array) -> None:
    """Uniform noise in [-1/2, 1/2) of 24 bits, elements [start, start + len(out)) of the stream ``key``."""
    stream = np.random.Generator(np.random.Philox(key=key).advance(start // 8))  # it makes 8 numbers at a time
    stream.random(start % 8, dtype=np.float32)
    stream.random(dtype=np.float32, out=out)
    out -= np.float32(0.5)


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    """The polynomial, lowest power first."""
    *lower, highest = coefficients
    y = np.full_like(x, highest)
    for coefficient in reversed(lower):
        y *= x
        y += np.float32(coefficient)
    return y
