"""What a result file says of where its figures come from, and how it is written."""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
H200 = "nvidia-h200"  # its files' DEVICE: the bounds of bench.compile are for it alone
PACKAGES = (
    "torch", "triton", "deepspeed", "xformers", "lightly", "timm", "liger-kernel", "fla-core", "torchvision", "kornia",
    "nvidia-dali-cuda130", "pillow",
)  # fmt: skip


def provenance(device: torch.device, module: str) -> dict[str, Any]:
    """Commit, device, versions, command and date of a measurement that ``python -m module ...`` makes now.

    Without git and without FASTDINO_COMMIT the commit is recorded as UNKNOWN.
    """
    found, dirty = commit(), None
    if found not in (UNKNOWN, os.environ.get("FASTDINO_COMMIT")):
        dirty = bool(_printed("git", "status", "--porcelain", "--", "fastdino", "kernels", "bench/**/*.py"))
    return {
        "commit": found,
        "dirty": dirty,
        "sources": _sources(),
        "device": device_name(device),
        "driver": _driver(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def python_path(tree: Path = ROOT) -> str:
    """PYTHONPATH of a child: ``tree``'s code, then what this process was given, where its packages may be."""
    return os.pathsep.join(filter(None, [str(tree), str(tree / "kernels"), os.environ.get("PYTHONPATH")]))


def commit() -> str:
    """Of this tree: what FASTDINO_COMMIT says, where a copy has no git, or git, or UNKNOWN."""
    return os.environ.get("FASTDINO_COMMIT") or _printed("git", "rev-parse", "HEAD") or UNKNOWN


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def device_here(text: str) -> torch.device:
    """A parser's type of ``--device``."""
    if text.split(":")[0] not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cuda nor cpu")
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here: check the driver, or use cpu")
    if ":" in text:  # clocks and peers are of the current device
        raise argparse.ArgumentTypeError(f"{text!r} has a number: CUDA_VISIBLE_DEVICES chooses among GPUs")
    return torch.device(text)


def positive(text: str) -> int:
    """A parser's type of a number of rounds, images, processes: of none of them there is no figure."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def result_path(bench: str, device: torch.device) -> Path:
    """bench/results/BENCH-DEVICE.json; all processors share one file, each kind of GPU has its own."""
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{bench}-{name}.json"


def write(path: Path, document: dict[str, Any]) -> None:
    """All of it or, where the process is killed meanwhile, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(json.dumps(document, indent=1) + "\n")
    whole.replace(path)


def may_add(path: Path, now: dict[str, Any]) -> bool:
    """Whether figures with the provenance ``now`` may stand beside those of ``path``.

    If not, a line says why: figures of other code or another device are not mixed.
    """
    recorded = json.loads(path.read_text())["provenance"] if path.exists() else now
    same = ("device", "driver", "threads", "versions", "sources")
    others = [key for key in same if recorded.get(key) != now[key]]
    if others:
        print(f"{path.name} is of other {', '.join(others)} and stays as it is: --out FILE writes these figures")
    return not others


def add(path: Path, part: dict[str, Any], name: Callable[[dict[str, Any]], Hashable]) -> None:
    """Writes ``part`` into ``path``, its cases in the place of those of the same names; see :func:`may_add`.

    A partial case does not take the place of a whole one.
    """
    if path.exists():
        before = json.loads(path.read_text())
        whole = {name(case) for case in before["cases"] if "partial" not in case}
        cases = [case for case in part["cases"] if "partial" not in case or name(case) not in whole]
        measured = {name(case) for case in cases}
        kept = [case for case in before["cases"] if name(case) not in measured]
        commands = dict.fromkeys([*before["provenance"]["command"].split("; "), part["provenance"]["command"]])
        where = before["provenance"] | {"command": "; ".join(commands)}
        part = {"provenance": where, "cases": kept + cases}
    write(path, part)


def _sources() -> str:
    """Digest of the code that figures depend on: equal trees have equal ones, with or without git."""
    digest = hashlib.sha256()
    files = (path for folder in ("fastdino", "kernels", "bench") for path in (ROOT / folder).rglob("*.*"))
    for path in sorted(path for path in files if path.suffix in (".py", ".c", ".h")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _printed(*command: str) -> str | None:
    """What a command prints here; None where it fails, and a line says so. Once, so that the line comes once."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else "") or str(error)
        print(f"{' '.join(command[:2])}: unknown, because {said.splitlines()[0]}", file=sys.stderr)
        return None


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return (_printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or UNKNOWN).split("\n")[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
