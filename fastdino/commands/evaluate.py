"""``fastdino eval``: what a user names becomes a backbone, and what is found becomes files and text."""

import inspect
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastdino import recipes
from fastdino.config import Config, ConfigError
from fastdino.distributed import Ranks, init
from fastdino.eval import EVALUATIONS, Evaluation, Subject
from fastdino.eval.controls import RawPixels
from fastdino.launch import place
from fastdino.model import build_backbone
from fastdino.model.network import check_arch
from fastdino.training.export import any_backbone, is_run, run_backbone

log = logging.getLogger(__name__)

Path_ = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is evaluated."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A run folder (RUN@STEP for a checkpoint, RUN:student for the student), weights that `fastdino export` wrote, or
    published ones: a file, or a folder of Hugging Face. Also pixels, or random:RECIPE for one that has not learned."""
    arch: str = ""
    """Of published weights: model.arch. Our ViTs are told by their shapes; any backbone of timm is timm:NAME."""
    step: int | None = None
    """Of a run: the checkpoint to take; default: the newest."""
    role: Literal["teacher", "student"] = "teacher"
    """Of a run: whose weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""


def evaluate(arguments: list[str]) -> None:
    """``fastdino eval KIND WEIGHTS``: the flags of a kind are the fields of its dataclass."""
    kind = arguments[0] if arguments else ""
    if kind not in EVALUATIONS:
        asked_for_help = kind in ("-h", "--help")
        print(_usage(), file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    weights, evaluation = asked(EVALUATIONS[kind], f"fastdino eval {kind}", arguments[1:])
    with_ranks(weights, lambda ranks: run_one(weights, evaluation, ranks))


def asked(kind: type[Evaluation], prog: str, arguments: list[str]) -> tuple[Weights, Any]:
    """What the flags say; exits where tyro cannot read them."""
    flat = tyro.conf.arg(name="")
    both: Any = tuple[Annotated[Weights, flat], Annotated[kind, flat]]  # type: ignore[valid-type]
    return tyro.cli(both, args=arguments, prog=prog, description=inspect.getdoc(kind))


def with_ranks(weights: Weights, work: Any) -> None:
    """``work`` on the ranks of a launcher, or in this process alone."""
    if place(os.environ).world_size > 1:
        with init(weights.device) as ranks:
            work(ranks)
        return
    has_gpu = torch.cuda.is_available()
    if weights.device == "cuda" and not has_gpu:
        raise ConfigError("--device=cuda, and torch sees no GPU here: use --device cpu")
    where = torch.device("cuda" if has_gpu and weights.device != "cpu" else "cpu")
    work(Ranks(0, 1, 0, where))


def run_one(weights: Weights, evaluation: Evaluation, ranks: Ranks) -> None:
    """Prints the result as JSON, and in the log as a table; writes both and their pictures."""
    subject = subject_of(weights, evaluation, ranks)
    result = evaluation(subject)
    if ranks.is_main:
        folder = evaluation.folder(subject)
        told = result.write(folder)
        log.info("%s\nwritten to %s", result.table(), folder)
        print(json.dumps({**told, "out": str(folder)}, indent=2))


def subject_of(weights: Weights, evaluation: Evaluation, ranks: Ranks) -> Subject:
    """The backbone on this rank's device. Raises ConfigError and WeightsError for what is none."""
    name, step, role = _parts(weights)
    if name == "pixels":
        return Subject(RawPixels(), Config(), Path(), {"path": name}, ranks)
    told: dict[str, Any]
    if name.startswith("random:"):
        config = recipes.get(name.removeprefix("random:"))
        size, channels = config.views.global_size, config.data.channels
        backbone: Any = build_backbone(config.model, size, channels=channels, seed=evaluation.seed).eval()
        folder, told = Path(), {"path": name, "seed": evaluation.seed}
    else:
        path = Path(name).expanduser()
        folder, told = (path if path.is_dir() else path.parent), {"path": name}
        if is_run(path):
            backbone, config, step = run_backbone(path, step, role)
            check_arch(path, config, weights.arch)
            told |= {"step": step, "role": role}
        elif step is not None or role != "teacher":
            raise ConfigError(f"{name} is no run folder, and --step and --role choose among the weights of one")
        else:
            backbone, config = any_backbone(path, weights.arch, evaluation.size)
    return Subject(backbone.to(ranks.device), config, folder, told, ranks)


def _parts(weights: Weights) -> tuple[str, int | None, Literal["teacher", "student"]]:
    """Path, step and role, of which the last two may stand behind the path. A name that exists is never cut."""
    name, step, role = weights.path, weights.step, weights.role
    while not os.path.exists(os.path.expanduser(name)):
        if name.endswith((":student", ":teacher")):
            name, _, said = name.rpartition(":")
            role = "student" if said == "student" else "teacher"
        elif "@" in name and name.rpartition("@")[2].isdecimal():
            name, _, number = name.rpartition("@")
            step = int(number)
        else:
            break
    return name, step, role


def _usage() -> str:
    lines = [f"  {name:12} {(found.__doc__ or '').splitlines()[0]}" for name, found in EVALUATIONS.items()]
    return "usage: fastdino eval KIND WEIGHTS [flags]\n\nkinds:\n" + "\n".join(lines)
