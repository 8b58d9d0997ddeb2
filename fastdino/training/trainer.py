"""The loop: images in, a better teacher out. One step is :meth:`Trainer.train_step`; read that first."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdino import distributed
from fastdino.config import Config, ConfigError, UserError
from fastdino.data import Batch, normalize, open_source, train_batches
from fastdino.distributed import Ranks
from fastdino.engine.schedules import Schedules
from fastdino.engine.zero import build_engine, zero_stage
from fastdino.eval import online_knn
from fastdino.eval.splits import bank_and_test
from fastdino.method.dino import Dino
from fastdino.method.health import Health
from fastdino.model import build_network
from fastdino.model.vit import Attention
from fastdino.training import checkpoint
from fastdino.training.metrics import Metrics
from fastdino.training.run_folder import check_run, write_config
from fastdino_kernels._backend import use_triton

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a finished run reports."""

    dir: Path
    steps: int
    """Optimizer steps since the run's start."""
    loss: float
    """Mean over ranks at the last logging step."""
    knn: float | None
    """Last k-NN top-1 of the teacher, in percent; None when no k-NN was asked for."""


class TrainingDiverged(UserError, RuntimeError):
    """Too many steps in a row were skipped because the loss or a gradient was not finite."""


class Preempted(UserError, RuntimeError):
    """SIGTERM or SIGUSR1 ended the run after a checkpoint; the same command resumes it."""

    exit_code = 85  # lets a job script tell a notice, after which it requeues, from an error that will come again


def train(config: Config) -> Result:
    """Trains the run in ``config.run.dir``, from its newest checkpoint if it has one.

    Works as one process with nothing set, and under torchrun, the deepspeed launcher or SLURM's srun; every process
    calls it. Raises ConfigError for settings that cannot work, CheckpointError for a checkpoint that cannot be used,
    BadData when too many images are unreadable, TrainingDiverged, and Preempted after SIGTERM or SIGUSR1.
    """
    with distributed.init(config.engine.device) as ranks:
        return Trainer(config, ranks).run()


