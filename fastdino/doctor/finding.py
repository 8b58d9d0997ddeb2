"""What a check has found, and how it is said."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "left out"]


@dataclass(frozen=True)
class Finding:
    """Of one check: a line."""

    check: str
    state: State
    said: str
    """What was found."""
    remedy: str = ""
    """What to do; of everything but what is in order."""

    def line(self) -> str:
        """For a terminal."""
        return f"{self.state:8}  {self.check:14}{self.said}{f'. {self.remedy}' if self.remedy else ''}"


def ok(check: str, said: str) -> Finding:
    """It is in order."""
    return Finding(check, "ok", said)


def warning(check: str, said: str, remedy: str) -> Finding:
    """A run works, but not as it could."""
    return Finding(check, "warning", said, remedy)


def failed(check: str, said: str, remedy: str) -> Finding:
    """A run would fail."""
    return Finding(check, "failed", said, remedy)


def left_out(check: str, said: str) -> Finding:
    """There is nothing to look at."""
    return Finding(check, "left out", said)
