"""The loop: images in, a better teacher out. One step is :meth:`Trainer.train_step`; read that first."""

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdino import distributed
from fastdino.agreement import check_ranks
from fastdino.config import Config, UserError
from fastdino.data import Batch, normalize, open_source, train_batches
from fastdino.distributed import Ranks
from fastdino.engine import build_engine, cuts_weights, graphs, zero_stage
from fastdino.engine.schedules import Now, Schedules
from fastdino.method.dino import Dino
from fastdino.method.health import Health
from fastdino.method.targets import build_targets
from fastdino.model import Network, outline, start_of
from fastdino.training import checkpoint
from fastdino.training.checkpoint import Manifest
from fastdino.training.flops import Meter
from fastdino.training.metrics import Metrics
from fastdino.training.monitoring.monitors import Monitors
from fastdino.training.monitoring.stragglers import Stragglers
from fastdino.training.online_knn import OnlineKnn, knn_root
from fastdino.training.preemption import Interrupted, Preempted, PreemptionNotice
from fastdino.training.run_folder import RunFolder, settled_config
from fastdino.training.watchdog import Pulse, Watchdog

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
    with distributed.init(config.engine.device) as ranks, Watchdog(config.run, ranks) as watchdog:
        check_ranks(ranks)
        config = ranks.on_main(lambda: settled_config(config))
        with Monitors(config, ranks) as monitors, RunFolder(config, ranks) as folder:
            watchdog.last_words = folder.end
            for line in config.ignored() if ranks.is_main else ():
                log.warning(line)
            return Trainer(config, ranks, folder, watchdog.pulse).run(monitors)


