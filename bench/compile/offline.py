"""What the compiler makes of the kernels: compiled for a GPU, with no GPU at hand, and read back as machine code.

``python -m bench.compile.offline [CASE...]`` prints {case: [report, ...]} as JSON, for every target.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastdino_kernels import _backend


class Target(NamedTuple):
    """A GPU to compile for."""

    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one program may ask for; the compiler does not check it


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),  # A100
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),  # H100, H200
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),  # B200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),  # MI300
}


@dataclass(frozen=True)
class Report:
    """One kernel, as launched by a case, in a target's machine code. Bytes and instructions are those of one thread.

    The hot part is the loop that moves the most bytes in 128-bit accesses; of a kernel whose loops move none, the
    stretch of code up to an exit that does (on AMD, where a kernel has one exit, all of it). Of a kernel without such
    accesses it is the innermost loop that moves the most bytes, at least 8, or else such a stretch.
    """

    kernel: str
    target: str
    registers: int  # per thread
    spills: int  # bytes per thread
    local_accesses: int  # loads and stores of memory private to a thread: spills, and arrays indexed at run time
    shared: int  # bytes per program
    loads_128: int  # in the whole kernel, accesses of global memory that are 128 bits wide
    stores_128: int
    hot_instructions: int
    hot_bytes: int  # beside 128-bit accesses in those of 64 bits and more: a row's few numbers do not count
    hot_exps: int
    unwritten: str = ""  # the first instruction that reads a uniform register before any has written it

    def problems(self, narrow: Set[str] = frozenset()) -> list[str]:
        """Why this kernel is not fit for this target; ``narrow``: "load" or "store" where no 128-bit one is due."""
        found = []
        if self.spills or self.local_accesses:
            found.append(f"spills {self.spills} bytes per thread ({self.local_accesses} accesses of local memory)")
        if self.shared > TARGETS[self.target].shared_limit:
            found.append(f"asks for {self.shared} bytes of shared memory, {TARGETS[self.target].shared_limit} at most")
        if self.unwritten:
            found.append(f"reads a register that nothing has written, an error of the assembler: {self.unwritten}")
        for access, count in {"load": self.loads_128, "store": self.stores_128}.items():
            if count == 0 and access not in narrow:
                found.append(f"has no 128-bit {access}")
        return [f"{self.kernel} on {self.target} {problem}" for problem in found]


def compile_reports(call: Callable[[], object], target: str) -> list[Report]:
    """Reports on every kernel that ``call`` launches, compiled for ``target`` exactly as the launch would.

    ``call`` works on CPU tensors of the real shapes; ``torch.empty`` is enough, as no kernel runs. Raises RuntimeError
    under Triton's interpreter, where there is nothing to compile, and when ``call`` launches no kernel.
    """
    return _reports([_compiled(call, target)], target)[0]


def _compiled(call: Callable[[], object], target: str) -> list[Any]:
    """The kernels that ``call`` launches, each once."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it, in a process of its own")
    with _launches_compiled_for(TARGETS[target].gpu) as compiled:
        call()
    if not compiled:
        raise RuntimeError(f"{call} launched no kernel")
    return [*dict.fromkeys(compiled)]


class _OfflineDriver:
    """Answers what the JIT asks of a driver before it compiles."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> str:
        return str(self.gpu)  # the JIT caches kernels per device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _launches_compiled_for(gpu: GPUTarget) -> Iterator[list[Any]]:
    """Within it, a launch compiles and appends the kernel to the list, instead of running it."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with (
        mock.patch.object(driver, "_active", _OfflineDriver(gpu)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(_backend, "INTERPRETED", True),  # so that CPU tensors go to the kernel
    ):
        yield compiled


def _reports(cases: list[list[Any]], target: str) -> list[list[Report]]:
    """Of the kernels of each case."""
    kernels = [kernel for case in cases for kernel in case]
    code = _read_nvidia(kernels) if TARGETS[target].gpu.backend == "cuda" else map(_read_amd, kernels)
    made = (_report(kernel, target, *read) for kernel, read in zip(kernels, code, strict=True))
    return [[next(made) for _ in case] for case in cases]


def _report(kernel: Any, target: str, lines: list[str], registers: int, spills: int) -> Report:
    accesses = [_access(line) for line in lines]
    hot = _hot(lines)
    sizes = [access[1] for line in hot if (access := _access(line))]
    return Report(
        kernel=kernel.metadata.name,
        target=target,
        registers=registers,
        spills=spills,
        local_accesses=sum(bool(re.search(r"\b(LDL|STL|scratch_(load|store))", line)) for line in lines),
        shared=kernel.metadata.shared,
        loads_128=sum(access == ("load", 16) for access in accesses),
        stores_128=sum(access == ("store", 16) for access in accesses),
        hot_instructions=len(hot),
        hot_bytes=sum(size for size in sizes if size >= 8) if 16 in sizes else sum(sizes),
        hot_exps=sum("MUFU.EX2" in line or "v_exp_f32" in line for line in hot),
        unwritten=unwritten(lines),
    )


