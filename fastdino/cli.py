"""fastdino: train DINO, self-distillation of vision transformers without labels.

commands:
  train RECIPE [flags]   train, or resume, a run:   fastdino train vit_small_16 --data.root /data/imagenet/train
  shard SRC DST          pack images into tar shards, which load faster; --short-side 512 for large originals
  status RUN             where a run stands, also one that was killed or has stopped talking; --json for scripts
  recipes [RECIPE]       list the recipes, or show one with all its settings
  bench RECIPE [flags]   images/s, MFU and memory of a recipe here, and where the time of a step goes
  bench data SRC         images/s per core of reading, decoding and making views, and what would make them faster
  doctor [RECIPE] [flags]  whether a training can begin here; --distributed under a launcher for all ranks and hosts
  plan RECIPE [flags]    memory and traffic of a training on N GPUs, and the ZeRO stage to take; needs no GPU
  eval KIND WEIGHTS      what a run's teacher, or a file of weights, is worth: knn, linear, fewshot, retrieval, ...
  eval suite WEIGHTS     all of that for which --data has labels, as one report; eval list says what there is
  export RUN             the teacher's backbone for timm, Hugging Face, DINO's own code or ONNX
  demo                   learn to tell rendered shapes apart in minutes on a CPU

The same train command runs on one device, and on many under torchrun, deepspeed, srun or mpirun:
  torchrun --nproc_per_node 8 -m fastdino train vit_small_16 --data.root /data/imagenet/train
`fastdino COMMAND --help` explains every flag; `fastdino train RECIPE --help` every setting.
"""

import inspect
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdino import __version__, recipes
from fastdino.config import Config, UserError
from fastdino.config.errors import require
from fastdino.flags import global_size, one_root, patch_head, plain_switches
from fastdino.launch import launched_rank, without_local_rank