class Trainer:
    """Everything that one rank needs for a run, at the step where the run stands.

    Args:
        config: the run's.
        ranks: of which this process is one.
        folder: where the run is kept and resumed from; without one, steps can be taken and nothing is kept.
        pulse: hears of every step.
    """

    def __init__(
        self, config: Config, ranks: Ranks, folder: RunFolder | None = None, pulse: Pulse | None = None
    ) -> None:
        self.config, self.ranks, self.folder, self.pulse = config, ranks, folder, pulse or Pulse(0.0)
        self.captures = graphs.captures(config, ranks)
        self.source = open_source(config.data.root, config.data)
        # What is wrong with its images is said now, not in hours.
        self.online_knn = OnlineKnn(config, ranks, self.pulse) if folder and knn_root(config) else None
        newest = folder.newest() if folder else None
        student, teacher = (outline(config, teacher) for teacher in (False, True))
        # A checkpoint holds all weights: those that the run started from may be gone.
        values = None if newest else start_of(config, student)
        self.shapes = {name: list(p.shape) for name, p in student.named_parameters()}
        self.engine = build_engine(config, student, teacher, ranks, values)
        networks = {"teacher": self.engine.teacher, "student": self.engine.student}
        self.stragglers = Stragglers(ranks, networks, cuts_weights(config, ranks), self.captures)
        self.compiled = graphs.compiles(config, ranks.device)
        self.waits_for_compilers = self.compiled or ranks.device.type == "cuda"  # our own kernels are compiled too
        if self.waits_for_compilers:
            graphs.keep_compiled_in(config.run.cache)
        if self.compiled:
            graphs.compile_regions(self.engine.compilable([*student.regions(), *teacher.regions()]))
        beside = graphs.SideStream(ranks.device) if config.engine.teacher_stream else None
        targets = build_targets(config, ranks)
        self.method = Dino(self.engine.student, self.engine.teacher, config.loss, *targets, beside)
        self._take: Callable[[list[Batch], Now, bool], dict[str, Tensor]] = self._update
        if self.captures:
            self._take = graphs.StepGraphs(self._update, self._abandon, ranks.device)
        self.global_batch = config.run.local_batch * ranks.world_size * config.engine.accumulate
        self.step = self._restore(newest) if newest else 0
        self.batches = train_batches(
            config, self.source, rank=ranks.rank, world_size=ranks.world_size, start_step=self.step, device=ranks.device
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.run.epochs
        self.schedules = Schedules(config, self.steps_per_epoch, self.global_batch)
        if folder and newest:
            folder.check_length(self.step, self.steps_per_epoch, self.global_batch)

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One update of student, teacher and the method's state.

        Returns figures of this rank that stay on the device: ``loss``, and on logging steps its parts as ``loss_NAME``
        and the method's statistics.

        Args:
            batches: engine.accumulate micro batches. Nothing in here waits for the device.
        """
        self._seed_step()
        if self.folder and self.captures:  # a graph is one launch: all of it comes after what is being copied
            self.folder.saves.hold()
        figures = self._take(batches, self.schedules(self.step), self._logs(self.step + 1))
        self.step += 1
        return figures

    def _update(self, batches: list[Batch], now: Now, logs: bool) -> dict[str, Tensor]:
        """The step itself, whose work is the same at every step but for ``now``: it may be captured."""
        figures: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.ranks.device))
        for batch in batches:
            loss, parts = self.method.loss(self._normalized(batch), now)
            with self.stragglers("backward"):
                self.engine.backward(loss)
            figures["loss"] += loss.detach() / len(batches)
            for name, part in parts.items() if logs else ():
                figures[f"loss_{name}"] += part / len(batches)
        if logs:
            figures.update(self.method.statistics())
        if self.folder and not self.captures:
            self.folder.saves.hold()
        with self.stragglers("update"):
            applied = self.engine.step(now, figures["loss"])
        self.method.after_step(applied)
        return figures

    def _abandon(self) -> None:
        """Forgets a step that ended in the middle, which begins anew."""
        self.engine.abandon()
        self.method.abandon()
        self._seed_step()

    def _normalized(self, batch: Batch) -> Batch:
        """The batch with its views as network input."""
        views = {
            name: group if group.is_floating_point() else normalize(group, self.config.data.normalize)
            for name, group in batch.views.items()
        }
        return replace(batch, views=views)

    def _logs(self, step: int) -> bool:
        """True when the figures of ``step``, counted from 1, are reported."""
        return step % self.config.run.log_every == 0 or step == self.total_steps

    def _seed_step(self) -> None:
        """Drop path's randomness is a function of (seed, step, rank), so there is no generator's state to save."""
        entropy = np.random.SeedSequence([self.config.run.seed, self.step, self.ranks.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    # ------------------------------------------------------------------------------------------------ the run

    def run(self, monitors: Monitors | None = None) -> Result:
        """Trains to the end; checkpoints, logs, tells ``monitors`` and evaluates on the way."""
        assert self.folder is not None, "a run needs a folder"
        self.folder.write_config()
        self.folder.begin(self.step, self.total_steps)
        metrics = None
        if self.ranks.is_main:
            self._introduce()
            place, meter = self.folder.path, Meter.of(self.config, self.ranks)
            steps = self.step, self.total_steps
            metrics = Metrics(place, *steps, self.global_batch, self.waits_for_compilers, meter, monitors)
        head = self.config.head
        health = Health(head.num_prototypes, (self.config.patch_head or head).num_prototypes)
        loss, knn = self.ranks.gather(metrics and (metrics.last.get("loss", float("nan")), metrics.last.get("knn")))[0]
        try:
            with PreemptionNotice() as notice:
                self._rank_start(metrics, health, notice)
                asked = self.ranks.ask(False, *self.folder.saves.flags)  # whether any rank was given notice, or writes
                while self.step < self.total_steps:
                    figures = self._timed_step(metrics, notice)
                    if self._logs(self.step):
                        loss = self._report(figures, metrics, health)
                    # Asked at every step, because a launcher that was told to stop kills soon (torchrun after 30
                    # seconds); what is answered was asked a step before, so that no host waits.
                    noticed, *saving = asked()
                    self.folder.saves.advance(*saving)
                    if noticed and self.step < self.total_steps:
                        self._preempt()
                    knn = self._end_of_epoch(metrics, health, notice).get("knn", knn)
                    asked = self.ranks.ask(notice.given, *self.folder.saves.flags)
                asked()  # nothing may be on its way when this rank leaves the others
                self.engine.wait_teacher()
        except KeyboardInterrupt:
            log.warning("stopped at step %d; the same command resumes from the newest checkpoint", self.step)
            raise
        finally:
            if metrics:
                metrics.close()
        return Result(self.config.run.dir, self.step, loss, knn)

    def _timed_step(self, metrics: Metrics | None, notice: PreemptionNotice) -> dict[str, Tensor]:
        """Waits for images and takes a step."""
        started = time.perf_counter()
        try:
            with notice.interruptible():  # a read that hangs must not keep the process from ending
                batches = [next(self.batches) for _ in range(self.config.engine.accumulate)]
        except Interrupted:
            if self.ranks.world_size == 1:
                self._preempt()
            raise Preempted(
                f"stopped by a signal at step {self.step + 1}, which waited for images: the same command resumes from "
                "the newest checkpoint"
            ) from None
        waited = time.perf_counter() - started
        figures = self.train_step(batches)
        self.stragglers.step(data=waited, host=time.perf_counter() - started - waited)
        if metrics:
            if metrics.times(self.step):
                figures["loss"].item()  # waits for the device, so that the time is the step's
            metrics.advance(self.step, time.perf_counter() - started, waited)
        self.pulse.step(self.step)
        if self.folder:
            self.folder.tell(step=self.step, step_time=time.time())
        return figures

    def _preempt(self) -> None:
        """Saves and stops; all ranks at the same step."""
        self._save(last=True)
        raise Preempted(
            f"stopped by a signal at step {self.step}, saved in {self.config.run.dir}: the same command resumes"
        )

    def _end_of_epoch(self, metrics: Metrics | None, health: Health, notice: PreemptionNotice) -> dict[str, float]:
        """Saves and evaluates where the settings ask for it; returns what an evaluation finds."""
        run = self.config.run
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        last = self.step == self.total_steps
        by_epoch = rest == 0 and epoch % run.save_every == 0
        by_step = run.save_every_steps and self.step % run.save_every_steps == 0
        evaluates = self.online_knn is not None and rest == 0 and (last or epoch % run.knn_every == 0)
        if last or by_epoch or by_step:
            self._save(last, wait=evaluates)
        score = self._evaluate(metrics, health, notice) if evaluates else {}
        if metrics and (rest == 0 or by_step or metrics.compiled(self.step)):
            metrics.restart_clock(self.step)
        return score

    def _rank_start(self, metrics: Metrics | None, health: Health, notice: PreemptionNotice) -> None:
        """RankMe before the first step, unless a process that ended before its first checkpoint has found it."""
        if self.online_knn is None or self.step > 0:
            return
        if self.ranks.gather(metrics and metrics.last.get("rankme_of") == self.online_knn.ranked)[0]:
            return
        self._evaluate(metrics, health, notice)
        if self.ranks.any(notice.given):
            raise Preempted("stopped by a signal before step 1: the same command begins anew")
        if metrics:
            metrics.restart_clock(0)

    def _evaluate(self, metrics: Metrics | None, health: Health, notice: PreemptionNotice) -> dict[str, float]:
        """What the teacher's features are worth; before the first step RankMe alone, which later ones stand beside."""
        backbone, begins, epoch = self.engine.teacher.backbone, self.step == 0, self.step // self.steps_per_epoch
        assert self.online_knn is not None
        assert isinstance(backbone, nn.Module)
        score, said = self.online_knn(backbone, notice, rank_alone=begins)
        if metrics:
            metrics.say(f"epoch {epoch}: {said}")
        if metrics and score:
            line = self.online_knn.beside_start(score, None if begins else metrics.last)
            metrics.write(self.step, {"epoch": epoch, **line})
            for alarm in health.check_rank(line):
                metrics.say(f"epoch {epoch}: {alarm}")
        return score

    def _report(self, figures: dict[str, Tensor], metrics: Metrics | None, health: Health) -> float:
        """The one place that waits for the device: figures, counters and alarms of a logging step."""
        assert self.folder is not None
        now = self.schedules(self.step - 1)
        figures = {**figures, **self.engine.grad_norms()}
        told = self.stragglers.tell()  # before this host waits for its device, so that it does not wait for the others
        packed = torch.stack([value.float() for value in figures.values()])
        self.ranks.mean_(packed)
        values = dict(zip(figures, packed.tolist(), strict=True))
        parts, slow = told()
        counters = self.engine.counters()
        skipped, in_row, last = (int(counters[k]) for k in ("skipped", "skipped_in_row", "last_skipped"))
        if metrics:
            epoch = self.step / self.steps_per_epoch
            schedule = {name: float(getattr(now, name)) for name in Now.NUMBERS}
            counts = {"skipped_steps": skipped, "bad_images": self.batches.num_bad, **self.folder.saves.figures()}
            pace = metrics.report(self.step, {**values, **parts}, epoch=epoch, **schedule, **counts)
            self.folder.tell(**pace)
            for alarm in [*health.check(values, first_epoch=epoch < 1), *slow]:
                metrics.say(f"step {self.step}: {alarm}")
            if in_row:
                metrics.say(f"step {last} was skipped: its loss or a gradient was not finite ({skipped} so far)")
        if in_row >= self.config.run.max_nonfinite:
            with self.pulse.section("the checkpoint"):
                self.folder.saves.finish()
            raise TrainingDiverged(
                f"{in_row} steps in a row up to step {last} had a loss or gradient that is not finite "
                f"(run.max_nonfinite={self.config.run.max_nonfinite}). The newest checkpoint is from before: lower "
                "optim.lr or use engine.precision=fp32"
            )
        return values["loss"]

    # ------------------------------------------------------------------------------------------------ its folder

    def _introduce(self) -> None:
        """Logs what is trained, how, and what comes first."""
        run, engine = self.config.run, self.config.engine.name
        log.info(
            "%d images, %d steps per epoch, %d steps; global batch %d = %d * %d ranks * %d",
            len(self.source), self.steps_per_epoch, self.total_steps, self.global_batch,
            run.local_batch, self.ranks.world_size, self.config.engine.accumulate,
        )  # fmt: skip
        network = self.engine.student_network
        assert isinstance(network, Network)
        log.info(
            "%s, %s on %s, %s, loss and averages by %s%s",
            f"{engine} ZeRO {zero_stage(self.config, self.ranks)}" if engine == "deepspeed" else engine,
            str(self.engine.dtype).removeprefix("torch."), self.ranks.device,
            network.backbone.implementation,
            "Triton kernels" if self.ranks.device.type == "cuda" else "plain torch",
            ", steps in CUDA graphs" * self.captures,
        )  # fmt: skip
        if self.config.run.knn_every and not self.online_knn:
            log.info("nothing tells what the features are worth: --run.knn-root FOLDER, of class folders, gives k-NN")
        if self.compiled:
            log.info("the first step compiles the network, unless run.cache holds what it needs")
        if self.step < self.total_steps:
            log.info("step %d waits for its images", self.step + 1)
        else:
            log.info("all %d steps are done; a larger run.epochs goes on from here", self.total_steps)

    def _shared(self) -> dict[str, Tensor]:
        """Live tensors that are equal on all ranks and belong into a checkpoint."""
        return {**self.method.state(), **self.engine.state()}

    @functools.cached_property
    def _meta(self) -> dict[str, Any]:
        """What a resumption has to have in common with this run."""
        images = self.source.fingerprint()
        return {"global_batch": self.global_batch, "num_images": len(self.source), "images": images}

    def _save(self, last: bool, wait: bool = False) -> None:
        """Begins a checkpoint of the present step; waits for the ``last`` of this process, which has to succeed."""
        assert self.folder is not None
        stride, meta = self.config.run.keep_every * self.steps_per_epoch, {"epoch": self.step / self.steps_per_epoch}
        for_good = range(stride, self.total_steps + 1, stride) if stride else ()
        about = checkpoint.About(self.step, self.shapes, {**self._meta, **meta}, for_good)
        fragments = self.engine.fragments if self.engine.saves else lambda copy: ()
        with self.pulse.section("the checkpoint"):
            self.folder.saves.save(about, fragments, self._shared(), last=last, wait=wait)

    def _restore(self, manifest: Manifest) -> int:
        """Loads a checkpoint; returns the step at which the run goes on."""
        assert self.folder is not None
        self.folder.check_images(manifest, self._meta)
        saved = checkpoint.load(self.folder.store, manifest, self.engine.fragments(), self.shapes)
        for name, live in self._shared().items():
            live.copy_(saved[name])
        self.engine.after_load()
        if self.ranks.is_main:
            log.info("resumed from %s", self.folder.store.name(manifest.step))
        return manifest.step