def _read_nvidia(kernels: list[Any]) -> list[tuple[list[str], int, int]]:
    """Of each, for one target, instructions and labels in order, registers, bytes spilled.

    nvdisasm takes 0.3 s to begin, so that it gets the code of all in one piece. It knows no labels there.
    """
    codes = [_code_of(kernel.asm["cubin"], kernel.metadata.name) for kernel in kernels]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel")
        file.write_bytes(b"".join(codes))
        capability = kernels[0].metadata.target.arch
        name = f"SM{capability}{'a' * (capability >= 90)}"  # as triton calls them
        text = _tool("nvdisasm", "--binary", name, str(file))
        usages = []
        for kernel in kernels:
            file.write_bytes(kernel.asm["cubin"])
            usages.append(re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(file))))
    branch = re.compile(r"\b(BRA\b.*)0x([0-9a-f]+)$")
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]+)\*/\s+(.*?) ;", text)]
    targets = {int(found[2], 16) for _, line in code if (found := branch.search(line))}
    ends, lines = [*accumulate(map(len, codes))], [list[str]() for _ in kernels]
    for at, line in code:
        labels = [f".L{at:x}"] if at in targets else []
        lines[bisect(ends, at)] += [*labels, branch.sub(r"\1.L\2", line)]
    return [(of, int(usage[1]), int(usage[2])) for of, usage in zip(lines, usages, strict=True)]  # type: ignore[index]


def _code_of(cubin: bytes, kernel: str) -> bytes:
    """The machine code of a kernel: a section of ELF64."""
    (headers,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, headers + i * size) for i in range(count)]
    name = f".text.{kernel}\0".encode()
    at = sections[names][4]
    (found,) = [(s[4], s[5]) for s in sections if cubin[at + s[0] : at + s[0] + len(name)] == name]
    return cubin[found[0] : found[0] + found[1]]


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], check=True, capture_output=True, text=True).stdout


def _read_amd(kernel: Any) -> tuple[list[str], int, int]:
    """As :func:`_read_nvidia`; what spills goes to the private segment."""
    text = kernel.asm["amdgcn"]
    lines = re.findall(
        r"^(?:(\.L\w+):|\t([a-z]+_\w+.*?)(?:\s*;.*)?$)", text.split("s_endpgm\n\t.section")[0], re.MULTILINE
    )

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    return [a or b for a, b in lines], metadata("vgpr_count"), metadata("private_segment_fixed_size")


_NVIDIA_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG|RED|ATOMG)\.(\S+)")
_NVIDIA_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store|atomic)_(\w+)")
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
_BRANCH = re.compile(r"(?:BRA|s_c?branch\w*).*?(\.L\w+)")
_END = re.compile(r"EXIT|s_endpgm")


@cache  # loops within loops are read again
def _access(line: str) -> tuple[str, int] | None:
    """("load" or "store", bytes) of one instruction that touches global memory."""
    if match := _NVIDIA_ACCESS.search(line):
        sizes = [_NVIDIA_BYTES[part] for part in match[2].split(".") if part in _NVIDIA_BYTES]
        return ("load" if match[1].startswith("LD") else "store"), (sizes or [4])[0]
    if match := _AMD_ACCESS.search(line):
        size = next((size for name, size in _AMD_BYTES.items() if match[2].startswith(name)), 4)
        return ("load" if match[1] == "load" else "store"), size
    return None


def unwritten(lines: list[str]) -> str:
    """The first instruction that reads a uniform register of NVIDIA's before any, in order of address, has written it.

    ptxas 12.8 makes such code: of two products by wgmma in a loop, it takes the operands' addresses from anywhere.
    """
    written = set[int]()
    for line in lines:
        if "UR" not in line:
            continue
        name, _, rest = re.sub(r"^@\S+ +", "", line).partition(" ")
        target, *sources = re.sub(r"^(U?PT?\d*, *)+", "", rest).split(",")
        first = re.fullmatch(r"UR(\d+)", target.strip())
        if first is None or "SETP" in name:
            sources.append(target)
        # wgmma's operands have their descriptors in a row, of which that of the second one is always read.
        second = 2 if name.startswith("HGMMA") else 0
        found = re.findall(r"(gdesc\[)?\bUR(\d+)", ",".join(sources))
        registers = [int(n) + (second if of_descriptor else 0) for of_descriptor, n in found]
        if not written.issuperset(registers):
            return line
        if first:
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= {int(first[1]) + i for i in range(width)}
    return ""


def _hot(lines: list[str]) -> list[str]:
    """The hot part of a kernel; see :class:`Report`."""
    labels = {line: i for i, line in enumerate(lines) if line.startswith(".L")}
    loops, straight, start = [], [], 0
    for i, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch[1], i) < i - 1:  # a branch to itself pads the end of the code
            loops.append(lines[labels[branch[1]] : i + 1])
        if _END.match(line):
            straight.append(lines[start : i + 1])
            start = i + 1

    def moved(part: list[str], least: int = 1) -> int:
        """Bytes, in accesses of at least so many."""
        return sum(access[1] for line in part if (access := _access(line)) and access[1] >= least)

    for parts in (loops, straight):
        if wide := [part for part in parts if moved(part, 16)]:
            return _code(max(wide, key=lambda part: (moved(part, 16), -len(part))))
    innermost = [part for part in loops if moved(part) >= 8 and not _has_loop(part)]
    return _code(max(innermost or straight, key=lambda part: (moved(part), -len(part))))


def _has_loop(part: list[str]) -> bool:
    """Whether it branches back before its end."""
    seen = set[str]()
    for line in part[1:-1]:
        branch = _BRANCH.search(line)
        if branch and branch[1] in seen:
            return True
        seen |= {line} if line.startswith(".L") else set()
    return False


def _code(part: list[str]) -> list[str]:
    return [line for line in part if not line.startswith(".L")]


def compile_cases(names: Sequence[str] = ()) -> dict[str, list[Report]]:
    """The reports of these cases of :mod:`bench.compile.cases`, or of all, for every target."""
    from bench.compile.cases import CASES

    names = names or [*CASES]
    by_target = [_reports([_compiled(CASES[name].call, target) for name in names], target) for target in TARGETS]
    return {name: [*chain(*found)] for name, found in zip(names, zip(*by_target, strict=True), strict=True)}


if __name__ == "__main__":
    print(json.dumps(compile_cases(sys.argv[1:]), default=asdict))
