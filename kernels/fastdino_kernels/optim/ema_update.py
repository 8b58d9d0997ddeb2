"""The teacher's exponential moving average, in one pass over all parameters."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino_kernels._backend import lerp, operator, use_triton
from fastdino_kernels._numbers import Number, ema_weight, from_operator, load_ema_weight, on_host, to_operator

Tensors = Tensor | Sequence[Tensor]
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def ema_update_(teacher: Tensors, student: Tensors, momentum: Number, teacher_lp: Tensors | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place; optionally a rounded copy in the same pass.

    Args:
        teacher: one contiguous fp32 (or fp64) tensor, or a list of them: all parameters go in one launch.
        student: as many tensors of the same shapes; fp32, bf16 or fp16.
        momentum: weight of the old value, in [0, 1]: a number, or a 0-d tensor on the same device, for which the host
            does not wait (except in fp64 on a GPU). 1, as for a skipped step, leaves the teacher bit for bit as it
            was, whatever the student holds; 0 copies the student, whatever the teacher holds.
        teacher_lp: tensors of the same shapes, of any floating dtype, that receive the updated teacher.

    Raises ValueError for lists of different lengths, for tensors that differ in shape or device, are not contiguous or
    share memory, and for a teacher below fp32: in bf16, steps of 1 - 0.996 are rounded away and it stands still.
    Source: Caron et al. 2021, algorithm 1; Tarvainen and Valpola 2017, eq. 2.
    """
    teachers, students, copies = _as_list(teacher), _as_list(student), _as_list(teacher_lp)
    _check_lists(teachers, students, None if teacher_lp is None else copies)
    _check_momentum(momentum, teachers)
    with torch.no_grad():
        ema_update_lists_(teachers, students, copies, *to_operator(momentum))


@torch.no_grad()
def ema_update_reference_(
    teacher: Tensors, student: Tensors, momentum: Number, teacher_lp: Tensors | None = None
) -> None:
    """:func:`ema_update_` in plain torch: the CPU path and the definition that the kernel is tested against."""
    teachers, students = _as_list(teacher), _as_list(student)
    weight = 1 - on_host(momentum)
    if weight == 1:
        torch._foreach_copy_(teachers, students)
    elif weight > 0:
        if all(s.dtype == t.dtype for t, s in zip(teachers, students, strict=True)):
            torch._foreach_lerp_(teachers, students, weight)
        else:  # one by one, so that no more than one converted tensor exists
            for t, s in zip(teachers, students, strict=True):
                t.lerp_(s.to(t.dtype), weight)
    for copy, t in zip(_as_list(teacher_lp), teachers, strict=teacher_lp is not None):
        copy.copy_(t)


def launch_config() -> dict[str, int]:
    """Block size and warps, among the fastest of 13 on an H200 (bench/results/evidence/variants-nvidia-h200.txt)."""
    return {"BLOCK": 1024, "num_warps": 4}


class _Group(NamedTuple):
    """Tensors that one launch updates, because their dtypes agree."""

    members: list[int]
    fused: bool  # False: fp64 and other dtypes that only the reference takes
    chunks: Tensor | None  # see _chunk_table; None for a single tensor, which needs no table


Facts = tuple[tuple[Any, ...], ...]


