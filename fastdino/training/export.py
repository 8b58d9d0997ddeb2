"""What a run leaves behind: the backbone of its teacher, for evaluation and for other programs."""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.config import Config, ConfigError
from fastdino.engine.shards import Fragment
from fastdino.model import Backbone, export_backbone, restore_backbone
from fastdino.model.network import check_arch, outline
from fastdino.model.weights import Format, is_weights_folder
from fastdino.model.weights.onnx_graph import export_onnx
from fastdino.training import checkpoint
from fastdino.training.checkpoint import CheckpointError, Manifest, Store
from fastdino.training.run_folder import read_config

log = logging.getLogger(__name__)

Role = Literal["teacher", "student"]


def run_backbone(
    run: Path, step: int | None = None, role: Role = "teacher", room: Callable[[int], Tensor] = torch.empty
) -> tuple[Backbone, Config, int]:
    """Backbone of a run's checkpoint (fp32, CPU, evaluation mode), the run's config and the checkpoint's step.

    Beside the backbone itself it takes the memory of the largest parameter: heads are not read.

    Args:
        run: the run folder.
        step: which checkpoint; the newest by default.
        role: whose weights.
        room: gives a flat fp32 tensor of so many elements, in which a parameter of a ViT is put.

    Raises ConfigError when it is no run folder, CheckpointError when it has no such checkpoint or one of another model.
    """
    run = run.expanduser()
    config = read_config(run)
    store = checkpoint.at(config.run.checkpoints, run)
    manifest = _checkpoint(run, store, step)
    bare = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    network = outline(bare, teacher=True)
    shapes, backbone = {name: [*p.shape] for name, p in network.named_parameters()}, network.backbone
    if config.model.is_vit:
        _make_room(backbone, room)
    kind = "ema" if role == "teacher" else "param"
    params = {name: param.detach() for name, param in backbone.named_parameters()}
    wholes = [Fragment(f"backbone.{name}", 0, x.numel(), tensors={kind: x.view(-1)}) for name, x in params.items()]
    shared = checkpoint.load(store, manifest, wholes, shapes)
    for name, buffer in backbone.state_dict().items():
        if name not in params:
            buffer.copy_(shared[f"{role}.backbone.{name}"])
    return backbone.eval(), config, manifest.step


def _make_room(module: nn.Module, room: Callable[[int], Tensor]) -> None:
    """Takes the parameters of a module from the meta device."""
    for param in module.parameters():
        values = room(param.numel()).view(param.shape)
        torch.utils.swap_tensors(param, nn.Parameter(values, requires_grad=False))


@contextmanager
def _room_beside(path: Path) -> Iterator[Callable[[int], Tensor]]:
    """Room in a file beside ``path`` that is gone afterwards: the system keeps in memory what it has memory for.

    Raises ConfigError where there is none.
    """
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            end = 0

            def room(size: int) -> Tensor:
                nonlocal end
                start, end = end, end + 4 * size
                os.posix_fallocate(file.fileno(), start, end - start)  # a full disk would kill who writes to memory
                return torch.from_numpy(np.memmap(file, np.float32, "r+", start, (size,)))

            yield room
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. Name another file with --out") from error


def _checkpoint(run: Path, store: Store, step: int | None) -> Manifest:
    """Of a run's checkpoint of ``step``, or of its newest."""
    if step is None:
        found = checkpoint.newest(store)
        if found is None:
            raise CheckpointError(f"{run} has no checkpoint yet: the first is written after run.save_every epochs")
        return found
    if step not in (there := store.steps()):
        raise CheckpointError(
            f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, there)) or 'none'}"
        )
    return checkpoint.read_manifest(store, step)


def export_run(
    run: Path, out: Path | None = None, step: int | None = None, role: Role = "teacher", format: Format = "timm"
) -> Path:
    """Writes the backbone of a run; returns the path of the file, or of the folder of "hf". The log says what loads it.

    Args:
        run: the run folder.
        out: a file, whose folder is made, or a folder that exists; for "hf" the folder to make. Default: backbone.* in
            the run folder.
        step: which checkpoint; the newest by default.
        role: whose weights.
        format: see :func:`fastdino.model.export_backbone`; "onnx": a graph of the features of images of
            views.global_size.

    Raises what :func:`run_backbone` raises, and ConfigError for a file that cannot be written.
    """
    run = run.expanduser()
    path = _place((out or run).expanduser(), format, out is None)
    with _room_beside(path) as room:
        backbone, config, step = run_backbone(run, step, role, room)
        texts = {"config": config.to_json(), "step": str(step), "role": role}
        if format == "onnx":
            loads = export_onnx(backbone, path, config.views.global_size, texts)
        else:
            loads = export_backbone(backbone, path, texts, format)
    log.info("%s loads it", loads)
    return path


SUFFIXES: dict[Format, tuple[str, ...]] = {
    "timm": (".safetensors",), "repository": (".pth", ".safetensors"), "hf": ("",), "onnx": (".onnx",)
}  # fmt: skip
"""What names of exported files end in, the default first; a folder's in nothing."""


def _place(out: Path, format: Format, by_default: bool) -> Path:
    """The path to write to. Raises ConfigError for a name that does not say what is written."""
    suffixes = SUFFIXES[format]
    if by_default or (out.is_dir() and format != "hf"):
        return out / ("backbone" + suffixes[0])
    if format == "hf" and out.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise ConfigError(f"--out {out} names a file, and --format hf writes a folder: leave out {out.suffix}")
    if format != "hf" and out.suffix not in suffixes:
        raise ConfigError(f"--out {out} must end in {' or '.join(suffixes)} with --format {format}, or be a folder")
    return out


def is_run(path: Path) -> bool:
    """True for a folder that is, or claims to be, that of a run."""
    return os.path.isdir(path) and not is_weights_folder(path)


def any_backbone(path: Path, arch: str = "", image_size: int | None = None) -> tuple[Backbone, Config]:
    """The teacher's backbone of a run folder, or that of weights, in evaluation mode, and its run's config.

    ``path`` may also be a folder of Hugging Face. ``arch`` and ``image_size`` are for published weights; see
    :func:`fastdino.model.restore_backbone`.
    """
    if is_run(path):
        backbone, config, _ = run_backbone(path)
        check_arch(path, config, arch)
        return backbone, config
    if not os.path.exists(path):
        raise ConfigError(f"{path} is neither a run folder nor a file of weights")
    backbone, config = restore_backbone(path, arch, image_size)
    return backbone.eval(), config