Path_ = Annotated[Path, tyro.conf.Positional]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``fastdino``. What a user can mend is one message on stderr and exit code 2."""
    try:
        try:
            _main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(128 + signal.SIGPIPE)


def _reader_has_gone() -> bool:
    """True when stdout is a pipe that nobody reads any more: head has had enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(argv: Sequence[str]) -> None:
    arguments = without_local_rank([*argv])
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return
    if command == "--version":
        print(f"fastdino {__version__}")
        return
    rank = launched_rank(os.environ)
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        _run(command, arguments)
    except UserError as error:
        if not rank or error.exit_code == UserError.exit_code:  # which may be one rank's alone: its worker, its disk
            print(f"fastdino {command}{f', rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(command: str, arguments: list[str]) -> None:
    if command == "bench" and arguments[:1] == ["data"]:
        tyro.cli(bench_data, args=arguments[1:], prog="fastdino bench data")
    elif command == "train":
        train(configured(_recipe(command, arguments), arguments[1:]))
    elif command == "bench":
        bench(arguments)
    elif command == "plan":
        plan(arguments)
    elif command == "doctor":
        doctor(arguments)
    elif command == "eval":
        from fastdino.commands.evaluate import evaluate

        evaluate(arguments)
    elif command == "shard":
        shard(arguments)
    elif command in COMMANDS:
        tyro.cli(COMMANDS[command], args=arguments, prog=f"fastdino {command}")
    else:
        print(f"fastdino: no command {command!r}\n\n{(__doc__ or '').strip()}", file=sys.stderr)
        sys.exit(2)


def _recipe(command: str, arguments: list[str]) -> str:
    """RECIPE, the first word; exits where there is none."""
    if not arguments or arguments[0].startswith("-"):
        asked = arguments[:1] in (["-h"], ["--help"])
        usage = f"usage: fastdino {command} RECIPE [flags]\n\n{_list_recipes()}"
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    return arguments[0]


def configured(recipe: str, flags: list[str]) -> Config:
    """A recipe with what the flags of ``fastdino train RECIPE`` say, checked; exits where tyro cannot read them."""
    base, flags = _base(recipe, flags)
    kind: Any = tyro.conf.AvoidSubcommands[Config]
    about = inspect.getdoc(recipes.RECIPES[recipe])
    return tyro.cli(kind, default=base, args=flags, prog=f"fastdino train {recipe}", description=about)


def _base(recipe: str, flags: list[str]) -> tuple[Config, list[str]]:
    """What the flags change, and they as tyro takes them."""
    flags = plain_switches(one_root(flags))
    return patch_head(recipes.get(recipe, global_size(flags)), flags)


def _list_recipes() -> str:
    lines = [f"  {name:20} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in recipes.RECIPES.items()]
    return "recipes:\n" + "\n".join(lines)


def train(config: Config) -> None:
    """Trains, or resumes, a run."""
    from fastdino.training import trainer

    result = trainer.train(config)
    knn = "" if result.knn is None else f", k-NN {result.knn:.1f} %"
    logging.getLogger(__name__).info("done: %d steps, loss %.4f%s, in %s", result.steps, result.loss, knn, result.dir)


def bench(arguments: list[str]) -> None:
    """``fastdino bench RECIPE``: the flags are the fields of Bench, and the recipe's settings."""
    recipe = _recipe("bench", arguments)  # which may be all that there is to say: importing torch takes seconds
    from fastdino.training.throughput.bench import Bench

    measure, config = _with_recipe(Bench(), "bench", recipe, arguments[1:])
    measured = measure(config)
    if launched_rank(os.environ) == 0:
        print(measured.table())


def plan(arguments: list[str]) -> None:
    """``fastdino plan RECIPE``: the flags are the fields of Plan, and the recipe's settings."""
    recipe = _recipe("plan", arguments)
    from fastdino.model.weights import settled
    from fastdino.planning.plan import Plan

    planner, config = _with_recipe(Plan(), "plan", recipe, arguments[1:])
    print(planner(settled(config)).text())


def doctor(arguments: list[str]) -> None:
    """``fastdino doctor``: the flags are the fields of Doctor, and a recipe's settings; 2 for what failed."""
    from fastdino.doctor.doctor import Doctor

    named = arguments[:1] and not arguments[0].startswith("-")
    recipe, *flags = arguments if named else ["vit_small_16", *arguments]
    examine, config = _with_recipe(Doctor(), "doctor", recipe, flags)
    sys.exit(examine(config))


def _with_recipe(default: Any, command: str, recipe: str, flags: list[str]) -> tuple[Any, Config]:
    """What ``fastdino COMMAND RECIPE`` asks of an object like ``default``, and the settings that its flags change."""
    base, flags = _base(recipe, flags)
    flat, plain = tyro.conf.arg(name=""), (tyro.conf.AvoidSubcommands,)
    asked: Any = tuple[Annotated[type(default), flat], Annotated[Config, flat]]  # type: ignore[misc]
    about, prog = inspect.getdoc(type(default)), f"fastdino {command} {recipe}"
    return tyro.cli(asked, default=(default, base), args=flags, prog=prog, description=about, config=plain)


def bench_data(
    src: Annotated[str, tyro.conf.Positional], /, recipe: str = "vit_small_16", wanted: float = 3500
) -> None:
    """Times reading, decoding and making views of 64 images of SRC, each implementation, and says what to do.

    Args:
        src: anything that --data.root takes.
        recipe: whose views are made.
        wanted: images/s that one GPU trains on; `fastdino bench RECIPE` says how many yours does.
    """
    from fastdino.data.speed import measure

    require(wanted > 0, "--wanted", wanted, "a positive number of images per second")
    config = configured(recipe, ["--data.root", src])
    shown = f"2 x {config.views.global_size} + {config.views.num_local} x {config.views.local_size} pixels"
    print(measure(config).table(wanted, f"views of {shown} ({recipe})"))


def show_recipes(name: Annotated[str, tyro.conf.Positional] = "", /) -> None:
    """Lists the recipes; with a name, shows its command, cost, expected score and all settings.

    Args:
        name: the recipe to show.
    """
    if not name:
        print(_list_recipes())
        return
    config = recipes.get(name)
    print(f"{inspect.getdoc(recipes.RECIPES[name])}\n\n{config.to_json()}")


def status(run: Path_, /, json_: Annotated[Flag, tyro.conf.arg(name="json")] = False, requeue: Flag = False) -> None:
    """Says where a run stands: state, step, pace, newest checkpoint, host and process, and how it ended.

    Args:
        run: the run folder; any host that sees it will do.
        json_: the same as JSON, with the fields of status.json, `state` as found and `age` in seconds.
        requeue: whether a job script, whose processes have ended, starts the run again: exit code 0 yes, 1 no, and why.
    """
    from fastdino.status import answer, describe, read

    folder = run.expanduser()
    if requeue:
        sys.exit(answer(folder))
    found = read(folder)
    print(json.dumps(found, indent=2) if json_ else describe(folder, found))


def export(
    run: Path_,
    /,
    out: Path | None = None,
    step: int | None = None,
    role: Literal["teacher", "student"] = "teacher",
    format: Literal["timm", "hf", "repository", "onnx"] = "timm",
) -> None:
    """Writes the backbone of a run for timm, Hugging Face, DINO's repositories or ONNX, and says what loads it.

    Args:
        run: the run folder.
        out: file to write, or folder for hf; default: RUN/backbone.safetensors, RUN/backbone.pth for repository,
            RUN/backbone for hf, RUN/backbone.onnx.
        step: checkpoint to take; default: the newest.
        role: whose weights; the teacher is what DINO evaluates.
        format: timm's names; model.safetensors and config.json for transformers' AutoModel; the names of DINO v1 and
            v2 (v3 with rotary positions); or a graph of ONNX, images (B, C, h, w) of views.global_size to features.
    """
    from fastdino.training.export import export_run

    print(f"wrote {export_run(run, out=out, step=step, role=role, format=format)}")


@dataclass(frozen=True, kw_only=True)
class Places:
    """What is packed, and where it goes."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Anything that --data.root takes."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """A new folder, or that of a command that was stopped."""


def shard(arguments: list[str]) -> None:
    """``fastdino shard SRC DST``: the flags are the fields of Packing."""
    from fastdino.data.sources.packed.shard import Packing

    flat = tyro.conf.arg(name="")
    asked: Any = tuple[Annotated[Places, flat], Annotated[Packing, flat]]
    places, packing = tyro.cli(asked, args=arguments, prog="fastdino shard", description=inspect.getdoc(Packing))
    print(packing(os.path.expanduser(places.src), places.dst.expanduser()))


def demo(dir: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Trains a small ViT on rendered shapes, evaluates it and draws what it learned.

    Args:
        dir: run folder; summary.json and the pictures are written there.
        seed: another seed is another run.
    """
    from fastdino.demo import run_demo

    run_demo(configured("demo", ["--run.dir", str(dir), "--run.seed", str(seed)]))


COMMANDS: dict[str, Callable[..., None]] = {
    "status": status,
    "recipes": show_recipes,
    "export": export,
    "demo": demo,
}
