"""fastdino: train DINO, self-distillation with no labels.

commands:
  train RECIPE [flags]   train, or resume, a run:   fastdino train vit_small_16 --data.root /data/imagenet/train
  recipes [RECIPE]       list the recipes, or show one with all its settings
  bench RECIPE [flags]   how fast does this recipe train here, and what holds it back
  eval knn PATH          weighted k-NN accuracy of a run's teacher, or of exported weights
  eval attention PATH    pictures of where each head of the last block looks
  export RUN             the teacher's backbone as safetensors that timm loads
  demo                   learn to tell rendered shapes apart in minutes on a CPU

The same train command runs on one device, and on many under torchrun, deepspeed or srun:
  torchrun --nproc_per_node 8 -m fastdino train vit_small_16 --data.root /data/imagenet/train
`fastdino COMMAND --help` explains every flag; `fastdino train RECIPE --help` every setting.
"""

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdino import __version__, recipes
from fastdino.config import Config, UserError
from fastdino.launch import launched_rank, without_local_rank

Path_ = Annotated[Path, tyro.conf.Positional]


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``fastdino``. What a user can mend is one message on stderr and exit code 2."""
    arguments = without_local_rank([*(sys.argv[1:] if argv is None else argv)])
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
    if command in ("train", "bench"):
        config = _config(command, arguments)
        {"train": train, "bench": bench}[command](config)
    elif command == "eval":
        kind = arguments.pop(0) if arguments else "--help"
        if kind not in EVALUATIONS:
            asked_for_help = kind in ("-h", "--help")
            print(_help_of_eval(), file=sys.stdout if asked_for_help else sys.stderr)
            sys.exit(0 if asked_for_help else 2)
        tyro.cli(EVALUATIONS[kind], args=arguments, prog=f"fastdino eval {kind}")
    elif command in COMMANDS:
        tyro.cli(COMMANDS[command], args=arguments, prog=f"fastdino {command}")
    else:
        print(f"fastdino: no command {command!r}\n\n{(__doc__ or '').strip()}", file=sys.stderr)
        sys.exit(2)


def _config(command: str, arguments: list[str]) -> Config:
    """RECIPE and its overrides."""
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: fastdino {command} RECIPE [flags]\n\n{_list_recipes()}")
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    name = arguments[0]
    base = recipes.get(name)
    text = inspect.getdoc(recipes.RECIPES[name])
    return tyro.cli(Config, default=base, args=arguments[1:], prog=f"fastdino {command} {name}", description=text)


def _list_recipes() -> str:
    lines = [f"  {name:18} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in recipes.RECIPES.items()]
    return "recipes:\n" + "\n".join(lines)


def _help_of_eval() -> str:
    lines = [f"  {name:12} {(function.__doc__ or '').splitlines()[0]}" for name, function in EVALUATIONS.items()]
    return "usage: fastdino eval KIND PATH [flags]\n\nkinds:\n" + "\n".join(lines)


def train(config: Config) -> None:
    """Trains, or resumes, a run."""
    from fastdino.training import trainer

    result = trainer.train(config)
    knn = "" if result.knn is None else f", k-NN {result.knn:.1f} %"
    logging.getLogger(__name__).info("done: %d steps, loss %.4f%s, in %s", result.steps, result.loss, knn, result.dir)


def bench(config: Config) -> None:
    """Times training steps with the real input pipeline and with views that are already there."""
    from fastdino.training.throughput import measure

    measured = measure(config)
    if launched_rank(os.environ) == 0:
        print(measured.table())


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


def export(
    run: Path_, /, out: Path | None = None, step: int | None = None, role: Literal["teacher", "student"] = "teacher"
) -> None:
    """Writes the backbone of a run as safetensors; timm loads it with strict=True.

    Args:
        run: the run folder.
        out: file to write; default: RUN/backbone.safetensors.
        step: checkpoint to take; default: the newest.
        role: whose weights; the teacher is what DINO evaluates.
    """
    from fastdino.training.export import export_run

    print(f"wrote {export_run(run, out=out, step=step, role=role)}")


def eval_knn(
    path: Path_, /, data: str = "shapes", neighbors: tuple[int, ...] = (10, 20, 100, 200), batch: int = 64,
    num_workers: int = 8, device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:  # fmt: skip
    """Weighted k-NN accuracy on frozen features of the teacher, printed as JSON with the protocol.

    Args:
        path: a run folder, or weights that `fastdino export` wrote.
        data: folder of class folders (train/ and val/ below it are bank and test; without them every fifth image is
            test), or shapes.
        neighbors: values of k; DINO reports 20.
        batch: images per forward pass.
        num_workers: processes that decode; at most as many as there are cores.
        device: auto takes the GPU if there is one.
    """
    from fastdino.eval import Protocol, evaluate_knn
    from fastdino.eval.splits import bank_and_test

    backbone, config = _backbone(path, device)
    bank, test = bank_and_test(data, config.data.image_size)
    size, kind = config.views.global_size, config.data.normalize
    protocol = Protocol(size=size, batch_size=batch, num_workers=num_workers, normalize=kind)
    scores = evaluate_knn(backbone, bank, test, protocol, ks=neighbors)
    found = {name: round(100 * score, 2) for name, score in scores.items()}
    used = {"path": str(path), "data": data, "bank": len(bank), "test": len(test), "size": size, "normalize": kind}
    print(json.dumps({**found, **used}, indent=2))


def eval_attention(
    path: Path_, /, data: str = "shapes", num_images: int = 100, out: Path | None = None, size: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:  # fmt: skip
    """A sheet of images with the attention of each head of the last block, as PNG.

    Args:
        path: a run folder, or weights that `fastdino export` wrote.
        data: a folder of images, or shapes.
        num_images: images over which the best head is found; the sheet shows the first eight.
        out: file to write; default: attention.png beside the weights.
        size: side in pixels that the backbone sees, a multiple of its patch; default: that of its global views.
        device: auto takes the GPU if there is one.
    """
    from fastdino.data.sources.source import FolderSource
    from fastdino.eval import Protocol, evaluate_attention
    from fastdino.eval.splits import bank_and_test

    backbone, config = _backbone(path, device)
    source = bank_and_test(data, config.data.image_size)[1] if data == "shapes" else FolderSource(data)
    sheet = out or (path if path.is_dir() else path.parent) / "attention.png"
    protocol = Protocol(size=size or config.views.global_size, num_workers=0, normalize=config.data.normalize)
    found = evaluate_attention(backbone, source, protocol, num_images=num_images, sheet=sheet)
    print(json.dumps({**found, "sheet": str(sheet)}, indent=2))


def _backbone(path: Path, device: str) -> tuple[Any, Config]:
    """The backbone of a run or of exported weights, on its device, and the config that it was trained with."""
    import torch

    from fastdino.training.export import any_backbone

    backbone, config = any_backbone(path)
    place = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    return backbone.to(place), config


def demo(dir: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Trains a small ViT on rendered shapes, evaluates it and draws what it learned.

    Args:
        dir: run folder; summary.json and the pictures are written there.
        seed: another seed is another run.
    """
    from fastdino.demo import run_demo

    run_demo(dir, seed)


COMMANDS: dict[str, Callable[..., None]] = {"recipes": show_recipes, "export": export, "demo": demo}
EVALUATIONS: dict[str, Callable[..., None]] = {"knn": eval_knn, "attention": eval_attention}
