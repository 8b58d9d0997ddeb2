"""Result files as every commit recorded them."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_GIT = "No history: {}."
SHALLOW = "This clone is shallow: what is older than it is missing. `git fetch --unshallow` brings it."


@dataclass(frozen=True)
class Recorded:
    """A result file at one commit."""

    commit: str
    date: str
    """ISO 8601, of the commit; of the measurement where the file is not committed yet."""
    document: dict[str, Any]


def history(file: Path) -> list[Recorded]:
    """Every version of a result file, the oldest first; one that is not committed comes last, as "uncommitted".

    Versions that are no JSON are left out. Empty where there is no git, no repository and no file.
    """
    found: list[Recorded] = []
    for line in _git(file.parent, "log", "--reverse", "--format=%H %cI", "--", file.name).splitlines():
        commit, date = line.split()
        document = _document(_git(file.parent, "show", f"{commit}:./{file.name}"))
        if document is not None:
            found.append(Recorded(commit, date, document))
    now = _document(file.read_text()) if file.exists() else None
    if now is not None and (not found or now != found[-1].document):
        found.append(Recorded("uncommitted", str(now.get("provenance", {}).get("date", "")), now))
    return found


def what_is_missing(folder: Path) -> str:
    """What a reader of the history has to know; empty when it is whole."""
    try:
        shallow = _asked(folder, "rev-parse", "--is-shallow-repository").strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        return NO_GIT.format(said)
    return SHALLOW if shallow == "true" else ""


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; empty where it cannot."""
    try:
        return _asked(folder, *arguments)
    except (OSError, subprocess.CalledProcessError):
        return ""


def _asked(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def _document(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
