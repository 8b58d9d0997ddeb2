"""ema_update_: the kernel and its reference against float64, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino_kernels.optim import ema_update as module
from fastdino_kernels.optim.ema_update import ema_update_, ema_update_reference_
from fastdino_kernels.testing import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")(test))


# One tensor of whole blocks of 64, one ragged over several blocks, and a list with tensors of part of a block and none.
LENGTHS = [(192,), (257,), (64, 200, 0, 7, 320, 1)]
MOMENTA = [0.0, 0.3, 0.5, 0.996, 1.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64, so that a short tensor has several."""
    module._plan.cache_clear()
    monkeypatch.setattr(module, "launch_config", lambda: {"BLOCK": 64, "num_warps": 2})


def guarded(n: int, dtype: torch.dtype, offset: int, outside: float) -> Tensor:
    """n elements in the midst of others, which are ``outside``; an ``offset`` of 1 makes them unaligned."""
    return torch.full((n + offset + GUARD,), outside, dtype=dtype, device=DEVICE)[offset : offset + n]


def random_list(lengths: tuple[int, ...], dtype: torch.dtype, seed: int, offset: int = 0) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = [torch.randn(n, generator=generator, device=DEVICE) for n in lengths]
    return [guarded(len(x), dtype, offset, outside=7.0 + seed).copy_(x) for x in values]