def _as_list(tensors: Tensors | None) -> list[Tensor]:
    return [] if tensors is None else [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _facts(tensors: list[Tensor]) -> Facts:
    """What the plan depends on: a tensor that moved or changed makes other facts, and so another plan."""
    return tuple((t.data_ptr(), t.numel(), t.dtype, t.device, t.shape, t.is_contiguous()) for t in tensors)


def _check_lists(teachers: list[Tensor], students: list[Tensor], copies: list[Tensor] | None) -> None:
    for name, others in (("student", students), ("teacher_lp", teachers if copies is None else copies)):
        if len(others) != len(teachers):
            raise ValueError(f"{len(teachers)} teacher tensors, but {len(others)} of the {name}: pass as many")
        for i, tensor in enumerate(others):
            if tensor.device != teachers[0].device:
                raise ValueError(f"{name} {i} is on {tensor.device}, teacher 0 on {teachers[0].device}: use one device")


def _check_momentum(momentum: Number, teachers: list[Tensor]) -> None:
    if not isinstance(momentum, Tensor):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, but the weight of the old value must be in [0, 1]")
    elif momentum.ndim or (teachers and momentum.device != teachers[0].device):
        raise ValueError(
            f"momentum is a tensor of shape {tuple(momentum.shape)} on {momentum.device}: "
            "pass a number, or a 0-d tensor on the teacher's device"
        )


@lru_cache(maxsize=32)
def _plan(teachers: Facts, students: Facts, copies: Facts) -> list[_Group]:
    """Checks the tensors and sorts them into launches. Cached: in training they stay where they are."""
    _check(teachers, students, copies)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (t, s) in enumerate(zip(teachers, students, strict=True)):
        if t[1]:
            groups.setdefault((t[2], s[2], copies[i][2] if copies else None), []).append(i)
    plan = []
    for (teacher, student, teacher_lp), members in groups.items():
        fused = teacher == torch.float32 and student in _TRITON_DTYPES and teacher_lp in {None, *_TRITON_DTYPES}
        columns = [[facts[i] for i in members] for facts in (teachers, students, copies) if facts]
        table = _chunk_table(columns, launch_config()["BLOCK"]) if fused and len(members) > 1 else None
        plan.append(_Group(members, fused, table))
    return plan


def _check(teachers: Facts, students: Facts, copies: Facts) -> None:
    """Raises ValueError for what :func:`ema_update_` cannot update."""
    named = {"student": students, "teacher_lp": copies}
    for name, others in named.items():
        for i, (t, o) in enumerate(zip(teachers, others, strict=False)):  # there may be no copies
            if o[4] != t[4]:
                raise ValueError(f"{name} {i} is {tuple(o[4])}, its teacher {tuple(t[4])}")
    for name, tensors in {"teacher": teachers, **named}.items():
        for i, (_, _, dtype, _, _, contiguous) in enumerate(tensors):
            if not contiguous:
                raise ValueError(f"{name} {i} is not contiguous: lay it out anew with .contiguous()")
            if not dtype.is_floating_point or (name == "teacher" and dtype.itemsize < 4):
                raise ValueError(f"{name} {i} is {dtype}: the teacher must be fp32 or fp64, the others floating-point")
    _check_overlap(teachers + copies, students)


def _check_overlap(written: Facts, read: Facts) -> None:
    spans = sorted((t[0], t[0] + t[1] * t[2].itemsize, i < len(written)) for i, t in enumerate(written + read) if t[1])
    reach, written_reach = 0, 0  # where the spans so far end, and those of them that are written
    for start, stop, is_written in spans:
        if start < (reach if is_written else written_reach):
            raise ValueError("a teacher or its copy shares memory with another tensor of the call: clone one")
        reach = max(reach, stop)
        written_reach = max(written_reach, stop) if is_written else written_reach


def _chunk_table(columns: list[list[tuple[Any, ...]]], block: int) -> Tensor:
    """(num_chunks, 4) int64 on the device: addresses of teacher, student and copy (or 0), and elements from there.

    The copy to the device waits for it, once per plan.
    """
    counts = torch.tensor([fact[1] for fact in columns[0]])
    chunks = -(-counts // block)
    tensor = torch.repeat_interleave(chunks)  # which tensor a chunk belongs to
    done = (torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]) * block  # elements of it before the chunk
    table = torch.zeros(len(tensor), 4, dtype=torch.int64)
    for column, facts in enumerate(columns):
        table[:, column] = torch.tensor([fact[0] for fact in facts])[tensor] + done * facts[0][2].itemsize
    table[:, 3] = counts[tensor] - done
    return table.to(columns[0][0][3])


@operator("teacher", "teacher_lp")
def ema_update_lists_(
    teacher: list[Tensor],
    student: list[Tensor],
    teacher_lp: list[Tensor],
    momentum: float | None,
    momentum_on_device: Tensor | None,
) -> None:
    """:func:`ema_update_` in the types of an operator. The whole of it, because its plan depends on addresses."""
    groups = _plan(_facts(teacher), _facts(student), _facts(teacher_lp))
    old = from_operator(momentum, momentum_on_device)
    for group in groups:
        columns = [[tensors[i] for i in group.members] for tensors in (teacher, student, teacher_lp) if tensors]
        if group.fused and use_triton(columns[0][0]):
            _launch(group, old, *columns)
        else:
            ema_update_reference_(columns[0], columns[1], old, *columns[2:])


def _launch(
    group: _Group,
    momentum: Number,
    teacher: list[Tensor],
    student: list[Tensor],
    teacher_lp: Sequence[Tensor] = (),
) -> None:
    weight = ema_weight(momentum)
    with torch.cuda.device_of(teacher[0]):
        if group.chunks is None:
            num_elements = teacher[0].numel()
            tensors = (teacher[0], student[0], teacher_lp[0] if teacher_lp else None)
            grid = (triton.cdiv(num_elements, launch_config()["BLOCK"]),)
            _ema_kernel[grid](*tensors, num_elements, weight, **launch_config())
        else:
            dtypes = (_TRITON_DTYPES[student[0].dtype], _TRITON_DTYPES[teacher_lp[0].dtype] if teacher_lp else None)
            _ema_list_kernel[(len(group.chunks),)](group.chunks, weight, *dtypes, **launch_config())


@triton.jit
def _ema_kernel(teacher_ptr, student_ptr, teacher_lp_ptr, num_elements, weight, BLOCK: tl.constexpr):
    # One block of a flat tensor per program. A mask defeats 128-bit access, so only the last block has one.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = num_elements - start
    teacher_lp_ptr = None if teacher_lp_ptr is None else teacher_lp_ptr + start
    weight = load_ema_weight(weight)
    if left >= BLOCK:
        _ema_block(teacher_ptr + start, student_ptr + start, teacher_lp_ptr, weight, None, BLOCK)
    else:
        _ema_block(teacher_ptr + start, student_ptr + start, teacher_lp_ptr, weight, left, BLOCK)


@triton.jit
def _ema_list_kernel(chunks_ptr, weight, STUDENT: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr):
    # One chunk of one tensor of a list per program; see _chunk_table. An address read from memory carries no
    # alignment, so it is tested here and promised to the compiler.
    chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 4
    teacher = tl.load(chunk_ptr)
    student = tl.load(chunk_ptr + 1)
    teacher_lp = tl.load(chunk_ptr + 2)
    left = tl.load(chunk_ptr + 3)
    teacher_ptr = teacher.to(tl.pointer_type(tl.float32))
    student_ptr = student.to(tl.pointer_type(STUDENT))
    teacher_lp_ptr = None if COPY is None else teacher_lp.to(tl.pointer_type(COPY))
    weight = load_ema_weight(weight)
    if (left >= BLOCK) & ((teacher | student | teacher_lp) % 16 == 0):
        teacher_ptr = tl.multiple_of(teacher_ptr, 16)
        student_ptr = tl.multiple_of(student_ptr, 16)
        teacher_lp_ptr = None if COPY is None else tl.multiple_of(teacher_lp_ptr, 16)
        _ema_block(teacher_ptr, student_ptr, teacher_lp_ptr, weight, None, BLOCK)
    else:
        _ema_block(teacher_ptr, student_ptr, teacher_lp_ptr, weight, left, BLOCK)


@triton.jit
def _ema_block(teacher_ptr, student_ptr, teacher_lp_ptr, weight, left, BLOCK: tl.constexpr):
    # 4 elements per thread, in every dtype: one layout, 128 bits of fp32, nothing exchanged through shared memory.
    i = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    mask = None if left is None else i < left
    teacher = tl.load(teacher_ptr + i, mask=mask)
    student = tl.load(student_ptr + i, mask=mask).to(tl.float32)
    teacher = lerp(teacher, student, weight)
    tl.store(teacher_ptr + i, teacher, mask=mask)
    if teacher_lp_ptr is not None:
        tl.store(teacher_lp_ptr + i, teacher.to(teacher_lp_ptr.dtype.element_ty), mask=mask)
