"""The loop: images in, a better teacher out. One step is :meth:`Trainer.train_step`; read that first."""

import functools
import logging
import os
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
from fastdino.config import Config, UserError
from fastdino.data import Batch, normalize, open_source, train_batches
from fastdino.distributed import Ranks
from fastdino.engine import build_engine, graphs, zero_stage
from fastdino.engine.schedules import Now, Schedules
from fastdino.eval import OnlineKnn, knn_root
from fastdino.method.dino import Dino
from fastdino.method.health import Health
from fastdino.method.targets import build_targets
from fastdino.model import Network, outline, start_of
from fastdino.model.weights import settled
from fastdino.training import checkpoint
from fastdino.training.checkpoint import Manifest
from fastdino.training.flops import Meter
from fastdino.training.metrics import Metrics
from fastdino.training.preemption import Interrupted, Preempted, PreemptionNotice
from fastdino.training.run_folder import RunFolder, read_config
from fastdino.training.watchdog import FOREVER, SLOW, Pulse, Watchdog

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
        config = ranks.on_main(lambda: _settled(config))
        with RunFolder(config, ranks) as folder:
            watchdog.last_words = folder.end
            for line in config.ignored() if ranks.is_main else ():
                log.warning(line)
            return Trainer(config, ranks, folder, watchdog.pulse).run()


