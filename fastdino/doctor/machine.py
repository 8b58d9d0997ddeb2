"""One machine: installed versions, the GPU, kernels, attention, DeepSpeed."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

import fastdino
from fastdino.agreement import version
from fastdino.config import Config, UserError
from fastdino.distributed import Ranks
from fastdino.doctor.finding import Finding, failed, left_out, ok, warning
from fastdino.engine.zero import import_deepspeed, missing_internals
from fastdino.model.attention import implementation
from fastdino.model.vit import SIZES
from fastdino.training.monitoring.nvml import Gpu, reasons

CONSTRAINTS = Path(fastdino.__file__).parents[1] / "constraints.txt"  # of a checkout
LOW = 1 / 1.15  # share of its highest clock at which a GPU that has nothing to do may be, if no reason is given
MINUTES = 10.0  # a kernel compiles in seconds


def checks(config: Config, ranks: Ranks) -> Iterator[Finding]:
    """All of this file, one after the other; some take seconds."""
    yield versions()
    yield gpu(ranks.device)
    yield kernels(ranks.device)
    yield attention(config, ranks.device)
    yield deepspeed(ranks)


def versions() -> Finding:
    """Those that are installed, beside those that fastdino asks for, and those that it was tested with."""
    asked = [Requirement(text) for text in _requirements()]
    asked = [requirement for requirement in asked if requirement.marker is None or requirement.marker.evaluate()]
    found = {requirement.name: version(requirement.name) for requirement in asked}
    wrong = [r for r in asked if not r.specifier.contains(found[r.name] or "0", prereleases=True) or not found[r.name]]
    if wrong:
        said = ", ".join(f"{r.name} {found[r.name] or 'is missing'}, not {r.specifier}" for r in wrong)
        return failed("versions", said, f"pip install {' '.join(repr(f'{r.name}{r.specifier}') for r in wrong)}")
    tested = _tested()
    others = [f"{name} {has}, not {tested[name]}" for name, has in found.items() if tested.get(name, has) != has]
    if others:
        return warning("versions", f"not those of the tests: {', '.join(others)}", "pip install -c constraints.txt")
    shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "deepspeed") if found.get(name))
    return ok("versions", f"fastdino {fastdino.__version__}, {shown}; Python {sys.version.split()[0]}")


def _requirements() -> list[str]:
    """Of the package as it is installed, without its extras; none where only its folder is on the path."""
    try:
        return [text for text in importlib.metadata.requires("fastdino") or [] if "extra ==" not in text]
    except importlib.metadata.PackageNotFoundError:
        return []


def _tested() -> dict[str, str]:
    if not CONSTRAINTS.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), flags=re.MULTILINE))


def gpu(device: torch.device) -> Finding:
    """Its name, driver, clocks and memory errors."""
    if device.type != "cuda":
        return left_out("GPU", "this process computes on the CPU")
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    said, nvml = f"{name}, {memory / 1e9:.0f} GB", Gpu(device)
    if (clocks := nvml.clocks()) is None:
        return warning("GPU", f"{said}; driver, clocks and ECC are not known", "pip install nvidia-ml-py")
    said += f", driver {nvml.driver()}, {clocks[0]} of {clocks[1]} MHz"
    errors = nvml.uncorrected()
    if errors:
        return failed("GPU", f"{said}, {errors} memory errors that ECC could not correct", "Reset or replace it")
    if why := reasons(nvml.slowed_by()):
        return warning("GPU", f"{said}, slowed by: {why}", "See to its cooling and power, and nvidia-smi -q -d CLOCK")
    return ok("GPU", f"{said}, {'ECC is off' if errors is None else 'no memory errors'}")


def kernels(device: torch.device) -> Finding:
    """Each compiles and agrees with its reference."""
    command = [sys.executable, "-W", "ignore", "-m", "fastdino.doctor.arithmetic", str(device)]
    path = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        return failed("kernels", f"no answer in {MINUTES:.0f} minutes", "See what hangs: py-spy dump, nvidia-smi")
    remedy = "Install the versions of constraints.txt; a kernel that is wrong with them is a fault to report"
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return failed("kernels", f"the process that calls them ended: {last}", remedy)
    found = json.loads(done.stdout)
    if wrong := [f"{name} ({why})" for name, why in found.items() if why]:
        return failed("kernels", f"{len(wrong)} of {len(found)} are wrong: {', '.join(wrong)}", remedy)
    how = "compiled" if device.type == "cuda" else "by Triton's interpreter"
    return ok("kernels", f"{len(found)} agree with their references, {how}")


def attention(config: Config, device: torch.device) -> Finding:
    """What the recipe's backbone would run."""
    if not config.model.is_vit:
        return left_out("attention", f"{config.model.arch} has its own")
    shape = SIZES[config.model.arch.removeprefix("vit_")]
    dtype = torch.bfloat16 if config.engine.uses_bf16(device.type) else torch.float32
    try:
        width = shape.width // shape.num_heads
        return ok("attention", f"by {implementation(config.model.attention, device, dtype, width)}")
    except UserError as error:
        return failed("attention", str(error), "Take another model.attention")


def deepspeed(ranks: Ranks) -> Finding:
    """Its version and what fastdino uses of its internals."""
    try:
        found = import_deepspeed(ranks)
    except (UserError, ImportError) as error:
        return failed("DeepSpeed", str(error), "pip install -c constraints.txt deepspeed, or engine.name=torch")
    if missing := missing_internals():
        remedy = "pip install -c constraints.txt deepspeed, or engine.name=torch"
        return failed("DeepSpeed", f"{found.__version__} lacks {', '.join(missing)}", remedy)
    return ok("DeepSpeed", f"{found.__version__}, with all that is used of its internals")
