"""The run that is trained on two hosts and under SLURM: by the command, as its user types it."""

from pathlib import Path

STEPS = 80


def arguments(folder: Path) -> list[str]:
    """Of ``fastdino``: 80 steps of two ranks on a CPU, a checkpoint at every tenth."""
    settings = {
        "model.arch": "vit_nano", "model.patch-size": 8, "head.num-prototypes": 64, "head.hidden-dim": 48,
        "head.bottleneck-dim": 32, "views.global-size": 32, "views.local-size": 16, "views.num-local": 2,
        "data.root": "shapes", "data.num-images": 2 * STEPS, "data.image-size": 32, "data.num-workers": 0,
        "optim.warmup-epochs": 0, "engine.name": "torch", "engine.device": "cpu", "run.epochs": 1,
        "run.local-batch": 1, "run.log-every": 1, "run.knn-every": 0, "run.save-every-steps": 10, "run.dir": folder,
    }  # fmt: skip
    return ["train", "vit_small_16", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def logged(folder: Path) -> int:
    """How many steps metrics.jsonl has."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def final(folder: Path) -> dict[str, bytes]:
    """The files of the last checkpoint."""
    return {path.name: path.read_bytes() for path in (folder / f"checkpoints/step-{STEPS:08d}").iterdir()}
