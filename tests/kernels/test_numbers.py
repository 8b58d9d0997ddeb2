"""Numbers that change from step to step: from the device a kernel takes what a float would have given, bit for bit."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdino_kernels import AdamWHyper, _backend, dino_loss, ibot_loss, linear_ibot_loss, make_segments, sinkhorn
from fastdino_kernels._backend import LOG2_E
from fastdino_kernels._numbers import log2_scale
from fastdino_kernels.optim.adamw_ema import adamw_ema_, adamw_ema_reference_
from tests.kernels.calls import DEVICE, ON_DEVICE, Number, captured, make_calls, run

CASES = [name.removesuffix(ON_DEVICE) for name in make_calls("cpu") if name.endswith(ON_DEVICE)]
cases = pytest.mark.parametrize("case", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
NEW = 0.07  # no fp32 number


def is_number(x: Any) -> bool:
    return not isinstance(x, Tensor) or not x.ndim


def with_numbers(args: tuple[Any, ...], make: Callable[[], Number]) -> tuple[Any, ...]:
    return tuple(make() if is_number(x) else x for x in args)


@pytest.fixture(params=[True, False], ids=["kernel", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, where there is no GPU, which always runs the kernels."""
    if torch.cuda.is_available() and not request.param:
        pytest.skip("a GPU always runs the kernels")
    monkeypatch.setattr(_backend, "INTERPRETED", request.param)


@cases
@DTYPES
@pytest.mark.usefixtures("implementation")
def test_a_call_reads_what_a_tensor_holds_then(case: str, dtype: torch.dtype) -> None:
    """Results and gradients are those of a float of that value, also after it has changed where it is."""
    call, args = make_calls(numbers_dtype=dtype)[case + ON_DEVICE]
    floats = tuple(x.item() if is_number(x) else x for x in args)
    expected = run(call, floats)
    torch.testing.assert_close(run(call, args), expected, rtol=0, atol=0)
    for x in filter(is_number, args):
        x.fill_(NEW)
    changed = run(call, args)
    assert not torch.equal(changed[0], expected[0])
    value = torch.tensor(NEW, dtype=dtype).item()
    torch.testing.assert_close(changed, run(call, with_numbers(floats, lambda: value)), rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if "loss" in case or "sinkhorn" in case])
@pytest.mark.usefixtures("implementation")
def test_a_temperature_is_rounded_to_fp32_in_every_form(case: str) -> None:
    call, args = make_calls()[case]
    expected = run(call, with_numbers(args, lambda: NEW))
    for dtype in (torch.float32, torch.float64):
        temp = torch.tensor(NEW, dtype=dtype, device=DEVICE)
        torch.testing.assert_close(run(call, with_numbers(args, lambda temp=temp: temp)), expected, rtol=0, atol=0)


def test_the_host_divides_as_a_kernel_does() -> None:
    temps = torch.linspace(0.01, 1.5, 20_000)
    scales = torch.tensor([log2_scale(temp) for temp in temps.double().tolist()], dtype=torch.float32)
    assert torch.equal(scales, torch.tensor(LOG2_E, dtype=torch.float32) / temps)


@cases
@pytest.mark.usefixtures("implementation")
def test_a_changed_value_compiles_nothing(case: str) -> None:
    call, args = make_calls()[case + ON_DEVICE]
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    run(compiled, args)
    compiled_before = counter.frame_count
    for x in filter(is_number, args):
        x.fill_(NEW)
    torch.testing.assert_close(run(compiled, args), run(call, args), rtol=0, atol=0)
    assert counter.frame_count == compiled_before > 0


def test_a_temperature_that_changed_before_the_backward_pass() -> None:
    """The gradient would be that of another loss."""
    temp = torch.tensor(0.04, device=DEVICE)
    student = torch.randn(3, 2, 30, device=DEVICE, requires_grad=True)
    loss = dino_loss(student, student[:2].detach(), student.new_zeros(30), student_temp=0.1, teacher_temp=temp)
    temp.fill_(NEW)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LENGTHS = [700, 0, 1, 1599]


