"""The run folder: which run it holds, and whether the run at hand may go on in it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from fastdino.config import Config, ConfigError

# What may change between a run and its resumption: none of it changes what is computed, but for rounding.
MAY_CHANGE = {
    "engine.name", "engine.zero_stage", "engine.accumulate", "engine.device", "model.attention", "data.num_workers",
    "data.max_bad", "run.dir", "run.local_batch", "run.save_every", "run.save_every_steps", "run.keep",
    "run.keep_every", "run.log_every", "run.knn_every", "run.knn_root", "run.max_nonfinite",
}  # fmt: skip


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    groups = dataclasses.asdict(config)
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


def read_config(folder: Path) -> Config:
    """The config of a run. Raises ConfigError when the folder holds none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.json")
    return Config.from_json(path.read_text())


def check_run(config: Config) -> None:
    """Raises ConfigError when the run folder holds another config, or files that are no run's."""
    folder = config.run.dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir={str(folder)!r} is a file: choose a folder")
    if (folder / "config.json").exists():
        theirs, ours = flatten(read_config(folder)), flatten(config)
        differ = [name for name in ours if name not in MAY_CHANGE and ours[name] != theirs[name]]
        if differ:
            listed = "; ".join(f"{name} is {theirs[name]!r} there, {ours[name]!r} here" for name in differ)
            raise ConfigError(
                f"run.dir={str(folder)!r} holds another run ({listed}): give this one its own folder with --run.dir, "
                "or run with the settings of the first to resume it"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"run.dir={str(folder)!r} has files but no config.json: choose an empty or a new folder")


def write_config(config: Config) -> None:
    """Makes the run folder, if there is none, and writes config.json. Raises ConfigError when the disk refuses."""
    folder = config.run.dir
    temporary = folder / ".config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(config.to_json() + "\n")
        os.replace(temporary, folder / "config.json")
    except OSError as error:
        raise ConfigError(f"run.dir={str(folder)!r} cannot be written: {error.strerror}") from error