class Trainer:
    """Everything that one rank needs for a run, at the step where the run stands."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.source = open_source(config.data.root, config.data)
        self.knn_root = config.run.knn_root or ("shapes" if config.data.root == "shapes" else "")
        if config.run.knn_every and self.knn_root:
            bank_and_test(self.knn_root, config.data.image_size)  # what is wrong with it is said now, not in hours
        self._on_main(check_run)
        torch.manual_seed(config.run.seed)
        student, teacher = build_network(config), build_network(config, teacher=True)
        self.shapes = {name: list(p.shape) for name, p in student.named_parameters()}
        self.engine = build_engine(config, student, teacher, ranks)
        center = torch.zeros(config.head.num_prototypes, device=ranks.device)
        networks = self.engine.student, self.engine.teacher
        self.dino = Dino(*networks, config.loss, center, ranks, config.engine.accumulate)
        self.global_batch = config.run.local_batch * ranks.world_size * config.engine.accumulate
        self.step = self._restore()
        self.batches = train_batches(
            config, self.source, rank=ranks.rank, world_size=ranks.world_size, start_step=self.step, device=ranks.device
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.run.epochs
        self.schedules = Schedules(config, self.steps_per_epoch, self.global_batch)
        self.num_bad = 0
        self._notice = False  # a signal asked this rank to stop
        self._noticed: Callable[[], bool] = lambda: False  # whether one had asked any rank, a step ago
        self._on_main(write_config)  # not before everything else has been found in order

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self, batches: list[Batch]) -> Tensor:
        """One update of student, teacher and center; the loss it returns stays on the device.

        Args:
            batches: engine.accumulate micro batches. Nothing in here waits for the device.
        """
        now = self.schedules(self.step)
        self._seed_step()
        self.engine.wait_teacher()
        loss = torch.zeros((), device=self.ranks.device)
        for batch in batches:
            part = self.dino.loss(self._groups(batch), now.teacher_temp)
            self.engine.backward(part)
            loss += part.detach() / len(batches)
        self.engine.step(now, loss.isfinite())
        self.dino.update_center(self.engine.counters()["skipped_in_row"] == 0)
        self.step += 1
        return loss

    def _groups(self, batch: Batch) -> list[Tensor]:
        """Normalised views, those of one size together; no local group when there are none."""
        views = [batch.global_views] + ([batch.local_views] if len(batch.local_views) else [])
        return [normalize(group, self.config.data.normalize) for group in views]

    def _seed_step(self) -> None:
        """Drop path's randomness is a function of (seed, step, rank), so there is no generator's state to save."""
        entropy = np.random.SeedSequence([self.config.run.seed, self.step, self.ranks.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> Result:
        """Trains to the end; checkpoints, logs and evaluates on the way."""
        metrics = self._metrics()
        health = Health(self.config.head.num_prototypes)
        loss, knn = float("nan"), None
        handlers = {number: signal.signal(number, self._on_notice) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            while self.step < self.total_steps:
                started = time.perf_counter()
                batches = [self._count_bad(next(self.batches)) for _ in range(self.config.engine.accumulate)]
                waited = time.perf_counter() - started
                step_loss = self.train_step(batches)
                if metrics:
                    metrics.waited(waited)
                    metrics.advance()
                if self.step % self.config.run.log_every == 0 or self.step == self.total_steps:
                    loss = self._report(step_loss, metrics, health)
                self._stop_if_asked()
                knn = self._end_of_epoch(metrics, knn)
        except KeyboardInterrupt:
            log.warning("stopped at step %d; the same command resumes from the newest checkpoint", self.step)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if metrics:
                metrics.close()
        return Result(self.config.run.dir, self.step, loss, knn)

    def _on_notice(self, number: int, frame: object) -> None:
        """Signal handler: a cluster is about to take the machine away."""
        self._notice = True

    def _stop_if_asked(self) -> None:
        """Saves and stops on all ranks at the same step when any rank was given notice.

        Asked at every step, because a launcher that was told to stop kills soon (torchrun after 30 seconds); what is
        answered at one step was asked at the one before, so that no host waits.
        """
        if self._noticed() and self.step < self.total_steps:
            raise Preempted(
                f"stopped by a signal at step {self.step}, saved in {self.save()}: the same command resumes"
            )
        self._noticed = self.ranks.ask(self._notice)

    def _end_of_epoch(self, metrics: Metrics | None, knn: float | None) -> float | None:
        """Saves and evaluates where the settings ask for it; returns the newest k-NN score."""
        run = self.config.run
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        last = self.step == self.total_steps
        by_epoch = rest == 0 and epoch % run.save_every == 0
        by_step = run.save_every_steps and self.step % run.save_every_steps == 0
        if last or by_epoch or by_step:
            self.save()
        if rest == 0 and run.knn_every and (last or epoch % run.knn_every == 0):
            knn = self._knn(metrics, epoch, knn)
        if metrics and (rest == 0 or by_step):
            metrics.restart_clock(self.step)
        return knn

    def _report(self, loss: Tensor, metrics: Metrics | None, health: Health) -> float:
        """The one place that waits for the device: statistics, counters and alarms of a logging step."""
        now = self.schedules(self.step - 1)
        statistics = {"loss": loss, **self.dino.statistics(now.teacher_temp)}
        packed = torch.stack([value.float() for value in statistics.values()])
        self.ranks.mean_(packed)
        values = dict(zip(statistics, packed.tolist(), strict=True))
        counters = self.engine.counters()
        skipped, in_row, last = (int(counters[k]) for k in ("skipped", "skipped_in_row", "last_skipped"))
        if metrics:
            epoch = self.step / self.steps_per_epoch
            schedule = {"lr": now.lr, "weight_decay": now.weight_decay, "momentum": now.momentum}
            more = {"teacher_temp": now.teacher_temp, "grad_norm": float(self.engine.grad_norm)}
            counts = {"skipped_steps": skipped, "bad_images": self.num_bad}
            metrics.report(self.step, values, epoch=epoch, **schedule, **more, **counts)
            for alarm in health.check(values, first_epoch=epoch < 1):
                metrics.say(f"step {self.step}: {alarm}")
            if in_row:
                metrics.say(f"step {last} was skipped: its loss or a gradient was not finite ({skipped} so far)")
        if in_row >= self.config.run.max_nonfinite:
            raise TrainingDiverged(
                f"{in_row} steps in a row up to step {last} had a loss or gradient that is not finite "
                f"(run.max_nonfinite={self.config.run.max_nonfinite}). The newest checkpoint is from before: lower "
                "optim.lr or use engine.precision=fp32"
            )
        return values["loss"]

    def _knn(self, metrics: Metrics | None, epoch: int, before: float | None) -> float | None:
        """Weighted k-NN of the teacher on rank 0, while the others wait."""
        if not self.knn_root:
            return before
        self.engine.wait_teacher()
        if self.ranks.is_main:
            backbone = self.engine.teacher.backbone
            assert isinstance(backbone, nn.Module)
            score = online_knn(backbone, self.knn_root, self.config)
            before = score["knn"]
            if metrics:
                metrics.write(self.step, {"epoch": epoch, **score})
                metrics.say(f"epoch {epoch}: k-NN of the teacher {before:.1f} %")
        self.ranks.barrier()
        return before

    def _count_bad(self, batch: Batch) -> Batch:
        self.num_bad += len(batch.bad)
        for name in batch.bad:
            log.warning("skipped an image that cannot be read: %s", name)
        return batch

    # ------------------------------------------------------------------------------------------------ its folder

    def _on_main(self, work: Callable[[Config], None]) -> None:
        """Rank 0 looks after the run folder; what it finds wrong is raised on every rank."""
        problem: ConfigError | None = None
        if self.ranks.is_main:
            try:
                work(self.config)
            except ConfigError as error:
                problem = error
        if self.ranks.any(problem is not None):
            raise problem or ConfigError("rank 0 refused the run folder")

    def _metrics(self) -> Metrics | None:
        if not self.ranks.is_main:
            return None
        log.info(
            "%d images, %d steps per epoch, %d steps; global batch %d = %d * %d ranks * %d",
            len(self.source), self.steps_per_epoch, self.total_steps, self.global_batch,
            self.config.run.local_batch, self.ranks.world_size, self.config.engine.accumulate,
        )  # fmt: skip
        engine, stage = self.config.engine.name, zero_stage(self.config, self.ranks)
        modules = self.engine.student_network.modules()
        log.info(
            "%s, %s on %s, attention by %s, loss and averages by %s",
            f"{engine} ZeRO {stage}" if engine == "deepspeed" else engine,
            str(self.engine.dtype).removeprefix("torch."), self.ranks.device,
            next((m.implementation() for m in modules if isinstance(m, Attention)), "the backbone's own code"),
            "Triton kernels" if use_triton(self.dino.center) else "plain torch",
        )  # fmt: skip
        return Metrics(self.config.run.dir, self.step, self.total_steps, self.global_batch)

    @property
    def _checkpoints(self) -> Path:
        return self.config.run.dir / "checkpoints"

    def _shared(self) -> dict[str, Tensor]:
        """Live tensors that are equal on all ranks and belong into a checkpoint: center, counters, buffers."""
        shared = {"center": self.dino.center}
        shared |= {f"counter.{name}": value for name, value in self.engine.counters().items()}
        for role, network in (("student", self.engine.student_network), ("teacher", self.engine.teacher)):
            shared |= {f"{role}.{name}": buffer for name, buffer in network.named_buffers()}
        return shared

    def save(self) -> Path:
        """Writes a checkpoint of the present step and removes those that need not be kept."""
        run = self.config.run
        pieces: Iterator = self.engine.fragments() if self.engine.saves else iter(())
        meta = {
            "global_batch": self.global_batch,
            "num_images": len(self.source),
            "epoch": self.step / self.steps_per_epoch,
        }
        path = checkpoint.save(
            self._checkpoints, self.step, self.ranks,
            pieces=pieces, shared=self._shared(), shapes=self.shapes, meta=meta,
        )  # fmt: skip
        if self.ranks.is_main:
            stride = run.keep_every * self.steps_per_epoch
            checkpoint.prune(self._checkpoints, run.keep, range(stride, self.total_steps + 1, stride) if stride else ())
        return path

    def _restore(self) -> int:
        """Loads the newest checkpoint of the run folder; returns the step at which the run goes on."""
        found = checkpoint.newest(self._checkpoints, self.ranks)
        if found is None:
            return 0
        path, manifest = found
        for name, here in (("global_batch", self.global_batch), ("num_images", len(self.source))):
            if manifest.meta[name] != here:
                raise ConfigError(
                    f"{path} was written with {name} {manifest.meta[name]}, now it is {here}: the run would not go on "
                    "as it began. Keep local batch * ranks * engine.accumulate, and the images, as they were"
                )
        saved = checkpoint.load(path, manifest, self.engine.fragments(), self.shapes)
        prefix = "counter."
        self.engine.load_counters({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
        for name, live in self._shared().items():
            if not name.startswith(prefix):
                live.copy_(saved[name])
        self.engine.after_load()
        if self.ranks.is_main:
            log.info("resumed from %s", path)
        return manifest.step
