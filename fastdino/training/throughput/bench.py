"""The command's measurements, and their table."""

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdino import distributed
from fastdino.config import Config, ConfigError
from fastdino.config.errors import require
from fastdino.data import Batch
from fastdino.data.workers import affordable
from fastdino.distributed import Ranks
from fastdino.engine import zero_stage
from fastdino.files import whole_file
from fastdino.model.weights import settled
from fastdino.training.flops import matmul_flops, peak_memory, published_peak, step_flops
from fastdino.training.throughput.ablation import SWITCHES, Ablation, ablate
from fastdino.training.throughput.parts import PARTS, TRACED_STEPS, breakdown, trace
from fastdino.training.throughput.timing import step_seconds, wall_seconds, warm_up
from fastdino.training.trainer import Trainer

MOST_STEPS = 50  # of the breakdown
NEVER = 10**9

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured; images/s are those of all ranks."""

    images: int
    """Of a step, over all ranks."""
    world_size: int
    runs: str
    """What runs where."""
    training: float
    """Images/s of the real thing: input pipeline and step together."""
    step: float
    """Images/s of the step alone, on views that are on the device."""
    pipeline: float
    """Images/s of the input pipeline alone, nothing consuming it."""
    num_workers: int
    """Workers per rank that the pipeline had; 0 worked in the training process."""
    data_wait: float
    """Share of the training's time in which a step waited for images."""
    first_step: float
    """Seconds of the first step, in which the network is compiled unless ``run.cache`` holds it."""
    peak_memory: int
    """Bytes, of the rank that needs most: of tensors on a GPU, of the process on a CPU."""
    image_flops: float
    """FLOPs of one image, see :func:`fastdino.training.flops.step_flops`."""
    published_flops: float | None
    """FLOP/s that the device's maker promises in this precision; None where it is not known."""
    matmul_flops: float
    """FLOP/s of large matrix products on the device, in this process and precision."""
    parts: dict[str, float]
    """Seconds of a step by part, when the device is waited for at both ends of each."""
    ablation: Ablation | None = None

    @property
    def workers_needed(self) -> int:
        """Workers per rank with which the pipeline would keep up with the step, if each does what one does now."""
        return math.ceil(self.step / (self.pipeline / max(self.num_workers, 1)))

    def mfu(self, images_per_second: float, flops: float) -> float:
        """The share of ``flops`` per second and device that a pace makes use of."""
        return images_per_second / self.world_size * self.image_flops / flops

    def table(self) -> str:
        """The figures in some lines, with what to do."""
        best = self.published_flops or self.matmul_flops
        what = "the published peak" if self.published_flops else "what matrix products reach here"
        lines = [self.runs, f"{'':20}{'images/s':>12}{'per device':>12}{'MFU':>9}"]
        for name, pace in (("training", self.training), ("step alone", self.step)):
            lines.append(f"{name:20}{pace:12.1f}{pace / self.world_size:12.1f}{self.mfu(pace, best):9.1%}")
        workers = f"{self.num_workers} worker{'s' * (self.num_workers != 1)} per rank"
        lines += [
            f"{'pipeline alone':20}{self.pipeline:12.1f}{self.pipeline / self.world_size:12.1f}   {workers}",
            f"{'waiting for images':20}{self.data_wait:12.1%}   of training",
            f"{'first step':20}{self.first_step:12.1f} s",
            f"{'peak memory':20}{self.peak_memory / 1e9:12.2f} GB per device",
            f"MFU: the share of {best / 1e12:,.3g} TFLOP/s, {what}; an image takes {self.image_flops / 1e9:,.3g} GFLOP",
        ]
        if self.published_flops:
            reached = self.matmul_flops / self.published_flops
            lines.append(f"matrix products reach {reached:.1%} of that peak here")
        if self.pipeline < self.step:
            needed = f"it needs --data.num-workers {self.workers_needed} and as many cores"
            lines.append(f"the pipeline holds the step back: {needed}")
        elif not self.num_workers:
            lines.append("the pipeline takes turns with the step: with --data.num-workers 1 it works beside it")
        else:
            lines.append("the pipeline keeps up with the step")
        return "\n".join([*lines, *self._breakdown(), *([self.ablation.table()] if self.ablation else [])])

    def _breakdown(self) -> list[str]:
        whole, free = sum(self.parts.values()), self.images / self.training
        lines = [f"a step of {self.images} images, the device waited for after each part:"]
        for part, seconds in self.parts.items():
            note = f"   {PARTS[part]}" if PARTS[part] else ""
            lines.append(f"  {part:18}{1e3 * seconds:12.2f} ms{seconds / whole:9.1%}{note}")
        return [*lines, f"  {'sum':18}{1e3 * whole:12.2f} ms   {1e3 * free:.2f} ms in training, which does not wait"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Images/s, MFU, memory and the parts of the step of a recipe on this machine; takes about a minute.

    Nothing is kept of the training. On several GPUs start it under torchrun, as training.
    """

    seconds: float = 10.0
    """Seconds of each measurement: training, the step alone, the pipeline alone, each variant of --ablate."""
    ablate: tuple[str, ...] | None = None
    """Also measure what each switch of the engine gives, alone and when all others are on; or each of those named, such
    as engine.compile model.packed, with the others as the recipe has them."""
    profile: Path | None = None
    """A file for a trace of 3 steps with named parts, for ui.perfetto.dev or chrome://tracing; .gz compresses it."""
    json: Path | None = None
    """A file for all figures; it is written after every variant of --ablate, so that what is stopped leaves some."""

    def __post_init__(self) -> None:
        require(0 < self.seconds < math.inf, "--seconds", self.seconds, "a positive number of seconds")
        for name in ("profile", "json"):
            if path := getattr(self, name):
                object.__setattr__(self, name, path.expanduser())
        require(not self.json or self.json != self.profile, "--json", str(self.json), "another file than --profile")
        known = [switch.setting for switch in SWITCHES]
        unknown = " ".join(name for name in self.ablate or () if name not in known)
        require(not unknown, "--ablate", unknown, f"some of {', '.join(known)}, or none")

    def __call__(self, config: Config) -> Throughput:
        """Measures; every rank calls it, under any launcher.

        Raises ConfigError for a file that cannot be written, and what :func:`fastdino.training.trainer.train` raises.
        """
        with distributed.init(config.engine.device) as ranks:
            ranks.on_main(self._check_files)
            config = settled(config)
            # A step that logs is another graph, which would be captured in the middle.
            quiet = dataclasses.replace(config, run=dataclasses.replace(config.run, log_every=NEVER))
            found, views = self._measure(quiet, ranks)

            def save(ablation: Ablation | None, partial: str = "") -> None:
                ranks.on_main(lambda: self._write(dataclasses.replace(found, ablation=ablation), config, partial))

            save(None)
            if self.ablate is None:
                return found
            ablation = ablate(quiet, ranks, views, self.seconds, only=self.ablate, save=save)
            save(ablation)
            return dataclasses.replace(found, ablation=ablation)

    def _measure(self, config: Config, ranks: Ranks) -> tuple[Throughput, list[Batch]]:
        """All but the ablation, and the views that the step had."""
        trainer = Trainer(config, ranks)
        waited = 0.0

        def fetch() -> list[Batch]:
            nonlocal waited
            started = time.perf_counter()
            batches = [next(trainer.batches) for _ in range(config.engine.accumulate)]
            waited += time.perf_counter() - started
            return batches

        def step() -> None:
            trainer.train_step(fetch())

        self._say("the first steps", ranks)
        first = max(ranks.gather(warm_up(step, ranks, self.seconds)))
        self._say("training", ranks)
        waited, started = 0.0, time.perf_counter()
        training = step_seconds(step, ranks, self.seconds)
        data_wait = waited / (time.perf_counter() - started)
        memory = max(ranks.gather(peak_memory(ranks.device)))
        self._say("the parts of a step", ranks)  # here, where the pipeline is as far ahead as in training
        steps = ranks.gather(max(2, min(MOST_STEPS, round(self.seconds / training))))[0]
        parts = breakdown(trainer, fetch, steps)
        views = fetch()
        self._say("the step alone", ranks)
        alone = step_seconds(lambda: trainer.train_step(views), ranks, self.seconds)
        self._say("the pipeline alone", ranks)
        pipeline = step_seconds(fetch, ranks, self.seconds)
        if self.profile:
            self._say(f"a trace of {TRACED_STEPS} steps", ranks)
            trace(trainer, fetch, self.profile)
        trainer.batches.close()
        device, images = ranks.device, trainer.global_batch
        return Throughput(
            images=images,
            world_size=ranks.world_size,
            runs=_what_runs(trainer),
            training=images / training,
            step=images / alone,
            pipeline=images / pipeline,
            num_workers=affordable(config.data.num_workers),
            data_wait=data_wait,
            first_step=first,
            peak_memory=memory,
            image_flops=step_flops(config) / (images / ranks.world_size),
            published_flops=published_peak(config, device),
            matmul_flops=matmul_flops(device, trainer.engine.dtype, lambda work: wall_seconds(work, device)),
            parts=parts,
        ), views

    def _say(self, what: str, ranks: Ranks) -> None:
        if ranks.is_main:
            log.info("measuring %s", what)

    def _write(self, found: Throughput, config: Config, partial: str) -> None:
        if self.json:
            with whole_file(self.json, "Name another file with --json") as file:
                file.write_text(json.dumps(_document(found, config, partial), indent=1) + "\n")

    def _check_files(self) -> None:
        """Says now what could not be written in a minute."""
        for flag, path in (("--profile", self.profile), ("--json", self.json)):
            if path is None:
                continue
            new = not path.exists()
            try:
                path.open("a").close()
            except OSError as error:
                raise ConfigError(f"{flag} {path} cannot be written: {error.strerror}. Name another file") from error
            if new:
                path.unlink()
            elif not path.is_file():  # a device, which a rename would replace
                raise ConfigError(f"{flag} {path} cannot be written: it is there and no file. Name another file")


def _what_runs(trainer: Trainer) -> str:
    config, ranks = trainer.config, trainer.ranks
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    engine = f"deepspeed ZeRO {zero_stage(config, ranks)}" if config.engine.name == "deepspeed" else "torch engine"
    dtype = str(trainer.engine.dtype).removeprefix("torch.")
    how = f"{dtype}, {engine}{', compiled' * trainer.compiled}{', in CUDA graphs' * trainer.captures}"
    return f"{config.model.arch} on {ranks.world_size} x {device}, {how}; {trainer.global_batch} images a step"


def _document(found: Throughput, config: Config, partial: str) -> dict[str, Any]:
    """For a file: the figures, with the settings that they are of, and how far the ablation is if it is not over."""
    figures = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    if ablation := figures.pop("ablation"):
        figures["ablation"] = {
            **({"partial": partial} if partial else {}),
            "skipped": ablation.skipped,
            "costs": [
                {"on": sorted(on), **({"refused": cost} if isinstance(cost, str) else dataclasses.asdict(cost))}
                for on, cost in ablation.costs.items()
            ],
        }
    mfu = {"matmul": found.mfu(found.training, found.matmul_flops)}
    if found.published_flops:
        mfu["published"] = found.mfu(found.training, found.published_flops)
    return {**figures, "mfu": mfu, "torch": torch.__version__, "config": json.loads(config.to_json())}