def poisoned(like: list[Tensor], dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
    return [guarded(t.numel(), dtype, offset, outside=7.0).fill_(torch.nan) for t in like]


def on_device(momentum: float, dtype: torch.dtype | None) -> float | Tensor:
    """The momentum as a number, or as a 0-d tensor of a dtype."""
    return momentum if dtype is None else torch.tensor(momentum, dtype=dtype, device=DEVICE)


def check(
    teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor, teacher_lp: list[Tensor] | None
) -> None:
    """Updates by the kernel and judges every tensor; a list of one is passed as a tensor."""
    exact, plain = [t.clone().double() for t in teacher], [t.clone() for t in teacher]
    ema_update_reference_(exact, [s.double() for s in student], float(momentum))
    ema_update_reference_(plain, student, momentum)
    kept = [s.clone() for s in student]
    args: list[Any] = [x[0] if x is not None and len(x) == 1 else x for x in (teacher, student, teacher_lp)]
    ema_update_(args[0], args[1], momentum, args[2])
    for got, ref, want in zip(teacher, plain, exact, strict=True):
        torch.testing.assert_close(ref.double(), want, rtol=1e-6, atol=1e-6)  # by another path for mixed dtypes
        if got.numel():
            assert_no_worse(got, ref, want)
    for copy, ref, want in zip(teacher_lp or [], plain, exact, strict=teacher_lp is not None):
        if copy.numel():
            assert_no_worse(copy, ref.to(copy.dtype), want)
    assert all(torch.equal(s, k) for s, k in zip(student, kept, strict=True))
    for written in [*teacher, *(teacher_lp or [])]:
        assert written._base is not None
        assert (written._base == 7.0).sum() == GUARD + written.storage_offset(), "wrote outside the tensor"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_kernel(
    lengths: tuple[int, ...], student_dtype: torch.dtype, copy_dtype: torch.dtype | None, offset: int
) -> None:
    teacher = random_list(lengths, torch.float32, 0, offset)
    student = random_list(lengths, student_dtype, 1, offset)
    teacher_lp = None if copy_dtype is None else poisoned(teacher, copy_dtype, offset)
    check(teacher, student, 0.9, teacher_lp)


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("lengths", [(3000,), (70, 2100)], ids=str)
def test_momentum(lengths: tuple[int, ...], momentum: float, momentum_dtype: torch.dtype | None) -> None:
    teacher, student = random_list(lengths, torch.float32, 0), random_list(lengths, torch.float32, 1)
    teacher_lp = poisoned(teacher, torch.bfloat16)
    check(teacher, student, on_device(momentum, momentum_dtype), teacher_lp)


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("update", [ema_update_, ema_update_reference_], ids=["kernel", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_the_ends_are_exact(update: Any, bad: float, momentum_dtype: torch.dtype | None) -> None:
    """Momentum 1 keeps the teacher and 0 takes the student, bit for bit, whatever the other one holds."""
    good, other = torch.randn(500, device=DEVICE), torch.full((500,), bad, device=DEVICE)
    for momentum, teacher, student in [(1.0, good.clone(), other), (0.0, other.clone(), good)]:
        teacher_lp = torch.zeros_like(good)
        update(teacher, student, on_device(momentum, momentum_dtype), teacher_lp)
        assert torch.equal(teacher, good)
        assert torch.equal(teacher_lp, good)


def test_a_nan_elsewhere_is_not_hidden() -> None:
    teacher, student = torch.zeros(10, device=DEVICE), torch.zeros(10, device=DEVICE)
    student[3] = torch.nan
    ema_update_(teacher, student, 0.5)
    assert teacher.isnan().tolist() == [i == 3 for i in range(10)]


def test_equal_tensors_stay_put() -> None:
    teacher = torch.randn(1000, device=DEVICE)
    student, before = teacher.clone(), teacher.clone()
    ema_update_(teacher, student, 0.7)
    assert torch.equal(teacher, before)


def test_mixed_dtypes_in_one_list() -> None:
    lengths = (100, 200, 300, 50)
    teacher = [*random_list(lengths[:3], torch.float32, 0), *random_list(lengths[3:], torch.float64, 0)]
    student = [x.to(d) for x, d in zip(random_list(lengths, torch.float32, 1), [*DTYPES, torch.float64], strict=True)]
    check(teacher, student, 0.996, poisoned(teacher, torch.float32))


def test_fp64_keeps_its_precision() -> None:
    teacher, student = torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    ema_update_(teacher, student, 1 - 2.0**-40)
    assert (teacher == 1 + 2.0**-40).all()


def test_many_steps_follow_the_closed_form() -> None:
    """The teacher of a student that stands still: t_n = s + momentum^n (t_0 - s)."""
    start, student = torch.randn(300, device=DEVICE), torch.randn(300, device=DEVICE)
    teacher = start.clone()
    for _ in range(200):
        ema_update_(teacher, student, 0.99)
    expected = student.double() + 0.99**200 * (start.double() - student.double())
    torch.testing.assert_close(teacher.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_moved_tensor_is_found() -> None:
    """The plan is cached by address: a list whose tensors moved must not update the old memory."""
    teacher, student = random_list((50, 60), torch.float32, 0), random_list((50, 60), torch.float32, 1)
    ema_update_(teacher, student, 0.5)
    moved, before = [t.clone() for t in teacher], [t.clone() for t in teacher]
    ema_update_(moved, student, 0.0)
    assert all(torch.equal(m, s) for m, s in zip(moved, student, strict=True))
    assert all(torch.equal(t, b) for t, b in zip(teacher, before, strict=True))


def test_one_launch_for_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    monkeypatch.setattr(module, "_launch", lambda group, *_: launches.append(group.members))
    lengths = (5, 0, 7, 9)
    ema_update_(random_list(lengths, torch.float32, 0), random_list(lengths, torch.bfloat16, 1), 0.5)
    assert launches == [[0, 2, 3]]


def test_nothing_to_update() -> None:
    ema_update_([], [], 0.5)
    ema_update_(torch.empty(0, device=DEVICE), torch.empty(0, device=DEVICE), 0.5, torch.empty(0, device=DEVICE))


X, Y, Z = torch.zeros(6), torch.zeros(6), torch.zeros(6)
REFUSED = {
    "length": (([X], [Y, Z], 0.5), "1 teacher tensors, but 2 of the student"),
    "shape": ((X, Y[:5], 0.5), r"student 0 is \(5,\)"),
    "same elements, other shape": ((X, Y.view(2, 3), 0.5), r"student 0 is \(2, 3\)"),
    "teacher_lp's shape": ((X, Y, 0.5, Z[:5]), r"teacher_lp 0 is \(5,\)"),
    "missing teacher_lp": (([X], [Y], 0.5, []), "0 of the teacher_lp"),
    "device": ((X, Y.to("meta"), 0.5), "on meta"),
    "strides": ((X.view(2, 3).t(), Y.view(3, 2), 0.5), "teacher 0 is not contiguous"),
    "integers": ((X, Y.long(), 0.5), "student 0 is torch.int64"),
    "bf16 teacher": ((X.bfloat16(), Y, 0.5), "must be fp32"),
    "student is teacher": ((X, X, 0.5), "shares memory"),
    "overlap": ((X[:4], X[2:], 0.5), "shares memory"),
    "teacher twice": (([X, X], [Y, Z], 0.5), "shares memory"),
    "teacher_lp is student": ((X, Y, 0.5, Y), "shares memory"),
    "momentum": ((X, Y, 1.001), "momentum is 1.001"),
    "momentum is NaN": ((X, Y, float("nan")), "momentum is nan"),
    "momentum's shape": ((X, Y, torch.zeros(1)), "0-d tensor"),
    "momentum's device": ((X, Y, torch.zeros((), device="meta")), "0-d tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    args, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ema_update_(*args)
    assert not X.any()


@on_gpu
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(50_000_001,), (1_000_003, 65_536 * 256, 768, 589_824)], ids=str)
def test_real_sizes(lengths: tuple[int, ...], student_dtype: torch.dtype) -> None:
    teacher, student = random_list(lengths, torch.float32, 0), random_list(lengths, student_dtype, 1)
    teacher_lp = poisoned(teacher, torch.bfloat16)
    check(teacher, student, on_device(0.996, torch.float32), teacher_lp)


@pytest.mark.large
@on_gpu
def test_more_than_2_31_elements() -> None:
    n = 2**31 + 5000
    teacher = torch.ones(n, device=DEVICE)
    student = torch.full((n,), 2.0, device=DEVICE, dtype=torch.bfloat16)
    ema_update_(teacher, student, 0.5)
    assert teacher.min() == teacher.max() == 1.5
