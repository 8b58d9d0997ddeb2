"""Flags as a person writes them, made into those that tyro takes."""

import copy
import shlex
from dataclasses import fields
from itertools import pairwise

from fastdino.config import Config, ConfigError, PatchHeadConfig, group_kinds


def one_root(flags: list[str]) -> list[str]:
    """``--data.root a:0.7 b:0.3`` as one word, split again where it is read."""
    if "--data.root" not in flags:
        return flags
    first = flags.index("--data.root") + 1
    last = next((i for i in range(first, len(flags)) if flags[i].startswith("--")), len(flags))
    words = flags[first:last]
    return [*flags[:first], *([shlex.join(words)] if len(words) > 1 else words), *flags[last:]]


def global_size(flags: list[str]) -> int | None:
    """What the flags say of it, if it is a number: what is none, tyro refuses."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    given = [value for flag, value in pairwise(words) if flag.replace("_", "-") == "--views.global-size"]
    return int(given[-1]) if given and given[-1].isdecimal() else None


def patch_head(base: Config, flags: list[str]) -> tuple[Config, list[str]]:
    """The recipe with a patch head where the flags ask for it, or without one; and the flags that are left.

    A head that the recipe has not is like its head, but for what the flags say. It comes in unchecked, since that any
    patch is read may be another flag. ``--help`` explains its settings too.
    """
    names = [flag.partition("=")[0].replace("_", "-") for flag in flags]
    head = base.patch_head
    if "--patch-head" in names:
        at = names.index("--patch-head")
        _, equals, value = flags[at].partition("=")
        value, rest = (value, flags[at + 1 :]) if equals else ("".join(flags[at + 1 : at + 2]), flags[at + 2 :])
        if value.lower() != "none":
            raise ConfigError(
                f"--patch-head {value}: write --patch-head None for patches that share the head, or say what theirs "
                "is like (--patch-head.num-prototypes 4096)"
            )
        head, flags = None, flags[:at] + rest
    elif head is None and any(name.startswith("--patch-head.") or name in ("-h", "--help") for name in names):
        head = PatchHeadConfig(**{**vars(base.head), "weights": None})
    base = copy.copy(base)
    object.__setattr__(base, "patch_head", head)
    return base, flags


def plain_switches(arguments: list[str]) -> list[str]:
    """``--head.batch-norm true`` and ``--head.batch-norm=true`` as the switch that tyro takes, which has no value."""
    kinds = group_kinds().items()
    settings = [f"{group}.{field.name}" for group, kind in kinds for field in fields(kind) if field.type is bool]
    off = {f"--{name}": f"--{name.replace('.', '.no-')}" for name in (s.replace("_", "-") for s in settings)}
    switches = {*off, *off.values()}
    words: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        words += ([flag, value] if equals else [flag]) if flag in switches else [argument]
    plain: list[str] = []
    for word in words:
        switch = plain[-1] if plain else ""
        if switch not in switches or word.startswith("--"):
            plain.append(word)
        elif switch in off and word.lower() in ("true", "false"):
            plain[-1] = switch if word.lower() == "true" else off[switch]
        else:
            on = next(on for on in off if switch in (on, off[on]))
            raise ConfigError(f"{switch} {word}: write {on} true or {on} false, or one of {on} and {off[on]} alone")
    return plain
