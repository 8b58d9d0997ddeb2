"""A user's DeepSpeed JSON beside the settings that fastdino gives DeepSpeed: what may be set in it, and what not."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from fastdino.config.errors import ConfigError

SIZE, FLAG = "a whole number", "true or false"

FREE: dict[str, Any] = {  # what each may be; a tuple: one of these
    "communication_data_type": ("bf16", "fp32"),
    "zero_optimization.overlap_comm": FLAG,
    "zero_optimization.reduce_bucket_size": SIZE,
    "zero_optimization.allgather_bucket_size": SIZE,
    "zero_optimization.stage3_prefetch_bucket_size": SIZE,
    "zero_optimization.stage3_max_live_parameters": SIZE,
    "zero_optimization.stage3_max_reuse_distance": SIZE,
    **dict.fromkeys([f"comms_logger.{name}" for name in ("enabled", "verbose", "prof_all", "debug")], FLAG),
    "flops_profiler.enabled": FLAG,
    "flops_profiler.profile_step": SIZE,
    "flops_profiler.detailed": FLAG,
}

_OFFLOAD = (
    "weights, moments and teacher are updated on the device, in one pass: take more ranks, a higher engine.zero_stage "
    "or engine.checkpointing instead"
)
_COPY = "the teacher would be computed from a copy that its average does not reach"
REASONS = {  # why a setting, or a section, is fastdino's own; the remedy with it
    "zero_optimization.stage": "set engine.zero_stage",
    "train_batch_size": "it is run.local_batch times the ranks times engine.accumulate",
    "train_micro_batch_size_per_gpu": "set run.local_batch",
    "gradient_accumulation_steps": "set engine.accumulate",
    "gradient_clipping": "set optim.clip and optim.clip_mode",
    "optimizer": "the optimizer is fastdino's, which moves the teacher in the same pass: set optim.name",
    "scheduler": "the schedules are functions of the step: set optim.schedule",
    "fp16": "scaling the loss waits for the device at every step: use engine.precision=bf16",
    "bf16": "set engine.precision",
    "data_types": "gradients are summed in fp32 where that costs nothing",
    "zero_optimization.sub_group_size": "a group of parameters is updated in one pass",
    "zero_optimization.stage3_param_persistence_threshold": _COPY,
    "zero_optimization.stage3_model_persistence_threshold": _COPY,
    "zero_optimization.zero_hpz_partition_size": _COPY,
    "zero_optimization.memory_efficient_linear": "it rounds otherwise than the other stages",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "activation_checkpointing": "set engine.checkpointing",
    "checkpoint": "checkpoints are fastdino's own, which load at any stage and number of ranks",
    "elasticity": "a run resumes at another number of ranks as it is",
}


def merged(ours: dict[str, Any], path: Path) -> dict[str, Any]:
    """``ours`` with what the JSON file at ``path`` sets beside it.

    What it says of a setting of fastdino's is passed over where it is the same, "auto", or switches something off.
    Raises ConfigError for a file that is none, for a value that a setting cannot have, and for everything else.
    """
    name = f"engine.deepspeed={path}"
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in ours.items()}
    for setting, value in _flat(_read(name, path)).items():
        section, _, key = setting.rpartition(".")
        own = _get(ours, setting)
        if value == "auto" or (own == value and isinstance(own, bool) == isinstance(value, bool)):
            continue
        if setting in FREE:
            _check(name, setting, value)
            whole = int(value) if FREE[setting] == SIZE else value
            (result.setdefault(section, {}) if section else result)[key] = whole
        else:
            raise ConfigError(f"{name}: {_refusal(setting, value, own)}")
    return result


def _read(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{name} holds no object of settings, such as {{"zero_optimization": {{...}}}}')
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON that gives no key twice."""
    names = [key for key, _ in pairs]
    for key in names:
        if names.count(key) > 1:
            raise ValueError(f"{key!r} is in it twice")
    return dict(pairs)


def _flat(content: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Values by dotted names, without the sections that switch off what they are about."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        setting = f"{section}{key}"
        if not isinstance(value, dict):
            found[setting] = value
        elif not (value.get("enabled") is False or value.get("device") == "none"):
            found |= _flat(value, f"{setting}.")
    return {setting: value for setting, value in found.items() if value is not None}


def _get(settings: Any, setting: str) -> Any:
    for key in setting.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _check(name: str, setting: str, value: Any) -> None:
    kind = FREE[setting]
    if kind == FLAG:
        allowed, fits = FLAG, isinstance(value, bool)
    elif kind == SIZE:
        least = int(setting.endswith(".reduce_bucket_size"))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        allowed, fits = f"{SIZE}, {least} or more", number and least <= value < math.inf and value == int(value)
    else:
        allowed, fits = f"one of {', '.join(kind)}", value in kind
    if not fits:
        raise ConfigError(f"{name}: {setting}={json.dumps(value)} must be {allowed}")


def _refusal(setting: str, value: Any, ours: Any) -> str:
    parts = setting.split(".")
    for length in range(len(parts), 0, -1):
        reason = REASONS.get(".".join(parts[:length]))
        if reason is not None:
            return f"{setting}={json.dumps(value)} is not the file's to set: {reason}; leave it out"
    if isinstance(ours, dict):
        return f"{setting}={json.dumps(value)} must be an object of settings"
    if ours is not None:
        return f"{setting}={json.dumps(value)} cannot be: fastdino's step needs {json.dumps(ours)}; leave it out"
    near = difflib.get_close_matches(setting, FREE, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it may set {', '.join(FREE)}"
    return f"{setting} is not a setting that fastdino hands to DeepSpeed: leave it out; {hint}"
