"""Numbers that change from step to step: a float, or a 0-d tensor that a kernel reads from the device.

A step that was captured in a CUDA graph launches again what it launched then, floats included, so there they are
tensors. The host never waits for one: only the type of it is checked. Both forms give the same result, bit for bit.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from fastdino_kernels._backend import LOG2_E

Number = float | Tensor


def check_number(name: str, number: Tensor, device: torch.device) -> None:
    """Raises ValueError unless this is a 0-d fp32 or fp64 tensor on ``device`` that takes no gradient."""
    fits = not number.ndim and number.dtype in (torch.float32, torch.float64) and number.device == device
    if not fits or number.requires_grad:
        raise ValueError(
            f"{name} is a tensor of shape {tuple(number.shape)}, {number.dtype} on {number.device}"
            f"{' with a gradient' if number.requires_grad else ''}: pass a float, or a 0-d fp32 or fp64 tensor on "
            f"{device} without one"
        )


def check_temps(device: torch.device, *, student_temp: float | None = None, **teacher: Number) -> None:
    """Raises ValueError for a float that is no temperature and for a tensor that a kernel cannot read one from."""
    if isinstance(student_temp, Tensor):
        raise ValueError("student_temp is a tensor: pass a float, as it is the same in every step")
    temps = teacher if student_temp is None else {"student_temp": student_temp, **teacher}
    for name, temp in temps.items():
        if isinstance(temp, Tensor):
            check_number(name, temp, device)
        elif not temp > 0:
            found = ", ".join(f"{key}={x}" for key, x in temps.items() if not isinstance(x, Tensor))
            raise ValueError(f"temperatures must be positive; got {found}")


def to_operator(number: Number) -> tuple[float | None, Tensor | None]:
    """The two arguments of an operator, whose schema has no type for either, that :func:`from_operator` makes one."""
    return (None, number) if isinstance(number, Tensor) else (number, None)


def from_operator(number: float | None, on_device: Tensor | None) -> Number:
    """The one of the two that there is."""
    found = number if on_device is None else on_device
    assert found is not None
    return found


def on_host(number: Number) -> float:
    """A float, for references: a CPU may read its own tensor. In fp64 on a GPU it waits."""
    # Not .item(), which is counted where host and device must not meet: on a CPU there is nothing to wait for.
    return number.tolist() if isinstance(number, Tensor) else number  # type: ignore[return-value]


def log2_scale(temp: Number) -> Number:
    """What :func:`load_log2_scale` takes: log2(e) / temp, rounded as there, or where the temperature is."""
    return temp if isinstance(temp, Tensor) else _fp32(LOG2_E) / _fp32(temp)


def ema_weight(momentum: Number) -> Number:
    """What :func:`load_ema_weight` takes: 1 - momentum, which would lose digits in fp32, or where the momentum is."""
    return momentum if isinstance(momentum, Tensor) else 1 - momentum


def product(a: Number, b: Number) -> tuple[float | None, Number | None]:
    """a * b of floats, each rounded to fp32 as in a kernel, and None; or None and b, where a kernel multiplies."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return None, b
    return _fp32(a) * _fp32(b), None


def _fp32(x: float) -> float:
    return ctypes.c_float(x).value


@triton.jit
def load_number(number):
    # In fp32: a number, or what a pointer to one points to.
    number = core.to_tensor(number)  # the interpreter passes a float as what it is
    if number.dtype.is_ptr():
        number = tl.load(number).to(tl.float32)
    return number


@triton.jit
def load_log2_scale(scale):
    # log2(e) / temperature, correctly rounded as the host does it.
    scale = core.to_tensor(scale)
    if scale.dtype.is_ptr():
        scale = tl.div_rn(1.4426950408889634, tl.load(scale).to(tl.float32))
    return scale


@triton.jit
def load_ema_weight(weight):
    # 1 - momentum, subtracted in the momentum's own dtype: in fp64 nothing is lost.
    weight = core.to_tensor(weight)
    if weight.dtype.is_ptr():
        weight = (1 - tl.load(weight)).to(tl.float32)
    return weight
