"""What a container or a cluster may leave out of a user's account, supplied before a library stumbles over it."""

import getpass
import logging
import os
import tempfile
from pathlib import Path

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
