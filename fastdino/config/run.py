"""Settings of the run: its length, its folder, what it reports."""

from dataclasses import dataclass
from pathlib import Path

from fastdino.config.group import Group


@dataclass(frozen=True, kw_only=True)
class RunConfig(Group):
    """Length of the run, where it is kept, what it reports."""

    dir: Path = Path("runs/default")
    """The run folder: config.json, metrics.jsonl, TensorBoard events."""
    checkpoints: str = "checkpoints"
    """Where checkpoints go: a folder, in run.dir unless its path is absolute, or a URL of any store that fsspec knows
    (s3://bucket/run, gs://...). All hosts have to see it."""
    cache: Path = Path("~/.cache/fastdino/compiled")
    """What compilers made, so that a run that is resumed need not wait for it; TORCHINDUCTOR_CACHE_DIR and
    TRITON_CACHE_DIR go before it."""
    epochs: int = 100
    """Passes over the images."""
    local_batch: int = 64
    """B, images per rank in one forward pass. Global batch = local batch * ranks * engine.accumulate."""
    seed: int = 0
    """Start of all randomness: initial weights, order of images, views, drop path."""
    save_every: int = 1
    """Epochs between checkpoints; the last step is always saved."""
    save_every_steps: int = 0
    """Steps between checkpoints within an epoch; 0: only at epochs' ends."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 20
    """Epochs between checkpoints that are kept for good (DINO v1: saveckp_freq); 0: none."""
    log_every: int = 10
    """Steps between log lines; only these steps read the device."""
    knn_every: int = 10
    """Epochs between k-NN evaluations of the teacher; 0: never."""
    knn_root: str = ""
    """Class folders or shards for the k-NN, or shapes. Default: shapes when training on shapes, else no k-NN."""
    max_nonfinite: int = 10
    """Skipped steps in a row (non-finite loss or gradient) after which the run stops."""
    hang_after: float = 120.0
    """Seconds without a step after which the run counts as hung: all ranks write their stacks to stacks/ and end with
    exit code 86. 20 median steps are no hang; start, first steps and checkpoints have 15 minutes. 0: never."""

    prometheus: int = 0
    """A port where rank 0 tells Prometheus what metrics.jsonl says; needs fastdino[monitoring]. 0: none."""
    wandb: str = ""
    """A project of Weights & Biases that is told the same; needs fastdino[monitoring]. WANDB_MODE=offline keeps it in
    wandb/ in the run folder."""

    def check(self) -> None:
        for name in ("epochs", "local_batch", "save_every", "keep", "log_every", "max_nonfinite"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("save_every_steps", "keep_every", "knn_every", "hang_after"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        self.require(0 <= self.prometheus < 2**16, "prometheus", "a port, 1 to 65535, or 0 for none")
        self.require(bool(self.checkpoints), "checkpoints", "a folder or a URL")
        self.require(0 <= self.seed < 2**64, "seed", "in [0, 2**64)", "a generator's seed has 64 bits")