@pytest.mark.parametrize("update", [adamw_ema_, adamw_ema_reference_], ids=["kernel", "reference"])
@pytest.mark.parametrize("on_device", [*itertools.product([False, True], repeat=3)], ids=str)
def test_any_of_three_numbers_on_the_device(on_device: tuple[bool, ...], update: Callable[..., None]) -> None:
    """Floats and tensors mixed, as where one group of parameters has a decay of 0; a rate of 0 leaves every bit."""
    numbers = (0.7, 0.3, 0.996)  # a decay so large that its last digit shows, and which fp64 would round otherwise
    mixed = [
        torch.tensor(x, dtype=torch.float64, device=DEVICE) if there else x
        for x, there in zip(numbers, on_device, strict=True)
    ]
    rates = torch.tensor([0.5, 3.0, 1.0, 0.0], device=DEVICE)
    results = []
    for hyper in (AdamWHyper(*numbers), AdamWHyper(*mixed)):
        made = torch.randn(5, sum(LENGTHS), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        param, grad, exp_avg, exp_avg_sq, ema = made.unbind()
        param[-2:], kept = torch.tensor([-0.0, torch.nan]), param.clone()
        options = {"lr_scale": rates, "grad_scale": rates.flip(0), "segments": make_segments(LENGTHS, DEVICE)}
        update(param, grad, exp_avg, exp_avg_sq.square_(), ema, torch.ones((), device=DEVICE), hyper, **options)
        update(param, grad, exp_avg, exp_avg_sq, ema, torch.ones((), device=DEVICE), hyper)
        results.append(made.view(torch.int32))
        assert not torch.equal(param, kept)
    assert torch.equal(*results)


WRONG: dict[str, tuple[Any, str]] = {
    "shape": (torch.zeros(1), r"{} is a tensor of shape \(1,\), torch.float32 on cpu: pass a float, or a 0-d"),
    "half": (torch.zeros((), dtype=torch.bfloat16), r"{} is a tensor of shape \(\), torch.bfloat16"),
    "integer": (torch.ones((), dtype=torch.long), r"{} is a tensor of shape \(\), torch.int64"),
    "device": (torch.zeros((), device="meta"), "{} is a tensor of .* on meta: .* tensor on cpu"),
    "gradient": (torch.ones((), requires_grad=True), "{} is a tensor of .* on cpu with a gradient: .* without one"),
}
Z = torch.zeros
TEMPERED: dict[str, Callable[..., Any]] = {
    "dino_loss": lambda **temps: dino_loss(Z(2, 3, 4), Z(2, 3, 4), Z(4), **temps),
    "ibot_loss": lambda **temps: ibot_loss(Z(3, 4), Z(3, 4), Z(4), Z(3), **temps),
    "linear_ibot_loss": lambda **temps: linear_ibot_loss(Z(3, 5), Z(4, 5), Z(3, 5), Z(4, 5), Z(4), Z(3), **temps),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_tensor_that_is_no_number_is_refused(wrong: str) -> None:
    value, message = WRONG[wrong]
    for name, loss in TEMPERED.items():
        with pytest.raises(ValueError, match=message.format("teacher_temp")):
            loss(student_temp=0.1, teacher_temp=value)
        with pytest.raises(ValueError, match=r"teacher_temp=-1.0|teacher_temp=nan"):
            loss(student_temp=0.1, teacher_temp=-1.0 if name == "ibot_loss" else float("nan"))
        with pytest.raises(ValueError, match="student_temp is a tensor: pass a float"):
            loss(student_temp=torch.tensor(0.1), teacher_temp=0.04)
    with pytest.raises(ValueError, match=message.format("temp")):
        sinkhorn(Z(3, 4), temp=value)
    for name in ("lr", "weight_decay", "momentum"):
        hyper = AdamWHyper(1e-3, 0.04, 0.9)._replace(**{name: value})
        with pytest.raises(ValueError, match=message.format(name)):
            adamw_ema_(*Z(5, 6).unbind(), torch.ones(()), hyper)


@pytest.mark.gpu
@cases
def test_a_replay_reads_the_new_value(case: str) -> None:
    if "segments" in case or "rates" in case:
        pytest.skip("copies a table to the device, which nothing can capture")
    call, args = make_calls()[case + ON_DEVICE]
    graph, got = captured(call, args)
    for x in filter(is_number, args):
        x.fill_(NEW)
    graph.replay()
    torch.testing.assert_close(got, run(call, args), rtol=0, atol=0)
