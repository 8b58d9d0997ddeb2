"""The loop: images in, a better teacher out. One step is :meth:`Trainer.train_step`; read that first."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdino import distributed
from fastdino.config import Config, UserError
from fastdino.data import Batch, normalize, open_source, train_batches
from fastdino.distributed import Ranks
from fastdino.engine.schedules import Schedules
from fastdino.engine.zero import build_engine, zero_stage
from fastdino.eval import online_knn
from fastdino.eval.splits import bank_and_test
from fastdino.method.dino import Dino
from fastdino.method.health import Health
from fastdino.model import build_network
from fastdino.training import checkpoint
from fastdino.training.checkpoint import Manifest
from fastdino.training.metrics import Metrics
from fastdino.training.preemption import Interrupted, Preempted, PreemptionNotice
from fastdino.training.run_folder import RunFolder

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


def train(config: Config) -> Result:
    """Trains the run in ``config.run.dir``, from its newest checkpoint if it has one.

    Works as one process with nothing set, and under torchrun, the deepspeed launcher or SLURM's srun; every process
    calls it. Raises ConfigError for settings that cannot work, CheckpointError for a checkpoint that cannot be used,
    BadData when too many images are unreadable, TrainingDiverged, and Preempted after SIGTERM or SIGUSR1.
    """
    with distributed.init(config.engine.device) as ranks, RunFolder(config, ranks) as folder:
        return Trainer(config, ranks, folder).run()


class Trainer:
    """Everything that one rank needs for a run, at the step where the run stands.

    Args:
        config: the run's.
        ranks: of which this process is one.
        folder: where the run is kept and resumed from; without one, steps can be taken and nothing is kept.
    """

    def __init__(self, config: Config, ranks: Ranks, folder: RunFolder | None = None) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder
        self.source = open_source(config.data.root, config.data)
        self.knn_root = config.run.knn_root or ("shapes" if config.data.root == "shapes" else "")
        if config.run.knn_every and self.knn_root:
            bank_and_test(self.knn_root, config.data.image_size)  # what is wrong with it is said now, not in hours
        newest = folder.newest() if folder else None
        # A checkpoint holds all weights: those that the run started from may be gone.
        start = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=None)) if newest else config
        torch.manual_seed(config.run.seed)
        student, teacher = build_network(start), build_network(start, teacher=True)
        self.shapes = {name: list(p.shape) for name, p in student.named_parameters()}
        self.engine = build_engine(config, student, teacher, ranks)
        center = torch.zeros(config.head.num_prototypes, device=ranks.device)
        networks = self.engine.student, self.engine.teacher
        self.dino = Dino(*networks, config.loss, center, ranks, config.engine.accumulate)
        self.global_batch = config.run.local_batch * ranks.world_size * config.engine.accumulate
        self.step = self._restore(*newest) if newest else 0
        self.batches = train_batches(
            config, self.source, rank=ranks.rank, world_size=ranks.world_size, start_step=self.step, device=ranks.device
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.run.epochs
        self.schedules = Schedules(config, self.steps_per_epoch, self.global_batch)
        self.num_bad = 0

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
        """Normalised views, those of one size together."""
        return [normalize(group, self.config.data.normalize) for group in batch.views.values()]

    def _seed_step(self) -> None:
        """Drop path's randomness is a function of (seed, step, rank), so there is no generator's state to save."""
        entropy = np.random.SeedSequence([self.config.run.seed, self.step, self.ranks.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> Result:
        """Trains to the end; checkpoints, logs and evaluates on the way."""
        assert self.folder is not None, "a run needs a folder"
        self.folder.write_config()
        metrics = self._metrics()
        health = Health(self.config.head.num_prototypes)
        loss, knn = self.ranks.gather(metrics and (metrics.last.get("loss", float("nan")), metrics.last.get("knn")))[0]
        noticed = self.ranks.ask(False)  # whether any rank was given notice, a step ago
        try:
            with PreemptionNotice() as notice:
                while self.step < self.total_steps:
                    step_loss = self._timed_step(metrics, notice)
                    if self.step % self.config.run.log_every == 0 or self.step == self.total_steps:
                        loss = self._report(step_loss, metrics, health)
                    # Asked at every step, because a launcher that was told to stop kills soon (torchrun after 30
                    # seconds); what is answered was asked a step before, so that no host waits.
                    if noticed() and self.step < self.total_steps:
                        self._preempt()
                    knn = self._end_of_epoch(metrics, knn, notice)
                    noticed = self.ranks.ask(notice.given)
        except KeyboardInterrupt:
            log.warning("stopped at step %d; the same command resumes from the newest checkpoint", self.step)
            raise
        finally:
            if metrics:
                metrics.close()
        return Result(self.config.run.dir, self.step, loss, knn)

    def _timed_step(self, metrics: Metrics | None, notice: PreemptionNotice) -> Tensor:
        """Waits for images and takes a step."""
        started = time.perf_counter()
        try:
            with notice.interruptible():  # a read that hangs must not keep the process from ending
                batches = [self._count_bad(next(self.batches)) for _ in range(self.config.engine.accumulate)]
        except Interrupted:
            if self.ranks.world_size == 1:
                self._preempt()
            raise Preempted(
                f"stopped by a signal at step {self.step + 1}, which waited for images: the same command resumes from "
                "the newest checkpoint"
            ) from None
        waited = time.perf_counter() - started
        loss = self.train_step(batches)
        if metrics:
            if metrics.times(self.step):
                loss.item()  # waits for the device, so that the time is the step's
            metrics.advance(self.step, time.perf_counter() - started, waited)
        return loss

    def _preempt(self) -> None:
        """Saves and stops; all ranks at the same step."""
        self._save(last=True)
        raise Preempted(
            f"stopped by a signal at step {self.step}, saved in {self.config.run.dir}: the same command resumes"
        )

    def _end_of_epoch(self, metrics: Metrics | None, knn: float | None, notice: PreemptionNotice) -> float | None:
        """Saves and evaluates where the settings ask for it; returns the newest k-NN score."""
        run = self.config.run
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        last = self.step == self.total_steps
        by_epoch = rest == 0 and epoch % run.save_every == 0
        by_step = run.save_every_steps and self.step % run.save_every_steps == 0
        if last or by_epoch or by_step:
            self._save(last)
        if rest == 0 and run.knn_every and (last or epoch % run.knn_every == 0):
            knn = self._knn(metrics, epoch, knn, notice)
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
            failed = self.folder.failed_saves if self.folder else 0
            counts = {"skipped_steps": skipped, "bad_images": self.num_bad, "failed_saves": failed}
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

    def _knn(self, metrics: Metrics | None, epoch: int, before: float | None, notice: PreemptionNotice) -> float | None:
        """Weighted k-NN of the teacher on rank 0, while the others wait; a notice ends it without a score."""
        if not self.knn_root:
            return before
        self.engine.wait_teacher()
        if self.ranks.is_main:
            backbone = self.engine.teacher.backbone
            assert isinstance(backbone, nn.Module)
            try:
                with notice.interruptible(grace=0):
                    score = online_knn(backbone, self.knn_root, self.config)
                before = score["knn"]
                if metrics:
                    metrics.write(self.step, {"epoch": epoch, **score})
                    metrics.say(f"epoch {epoch}: k-NN of the teacher {before:.1f} %")
            except Interrupted:
                log.warning("a signal ended the evaluation of epoch %d", epoch)
        self.ranks.barrier()
        return before

    def _count_bad(self, batch: Batch) -> Batch:
        self.num_bad += len(batch.bad)
        for name in batch.bad:
            log.warning("skipped an image that cannot be read: %s", name)
        return batch

    # ------------------------------------------------------------------------------------------------ its folder

    def _metrics(self) -> Metrics | None:
        """On rank 0, after a word on what is trained, how."""
        if not self.ranks.is_main:
            return None
        run, engine = self.config.run, self.config.engine.name
        log.info(
            "%d images, %d steps per epoch, %d steps; global batch %d = %d * %d ranks * %d",
            len(self.source), self.steps_per_epoch, self.total_steps, self.global_batch,
            run.local_batch, self.ranks.world_size, self.config.engine.accumulate,
        )  # fmt: skip
        on_gpu = self.ranks.device.type == "cuda"
        log.info(
            "%s, %s on %s, attention by %s, loss and averages by %s",
            f"{engine} ZeRO {zero_stage(self.config, self.ranks)}" if engine == "deepspeed" else engine,
            str(self.engine.dtype).removeprefix("torch."), self.ranks.device,
            getattr(self.engine.student_network.backbone, "implementation", "the backbone's own code"),
            "Triton kernels" if on_gpu else "plain torch",
        )  # fmt: skip
        if self.step < self.total_steps:
            log.info("step %d waits for its images", self.step + 1)
        else:
            log.info("all %d steps are done; a larger run.epochs goes on from here", self.total_steps)
        return Metrics(run.dir, self.step, self.total_steps, self.global_batch, compiles=on_gpu)

    def _shared(self) -> dict[str, Tensor]:
        """Live tensors that are equal on all ranks and belong into a checkpoint: center, counters, buffers."""
        shared = {"center": self.dino.center}
        shared |= {f"counter.{name}": value for name, value in self.engine.counters().items()}
        for role, network in (("student", self.engine.student_network), ("teacher", self.engine.teacher)):
            state = network.state_dict().keys()  # a buffer that is made anew with the network is no state
            shared |= {f"{role}.{name}": buffer for name, buffer in network.named_buffers() if name in state}
        return shared

    def _meta(self) -> dict[str, Any]:
        """What a resumption has to have in common with this run."""
        return {"global_batch": self.global_batch, "num_images": len(self.source)}

    def _save(self, last: bool) -> None:
        """Writes a checkpoint of the present step; the ``last`` one of this process has to succeed."""
        assert self.folder is not None
        stride = self.config.run.keep_every * self.steps_per_epoch
        self.folder.save(
            self.step,
            pieces=self.engine.fragments() if self.engine.saves else (),
            shared=self._shared(),
            shapes=self.shapes,
            meta={**self._meta(), "epoch": self.step / self.steps_per_epoch},
            keep_for_good=range(stride, self.total_steps + 1, stride) if stride else (),
            last=last,
        )

    def _restore(self, path: Path, manifest: Manifest) -> int:
        """Loads a checkpoint; returns the step at which the run goes on."""
        assert self.folder is not None
        self.folder.check_images(path, manifest, self._meta())
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
