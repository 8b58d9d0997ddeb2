"""``fastdino eval``: what a user names becomes a backbone, and what is found becomes files and text."""

import inspect
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastdino import recipes
from fastdino.config import Config, ConfigError
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.opening import open_part
from fastdino.data.sources.source import Source
from fastdino.distributed import Ranks, init
from fastdino.eval import EVALUATIONS, Evaluation, Reading, Subject
from fastdino.eval.cache import Cache
from fastdino.eval.controls import RawPixels
from fastdino.eval.evaluation import Common, cache_folder, results_folder
from fastdino.eval.features import Part, feature_batches
from fastdino.eval.published import PUBLISHED
from fastdino.eval.suite import Suite, compare, write_report
from fastdino.files import check_folder
from fastdino.launch import place
from fastdino.model import build_backbone
from fastdino.model.network import check_arch
from fastdino.training.export import any_backbone, is_run, run_backbone

log = logging.getLogger(__name__)

TIMED = 8  # batches by whose pace the time of all is told

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
    if kind in OTHERS:
        OTHERS[kind](arguments[1:])
        return
    if kind not in EVALUATIONS:
        asked_for_help = kind in ("-h", "--help")
        print(_usage(), file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    weights, evaluation = asked(EVALUATIONS[kind], f"fastdino eval {kind}", arguments[1:])
    with_ranks(weights, lambda ranks: run_one(weights, evaluation, ranks))


def asked(kind: type[Common], prog: str, arguments: list[str]) -> tuple[Weights, Any]:
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
    folder = results_folder(evaluation, subject, evaluation.kind)
    ranks.on_main(lambda: check_folder(folder))
    result = evaluation(subject)
    if ranks.is_main:
        told = result.write(folder)
        log.info("%s\nwritten to %s", result.table(), folder)
        print(json.dumps({**told, "out": str(folder)}, indent=2))


def subject_of(weights: Weights, evaluation: Common, ranks: Ranks) -> Subject:
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


def suite(arguments: list[str]) -> None:
    """``fastdino eval suite WEIGHTS``."""
    weights, asked_for = asked(Suite, "fastdino eval suite", arguments)
    asked_for.check([*EVALUATIONS])

    def work(ranks: Ranks) -> None:
        subject = subject_of(weights, asked_for, ranks)
        folder = results_folder(asked_for, subject, "suite")
        ranks.on_main(lambda: check_folder(folder))
        kinds = {name: kind for name, kind in EVALUATIONS.items() if kind.in_suite or name in asked_for.only}
        sections = [*asked_for(subject, kinds, folder)]
        if ranks.is_main:
            print(write_report(folder, sections, weights.path, asked_for.data))
            log.info("the report: %s", folder / "report.html")

    with_ranks(weights, work)


def compare_results(one: Path_, other: Path_, /) -> None:
    """Whether one result is better than another of the same kind and data, by a paired bootstrap over images.

    Args:
        one: a KIND.json that fastdino eval wrote, beside its KIND.npz.
        other: another one.
    """
    print(json.dumps(compare(one.expanduser(), other.expanduser()), indent=2))


def show_cache(cache_dir: Path | None = None, remove: tuple[str, ...] = ()) -> None:
    """Lists the features that are kept on the disk, the least recently used first, or removes some.

    Args:
        cache_dir: where they are; default: FASTDINO_CACHE, or ~/.cache/fastdino/features.
        remove: the first letters of entries' names, or all.
    """
    cache = Cache(cache_folder(cache_dir), math.inf)
    for entry, size, used, manifest in cache.entries():
        said = f"{manifest.get('weights', 'not finished')} on {manifest.get('data', '?')}"
        gone = any(name == "all" or entry.name.startswith(name) for name in remove)
        if gone:
            shutil.rmtree(entry, ignore_errors=True)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
        print(f"{entry.name[:12]}  {size / 1e6:10.1f} MB  {when}  {'removed: ' if gone else ''}{said}")


def show_kinds(weights: Annotated[str, tyro.conf.Positional] = "", /, data: str = "") -> None:
    """Lists the evaluations: what each asks, what --data has to hold, and what is known of released weights.

    Args:
        weights: with --data, how long their features take on this machine is told too, from some of the images.
        data: images.
    """
    for name, kind in EVALUATIONS.items():
        rows = [row for row in PUBLISHED if row.kind == name]
        known = f"; released weights with known scores: {len(rows)}" if rows else ""
        baselines = ", ".join(x.replace("_", " ") for x in kind.controls) or "none"
        print(f"{name:12} {(kind.__doc__ or '').splitlines()[0]}")
        print(f"{'':12} --data: {kind.needs}; baselines: {baselines}{known}")
    if weights and data:
        flags = Common(data=data)
        with_ranks(Weights(path=weights), lambda ranks: print(_minutes(Weights(path=weights), flags, ranks)))
    elif weights or data:
        raise ConfigError("give WEIGHTS and --data, of which the time is measured, or neither")


def _minutes(weights: Weights, flags: Common, ranks: Ranks) -> str:
    """How long features of all the images take, by the pace of some."""
    subject = subject_of(weights, flags, ranks)
    config = subject.config
    if flags.data == "shapes":
        source: Source = bank_and_test(flags.data, config.data).bank
    else:
        source = open_part(flags.data, config.data)
    reading = Reading(size=config.views.global_size, crop=config.data.eval_crop, normalize=config.data.normalize)
    some = Subset(source, range(min(len(source), TIMED * flags.batch)))
    batches = feature_batches(subject.backbone, some, reading, flags.batch, flags.num_workers, part=Part())
    warm = len(next(batches).labels)  # workers start, and the first of everything is slow
    started = time.perf_counter()
    count = sum(len(features.labels) for features in batches)
    pace = (time.perf_counter() - started) / count if count else math.nan
    took = f"about {len(source) * pace / 60:.1f} minutes" if count else f"moments ({warm} images)"
    return (
        f"\nfeatures of {len(source):,} images at {reading.size} pixels: {took} here, once for all kinds on class "
        "folders and as long again for the random start; --views live and finetune take that long for each epoch"
    )


OTHERS: dict[str, Callable[[list[str]], None]] = {
    "suite": suite,
    "compare": lambda arguments: tyro.cli(compare_results, args=arguments, prog="fastdino eval compare"),
    "cache": lambda arguments: tyro.cli(show_cache, args=arguments, prog="fastdino eval cache"),
    "list": lambda arguments: tyro.cli(show_kinds, args=arguments, prog="fastdino eval list"),
}


def _usage() -> str:
    lines = [f"  {name:12} {(found.__doc__ or '').splitlines()[0]}" for name, found in EVALUATIONS.items()]
    more = [
        "  suite        every evaluation that --data has labels for, as one report",
        "  compare      A.json B.json: is the difference real?",
        "  list         what each kind needs, and what is known of released weights",
        "  cache        features that are kept on the disk",
    ]
    return "usage: fastdino eval KIND WEIGHTS [flags]\n\nkinds:\n" + "\n".join([*lines, *more])
