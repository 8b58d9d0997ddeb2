"""The sanitizer under which the kernels' tests run: each of its faults, and what is none."""

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from fastdino_kernels._backend import INTERPRETED
from tests.kernels.sanitizer import MemoryFault, sanitized

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU has compute-sanitizer")


@triton.jit
def _double_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _no_mask_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i), mask=i < n)


@triton.jit
def _sum_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < n)))


@triton.jit
def _twice_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)
    tl.store(out_ptr + i, 2 * tl.load(out_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _reload_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)
    tl.store(x_ptr, tl.sum(tl.load(out_ptr + i, mask=i < n)))


@triton.jit
def _reverse_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + BLOCK - 1 - i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


def numbers(n: int = 13) -> Tensor:
    return torch.arange(4.0 * n)[2 * n : 3 * n]  # in the midst of memory that may be read


def fault(kernel: triton.JITFunction, out: Tensor, x: Tensor, n: int, message: str, *grid: int) -> None:
    with pytest.raises((InterpreterError, MemoryFault), match=re.escape(message)):
        kernel[grid or (2,)](out, x, n, BLOCK=8)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_no_fault(in_place: bool) -> None:
    x = numbers()
    out, want = x if in_place else numbers(), 2 * x
    _double_kernel[(2,)](out, x, 13, BLOCK=8)
    assert torch.equal(out, want)


def test_outside() -> None:
    fault(_no_mask_kernel, numbers(), numbers(), 13, "program 1 loads outside of its tensors; element")
    fault(_double_kernel, numbers(12), numbers(), 13, "program 1 stores outside of its tensors; element 12 of (12,)")
    fault(_double_kernel, numbers(), numbers(0), 13, "program 0 loads outside of its tensors")
    fault(_double_kernel, numbers(), numbers(26)[::2], 13, "program 0 loads outside of its tensors")  # in between


def test_programs_that_meet() -> None:
    memory = numbers(21)
    fault(_double_kernel, memory[8:], memory[:13], 13, "program 1 loads what program 0 stores")
    fault(_double_kernel, memory[:13], memory[8:], 13, "program 0 loads what program 1 stores")  # in order: no harm
    fault(_sum_kernel, numbers(), numbers(), 8, "programs 0 and 1 store the same element", 1, 2)


def test_a_program_that_meets_itself() -> None:
    fault(_twice_kernel, numbers(), numbers(), 13, "programs 0 and 0 store the same element")
    fault(_reload_kernel, numbers(), numbers(8), 8, "program 0 loads what program 0 stores", 1)
    x = numbers(8)
    fault(_reverse_kernel, x, x, 8, "program 0 loads what program 0 stores", 1)
    _reverse_kernel[(1,)](numbers(8), x, 8, BLOCK=8)  # apart


def test_the_interpreter_is_left_as_it_was() -> None:
    def patched() -> list[object]:
        builder = interpreter.interpreter_builder
        return [interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store]

    before = patched()
    with sanitized():
        assert all(x is not y for x, y in zip(patched(), before, strict=True))
    assert patched() == before
