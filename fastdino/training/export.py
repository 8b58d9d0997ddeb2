"""What a run leaves behind: the backbone of its teacher, for evaluation and for other programs."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from fastdino.config import Config, ConfigError
from fastdino.model import Backbone, build_network, export_backbone, restore_backbone
from fastdino.model.network import check_arch
from fastdino.training import checkpoint
from fastdino.training.checkpoint import CheckpointError, Manifest
from fastdino.training.run_folder import read_config

Role = Literal["teacher", "student"]


def run_backbone(run: Path, step: int | None = None, role: Role = "teacher") -> tuple[Backbone, Config, int]:
    """Backbone of a run's checkpoint (fp32, CPU, evaluation mode), the run's config and the checkpoint's step.

    Args:
        run: the run folder.
        step: which checkpoint; the newest by default.

    Raises ConfigError when it is no run folder, CheckpointError when it has no such checkpoint or one of another model.
    """
    run = run.expanduser()
    config = read_config(run)
    path, manifest = _checkpoint(run, step)
    bare = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    network = build_network(bare, teacher=True, load=False)
    shapes = {name: list(p.shape) for name, p in network.named_parameters()}
    state, shared = checkpoint.read_weights(path, manifest, shapes, "ema" if role == "teacher" else "param")
    prefix, own = f"{role}.", network.state_dict().keys()
    buffers = {name.removeprefix(prefix): tensor for name, tensor in shared.items() if name.startswith(prefix)}
    # older checkpoints also hold buffers that are no state, but made anew with the network
    state |= {name: tensor for name, tensor in buffers.items() if name in own}
    network.load_state_dict(state, strict=True)
    return network.backbone.eval(), config, manifest.step


def _checkpoint(run: Path, step: int | None) -> tuple[Path, Manifest]:
    """A run's checkpoint of ``step``, or its newest."""
    folder = run / "checkpoints"
    if step is None:
        found = checkpoint.newest(folder)
        if found is None:
            raise CheckpointError(f"{run} has no checkpoint yet: the first is written after run.save_every epochs")
        return found
    if step not in (there := checkpoint.steps(folder)):
        raise CheckpointError(
            f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, there)) or 'none'}"
        )
    path = checkpoint.path_of(folder, step)
    return path, checkpoint.read_manifest(path)


def export_run(run: Path, out: Path | None = None, step: int | None = None, role: Role = "teacher") -> Path:
    """Writes the backbone of a run as safetensors with timm's names; returns the file's path.

    Args:
        run: the run folder.
        out: a file, whose folder is made, or a folder that exists; default: the run folder.
        step: which checkpoint; the newest by default.
        role: whose weights.

    Raises what :func:`run_backbone` raises, and ConfigError for a file that cannot be written.
    """
    out = (out or run).expanduser()
    path = out / "backbone.safetensors" if out.is_dir() else out
    if out != run.expanduser() and path.suffix != ".safetensors":
        raise ConfigError(f"--out {out} must end in .safetensors, the one format that is written, or be a folder")
    backbone, config, step = run_backbone(run, step, role)
    export_backbone(backbone, path, {"config": config.to_json(), "step": str(step), "role": role})
    return path


def any_backbone(path: Path, arch: str = "", image_size: int | None = None) -> tuple[Backbone, Config]:
    """The teacher's backbone of a run folder, or that of a file of weights, in evaluation mode, and its run's config.

    ``arch`` and ``image_size`` are for published files; see :func:`fastdino.model.restore_backbone`.
    """
    if os.path.isdir(path):
        backbone, config, _ = run_backbone(path)
        check_arch(path, config, arch)
        return backbone, config
    if not os.path.isfile(path):
        raise ConfigError(f"{path} is neither a run folder nor a file of weights")
    backbone, config = restore_backbone(path, arch, image_size)
    return backbone.eval(), config