def _settled(config: Config) -> Config:
    """``config`` with the form of model.weights: from the run that is resumed, whose file may be gone, or that file."""
    before = read_config(config.run.dir) if os.path.exists(config.run.dir / "config.json") else None
    if before is None or before.model.weights is None:
        return settled(config)
    model = config.model
    decided = {name: getattr(before.model, name) for name in ("layer_scale", "pos_embed", "interpolation")}
    for name in ("weights", "registers", "image_size"):
        asked = getattr(model, name)
        decided[name] = getattr(before.model, name) if asked is None else asked
    return replace(config, model=replace(model, **decided))


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
        self.online_knn: OnlineKnn | None = None  # on rank 0, where one was asked for
        if folder:
            ranks.on_main(self._open_knn)  # what is wrong with its images is said now, not in hours
        newest = folder.newest() if folder else None
        student, teacher = (outline(config, teacher) for teacher in (False, True))
        # A checkpoint holds all weights: those that the run started from may be gone.
        values = None if newest else start_of(config, student)
        self.shapes = {name: list(p.shape) for name, p in student.named_parameters()}
        self.engine = build_engine(config, student, teacher, ranks, values)
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
        self.step = self._restore(*newest) if newest else 0
        self.batches = train_batches(
            config, self.source, rank=ranks.rank, world_size=ranks.world_size, start_step=self.step, device=ranks.device
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.total_steps = self.steps_per_epoch * config.run.epochs
        self.schedules = Schedules(config, self.steps_per_epoch, self.global_batch)
        if folder and newest:
            folder.check_length(newest[0], self.step, self.steps_per_epoch, self.global_batch)

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One update of student, teacher and the method's state.

        Returns figures of this rank that stay on the device: ``loss``, and on logging steps its parts as ``loss_NAME``
        and the method's statistics.

        Args:
            batches: engine.accumulate micro batches. Nothing in here waits for the device.
        """
        self._seed_step()
        figures = self._take(batches, self.schedules(self.step), self._logs(self.step + 1))
        self.step += 1
        return figures

    def _update(self, batches: list[Batch], now: Now, logs: bool) -> dict[str, Tensor]:
        """The step itself, whose work is the same at every step but for ``now``: it may be captured."""
        figures: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.ranks.device))
        for batch in batches:
            loss, parts = self.method.loss(self._normalized(batch), now)
            self.engine.backward(loss)
            figures["loss"] += loss.detach() / len(batches)
            for name, part in parts.items() if logs else ():
                figures[f"loss_{name}"] += part / len(batches)
        if logs:
            figures.update(self.method.statistics())
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

    def run(self) -> Result:
        """Trains to the end; checkpoints, logs and evaluates on the way."""
        assert self.folder is not None, "a run needs a folder"
        self.folder.write_config()
        self.folder.begin(self.step, self.total_steps)
        metrics = None
        if self.ranks.is_main:
            self._introduce()
            place, meter = self.folder.path, Meter.of(self.config, self.ranks)
            steps = self.step, self.total_steps
            metrics = Metrics(place, *steps, self.global_batch, self.waits_for_compilers, meter)
        head = self.config.head
        health = Health(head.num_prototypes, (self.config.patch_head or head).num_prototypes)
        loss, knn = self.ranks.gather(metrics and (metrics.last.get("loss", float("nan")), metrics.last.get("knn")))[0]
        noticed = self.ranks.ask(False)  # whether any rank was given notice, a step ago
        try:
            with PreemptionNotice() as notice:
                while self.step < self.total_steps:
                    figures = self._timed_step(metrics, notice)
                    if self._logs(self.step):
                        loss = self._report(figures, metrics, health)
                    # Asked at every step, because a launcher that was told to stop kills soon (torchrun after 30
                    # seconds); what is answered was asked a step before, so that no host waits.
                    if noticed() and self.step < self.total_steps:
                        self._preempt()
                    knn = self._end_of_epoch(metrics, knn, notice)
                    noticed = self.ranks.ask(notice.given)
                noticed()  # nothing may be on its way when this rank leaves the others
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
            with self.pulse.section("the k-NN", SLOW if self.ranks.is_main else FOREVER):  # rank 0 has a beat a batch
                knn = self._knn(metrics, epoch, knn, notice)
        if metrics and (rest == 0 or by_step or metrics.compiled(self.step)):
            metrics.restart_clock(self.step)
        return knn

    def _report(self, figures: dict[str, Tensor], metrics: Metrics | None, health: Health) -> float:
        """The one place that waits for the device: figures, counters and alarms of a logging step."""
        now = self.schedules(self.step - 1)
        packed = torch.stack([value.float() for value in figures.values()])
        self.ranks.mean_(packed)
        values = dict(zip(figures, packed.tolist(), strict=True))
        counters = self.engine.counters()
        skipped, in_row, last = (int(counters[k]) for k in ("skipped", "skipped_in_row", "last_skipped"))
        if metrics:
            epoch = self.step / self.steps_per_epoch
            schedule = {name: float(getattr(now, name)) for name in Now.NUMBERS}
            more = {"grad_norm": float(self.engine.grad_norm)}
            failed = self.folder.failed_saves if self.folder else 0
            counts = {"skipped_steps": skipped, "bad_images": self.batches.num_bad, "failed_saves": failed}
            pace = metrics.report(self.step, values, epoch=epoch, **schedule, **more, **counts)
            if self.folder:
                self.folder.tell(**pace)
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
        """Weighted k-NN of the teacher on rank 0, while the others wait. One that fails is an alarm, not the end."""
        teacher = self.engine.whole_teacher() if knn_root(self.config) else None
        if self.online_knn and metrics and teacher is not None:
            backbone = teacher.backbone
            assert isinstance(backbone, nn.Module)
            beats = backbone.register_forward_hook(lambda *_: self.pulse.beat())
            try:
                with notice.interruptible(grace=0), torch.compiler.set_stance("force_eager"):  # other shapes
                    score = self.online_knn(backbone)
            except Interrupted:
                metrics.say(f"epoch {epoch}: a signal ended the k-NN")
            except Exception as error:  # files that are gone, a worker that died, memory: none of it concerns the step
                metrics.say(f"epoch {epoch}: the k-NN failed, training goes on: {type(error).__name__}: {error}")
            else:
                before = score["knn"]
                metrics.write(self.step, {"epoch": epoch, **score})
                metrics.say(f"epoch {epoch}: k-NN of the teacher {before:.1f} %")
            finally:
                beats.remove()
        self.ranks.barrier()
        return before

    def _open_knn(self) -> None:
        if root := knn_root(self.config):
            size, batch = self.config.views.global_size, self.config.run.local_batch
            self.online_knn = OnlineKnn(root, self.config.data, size=size, batch=batch)

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

    def _save(self, last: bool) -> None:
        """Writes a checkpoint of the present step; the ``last`` one of this process has to succeed."""
        assert self.folder is not None
        stride = self.config.run.keep_every * self.steps_per_epoch
        with self.pulse.section("the checkpoint"):
            self.folder.save(
                self.step,
                fragments=self.engine.fragments() if self.engine.saves else (),
                shared=self._shared(),
                shapes=self.shapes,
                meta={**self._meta, "epoch": self.step / self.steps_per_epoch},
                keep_for_good=range(stride, self.total_steps + 1, stride) if stride else (),
                last=last,
            )

    def _restore(self, path: Path, manifest: Manifest) -> int:
        """Loads a checkpoint; returns the step at which the run goes on."""
        assert self.folder is not None
        self.folder.check_images(path, manifest, self._meta)
        saved = checkpoint.load(path, manifest, self.engine.fragments(), self.shapes)
        for name, live in self._shared().items():
            live.copy_(saved[name])
        self.engine.after_load()
        if self.ranks.is_main:
            log.info("resumed from %s", path)
        return manifest.step
