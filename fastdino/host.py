"""The machine: which process of which host this is, and what an account may lack that a library would stumble over."""

import getpass
import logging
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LONGEST = 70  # of the folder for temporary files: a socket's whole path has room for 107 bytes

log = logging.getLogger(__name__)


def settle() -> None:
    """Makes up for a uid without a name, a home that may not be written, and a TMPDIR that is too long for sockets.

    Sets variables of this process's environment, so that its children have them too. Where nothing lacks, it sets none.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # docker run --user 12345: torch names its cache folders after the user
        os.environ["USER"] = f"uid{os.getuid()}"
    try:
        scratch = tempfile.gettempdir()
    except FileNotFoundError as error:
        log.warning("%s: set TMPDIR to a folder that may be written", error.strerror)
        return
    if len(os.fsencode(scratch)) > _LONGEST and os.access("/tmp", os.W_OK | os.X_OK):
        log.warning("TMPDIR is too long for the sockets of worker processes: /tmp is used")
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    home = os.path.expanduser("~")
    if "TRITON_HOME" not in os.environ and not os.access(home, os.W_OK | os.X_OK):
        os.environ["TRITON_HOME"] = str(_own_folder())  # where triton keeps what it has compiled


def _own_folder() -> Path:
    """A folder for temporary files that is the same for every process of this user and open to nobody else."""
    folder = Path(tempfile.gettempdir()) / f"fastdino-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's, who could put code there
        return Path(tempfile.mkdtemp())
    return folder


def this_process() -> dict[str, Any]:
    """What tells this process from every other, also from later ones with its number: plain values for JSON."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "namespace": _namespace(), "started": _started(pid)}


def may_live(process: Mapping[str, Any]) -> bool:
    """False when what :func:`this_process` returned is known to be dead: a process of this host that has ended."""
    return not _is_here(process) or lives(process)


def lives(process: Mapping[str, Any]) -> bool:
    """True when what :func:`this_process` returned is known to be alive, which only a process of this host can be."""
    return _is_here(process) and process.get("started") == _started(process.get("pid"))


def _is_here(process: Mapping[str, Any]) -> bool:
    return process.get("host") == socket.gethostname() and process.get("namespace", _namespace()) == _namespace()


def _namespace() -> int:
    """Containers that share a host's name count their processes on their own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _started(pid: object) -> str | None:
    """When a process of this host was started, in the kernel's count; None when there is no such process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # one that has ended, and whose parent has not noticed yet
