"""What the ranks of a run must have in common before it begins: code and versions, and nearly the time."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import time
from pathlib import Path

from fastdino.config import ConfigError
from fastdino.distributed import Ranks
from fastdino.host import this_process

CODE = ("fastdino", "fastdino_kernels")
PACKAGES = ("torch", "triton", "deepspeed")  # what decides beside our code what a step computes
APART = 1.0  # seconds between two clocks that are worth a warning

log = logging.getLogger(__name__)


def check_ranks(ranks: Ranks) -> None:
    """Every rank calls it. Raises ConfigError when one has other code or versions; warns of a clock that is off."""
    if ranks.world_size == 1:
        return
    told = ranks.gather((this_process()["host"], what_runs()))
    names = [f"rank {rank} ({host})" for rank, (host, _) in enumerate(told)]
    ranks.on_main(lambda: refuse_others(names, [runs for _, runs in told]))
    for name, offset in zip(names, clock_offsets(ranks), strict=True):
        if ranks.is_main and offset:
            log.warning("%s", off(name, offset))


@functools.cache
def what_runs() -> dict[str, str]:
    """Versions by package, ``absent`` for none, and as ``code`` a digest of fastdino's own files."""
    digest = hashlib.blake2b(digest_size=8)
    for package in CODE:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {**{name: version(name) or "absent" for name in PACKAGES}, "code": digest.hexdigest()}


def version(package: str) -> str | None:
    """That which is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_others(names: list[str], runs: list[dict[str, str]]) -> None:
    """Raises ConfigError unless all ranks, called ``names``, have what the first has; see :func:`what_runs`."""
    others = [(name, found) for name, found in zip(names, runs, strict=True) if found != runs[0]]
    if not others:
        return
    name, found = others[0]
    differ = [f"{what} {found[what]}, not {was}" for what, was in runs[0].items() if found[what] != was]
    more = f"; other ranks that differ: {len(others) - 1}" if len(others) > 1 else ""
    raise ConfigError(
        f"{name} runs {' and '.join(differ)} as {names[0]} does{more}. All ranks need one commit of fastdino and the "
        "same packages (pip install -c constraints.txt), from one folder that all hosts see, or one image"
    )


def clock_offsets(ranks: Ranks) -> list[float]:
    """Seconds by which the clock of each rank is surely ahead of rank 0's, or behind; 0.0 up to APART. All call it.

    Nobody leaves a barrier before all have entered it. So what a clock shows after one is later than what any other
    showed before, and a host that is slow to answer is no clock that is off.
    """
    ranks.barrier()
    before = time.time()
    ranks.barrier()
    told = ranks.gather((before, time.time()))
    first_before, first_after = told[0]
    bounds = [(before - first_after, after - first_before) for before, after in told]
    return [low if low > APART else high if high < -APART else 0.0 for low, high in bounds]


def off(name: str, offset: float) -> str:
    """A clock that is off, in words."""
    way = "ahead of" if offset > 0 else "behind"
    return (
        f"the clock of {name} is {abs(offset):.1f} s {way} rank 0's: the times in logs and files will mislead. Let "
        "chrony or ntpd set it"
    )
