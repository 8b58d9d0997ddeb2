"""The run folder: whether it can be written as a run writes it, and has room."""

import os
import shutil
import tempfile
from pathlib import Path

from fastdino.config import Config
from fastdino.doctor.finding import Finding, failed, ok
from fastdino.planning.footprint import checkpoint_bytes
from fastdino.training.run_folder import Lock

CHECKPOINTS = 3  # that have to fit: the newest, the one being written, and one to keep


def check(config: Config) -> Finding:
    """Writes, syncs, renames and locks in the run folder, or where it would be made; leaves nothing."""
    wanted = config.run.dir
    there = next(folder for folder in (wanted, *wanted.absolute().parents) if folder.exists())
    remedy = "Choose another folder with --run.dir, or make room and rights there"
    try:
        _use(there)
        free = shutil.disk_usage(there).free
    except OSError as error:
        return failed("run folder", f"{wanted} cannot be used: {error.strerror or error}", remedy)
    needed = CHECKPOINTS * checkpoint_bytes(config)
    said = f"{wanted}: {free / 1e9:.1f} GB are free, {CHECKPOINTS} checkpoints take {needed / 1e9:.1f}"
    if free < needed:
        return failed("run folder", said, remedy)
    return ok("run folder", f"{said}; writing, fsync, rename and lock work")


def _use(folder: Path) -> None:
    """Raises OSError for what does not work."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
        work = Path(name)
        with (work / "new").open("wb") as file:
            file.write(os.urandom(2**16))
            file.flush()
            os.fsync(file.fileno())
        os.rename(work / "new", work / "old")
        first, second = Lock(work / "lock"), Lock(work / "lock")
        if first.acquire() or second.acquire() is None:
            raise OSError("a file that is locked can be locked again, so two runs could write there")
        first.release()
