"""What all groups of settings share: values of other types are converted, what cannot be is refused with its name."""

import os
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastdino.config.errors import require


class Group:
    """A group of settings: a frozen dataclass whose values are converted to their types, then judged by :meth:`check`.

    A str becomes a Path, a list a tuple, a number of numpy or torch Python's own; ``~`` is the home folder. So a config
    made in a notebook or a sweep equals the one that its JSON reads back.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = _convert(f"{self.group_name}.{name}", getattr(self, name), kind)
            object.__setattr__(self, name, value)
        self.check()

    @property
    def group_name(self) -> str:
        """As in the settings: ModelConfig is ``model``, PatchHeadConfig ``patch_head``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__.removesuffix("Config")).lower()

    def check(self) -> None:
        """Raises ConfigError for values that cannot work."""

    def require(self, holds: bool, name: str, allowed: str, reason: str = "") -> None:
        """Raises ConfigError unless ``holds``: the setting ``name`` must be ``allowed``."""
        require(holds, f"{self.group_name}.{name}", getattr(self, name), allowed, reason)


def _convert(path: str, value: Any, kind: Any) -> Any:
    """``value`` as an object of ``kind``. Raises ConfigError when it is none."""
    if hasattr(value, "tolist"):  # a number or an array of numpy or torch
        value = value.tolist()
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(path, value, next(k for k in get_args(kind) if k is not type(None)))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        known = any(value == choice and type(value) is type(choice) for choice in choices)
        require(known, path, value, f"one of {', '.join(map(str, choices))}")
        return value
    if get_origin(kind) is tuple:
        return _tuple(path, value, get_args(kind))
    return _CONVERTERS[kind](path, value)


def _tuple(path: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    fits = isinstance(value, list | tuple) and len(value) == len(kinds)
    require(fits, path, value, f"{len(kinds)} numbers")
    return tuple(_convert(path, item, kind) for item, kind in zip(value, kinds, strict=True))


def _bool(path: str, value: Any) -> bool:
    require(isinstance(value, bool), path, value, "True or False")
    return bool(value)


def _int(path: str, value: Any) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    require(whole and not isinstance(value, bool), path, value, "a whole number")
    return int(value)


def _float(path: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(number and abs(value) <= sys.float_info.max, path, value, "a finite number")
    return float(value)


def _str(path: str, value: Any) -> str:
    """It may be a folder: no other text starts with ``~``."""
    require(isinstance(value, str | os.PathLike), path, value, "text")
    return os.path.expanduser(str(value))


def _path(path: str, value: Any) -> Path:
    require(isinstance(value, str | os.PathLike) and str(value) != "", path, value, "a path")
    return Path(os.path.expanduser(str(value)))


_CONVERTERS = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
