"""The run folder: which run it holds, whether the run at hand may go on in it, and who writes there."""

import dataclasses
import fcntl
import functools
import json
import logging
import os
import socket
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from fastdino.config import Config, ConfigError, RunConfig, UserError, group_kinds
from fastdino.distributed import Ranks
from fastdino.engine.schedules import Schedules
from fastdino.host import may_live, this_process
from fastdino.model.weights import settled
from fastdino.status import Status
from fastdino.training import checkpoint
from fastdino.training.checkpoint import Manifest, Saves

log = logging.getLogger(__name__)

T = TypeVar("T")

# What may change between a run and its resumption: none of it changes what is computed, but for rounding; masks,
# Sinkhorn and KoLeo look at a micro batch, however. Images are known by their names and count, and the weights that a
# run started from are not read again. A longer run has other schedules, which RunFolder.check_length says.
MAY_CHANGE = {
    "engine.name", "engine.zero_stage", "engine.deepspeed", "engine.accumulate", "engine.device", "engine.compile",
    "engine.cuda_graphs", "engine.teacher_stream", "engine.checkpointing", "model.attention", "model.packed",
    "model.weights", "head.weights", "patch_head.weights", "data.root", "data.cache", "data.cache_gb",
    "data.label_column", "data.views", "data.num_workers", "data.max_bad", "data.eval_crop", "run.dir", "run.cache",
    "run.epochs", "run.local_batch", "run.save_every", "run.save_every_steps", "run.keep", "run.keep_every",
    "run.log_every", "run.knn_every", "run.knn_root", "run.max_nonfinite", "run.hang_after",
    "run.prometheus", "run.wandb", "run.checkpoints",
}  # fmt: skip


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name; None for those of a head that there is not."""
    groups = {name: getattr(config, name) for name in group_kinds()}
    settings = [(name, field.name) for name, kind in group_kinds().items() for field in dataclasses.fields(kind)]
    return {f"{group}.{name}": getattr(groups[group], name, None) for group, name in settings}


def read_config(folder: Path) -> Config:
    """The config of a run. Raises ConfigError when the folder holds none."""
    path = folder / "config.json"
    try:
        return Config.from_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is not a run folder: it has no config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}") from error


def settled_config(config: Config) -> Config:
    """``config`` with the form of model.weights: from the run that is resumed, whose file may be gone, or that file."""
    before = read_config(config.run.dir) if os.path.exists(config.run.dir / "config.json") else None
    if before is None or before.model.weights is None:
        return settled(config)
    model = config.model
    decided = {name: getattr(before.model, name) for name in ("layer_scale", "pos_embed", "interpolation")}
    for name in ("weights", "registers", "image_size"):
        asked = getattr(model, name)
        decided[name] = getattr(before.model, name) if asked is None else asked
    return dataclasses.replace(config, model=dataclasses.replace(model, **decided))


class RunFolder:
    """A run's folder, for as long as this run is its one writer: a context manager that every rank enters.

    Entering makes the folder, refuses one of another run, and locks it; leaving lets it go, and removes it again if
    nothing was written. Rank 0 does the work; what it finds wrong is raised on every rank.

    Raises ConfigError when the folder holds another run, files that are no run's, or cannot be written, and when
    another process is training in it.

    Attributes:
        store: where its checkpoints are.
        saves: writes them.
        config_before: the config of the run when it was last started; None on other ranks than 0 and for a new run.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.path, self.store = config.run.dir, checkpoint.at(config.run.checkpoints, config.run.dir)
        self.saves = Saves(self.store, ranks, config.run.keep, lambda step: self.tell(checkpoint=step))
        self.config_before: Config | None = None
        self._lock = Lock(self.path / ".lock")
        self._made: list[Path] = []
        self._status: Status | None = None  # of rank 0, once the run has begun

    def __enter__(self) -> "RunFolder":
        try:
            self.ranks.on_main(self._take)
            if self.config.run.checkpoints != RunConfig.checkpoints:
                self._try_store()
        except UserError:
            self._let_go()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.saves.leave()
        if self._status:
            self._status.__exit__(kind, error, trace)
        self._let_go()

    def _let_go(self) -> None:
        self._lock.release()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # it holds something, and so do those above it
                break

    def write_config(self) -> None:
        """Writes config.json; not before everything else has been found in order, for it claims the folder."""
        self.ranks.on_main(self._write_config)

    def begin(self, step: int, steps: int) -> None:
        """Begins the run's status.json, which is kept until the folder is left; rank 0's."""
        if self.ranks.is_main:
            self._status = Status(self.path, step, steps, self.ranks.world_size).__enter__()
            self._status.tell(checkpoint=self.saves.newest_step)

    def tell(self, **values: Any) -> None:
        """What is new for the status; nothing waits for the disk."""
        if self._status:
            self._status.tell(**values)

    def end(self, code: int, reason: str) -> None:
        """Writes into the status how the run ends, where it will not get to leaving the folder."""
        if self._status:
            self._status.end(code, reason)

    def newest(self) -> Manifest | None:
        """Of the newest whole checkpoint; see :func:`fastdino.training.checkpoint.newest`."""
        found = checkpoint.newest(self.store, self.ranks)
        if found is None:
            self.ranks.on_main(self._check_moved)
        self.saves.newest_step = found.step if found else None
        return found

    def check_images(self, manifest: Manifest, meta: dict[str, Any]) -> None:
        """Raises ConfigError when a checkpoint was written for another global batch or other images.

        Args:
            meta: what this run would write into a checkpoint. What an older checkpoint lacks is not compared.
        """
        name, was = self.store.name(manifest.step), manifest.meta
        for fact in ("global_batch", "num_images"):
            if was[fact] != meta[fact]:
                raise ConfigError(
                    f"{name} was written with {fact} {was[fact]}, now it is {meta[fact]}: the run would not go on "
                    "as it began. Keep local batch * ranks * engine.accumulate, and the images, as they were"
                )
        if was.get("images", meta.get("images")) != meta.get("images"):
            raise ConfigError(
                f"{name} was written for other images: data.root={self.config.data.root!r} holds as many, but under "
                "other names. Point data.root at the images that the run began with, or give this run its own folder"
            )

    def check_length(self, step: int, steps_per_epoch: int, global_batch: int) -> None:
        """A run may be made longer, which bends its cosines; not shorter than its checkpoint of ``step``."""
        epochs = self.config.run.epochs
        total = epochs * steps_per_epoch
        if step > total:
            raise ConfigError(
                f"run.epochs={epochs} ends at step {total}, but {self.store.name(step)} is of step {step}: let the run "
                "be at least as long as it already is"
            )
        before = self.config_before  # known to rank 0, which says it
        if before and before.run.epochs != epochs and before.optim.schedule != "constant":
            was, now = (Schedules(c, steps_per_epoch, global_batch)(step).lr for c in (before, self.config))
            log.warning(
                "run.epochs was %d and is %d: every schedule is that of the new length from here on. At step %d the "
                "learning rate jumps from %.3g to %.3g; the result is not that of a run of %d epochs from its start",
                before.run.epochs, epochs, step, was, now, epochs,
            )  # fmt: skip

    def _take(self) -> None:
        """Checks the folder, locks it, and checks again what may have changed until it was locked."""
        self._check()
        try:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            holder = self._lock.acquire()
        except OSError as error:
            raise self._cannot_write(error) from error
        if holder:
            raise ConfigError(
                f"run.dir={str(self.path)!r} is in use: {holder} is training in it. Wait for it or stop it, or give "
                "this run its own folder with --run.dir"
            )
        self._check()
        (self.path / ".config.json").unlink(missing_ok=True)
        self.store.clear()

    def _check(self) -> None:
        """Raises ConfigError when the folder holds another config, or files that are no run's."""
        folder = self.path
        try:
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"run.dir={str(folder)!r} is a file: choose a folder")
            # a name with a dot is a desktop's or a file system's note, a lock, or what a killed process left
            strangers = folder.is_dir() and [name for name in os.listdir(folder) if not name.startswith(".")]
        except OSError as error:
            raise self._cannot_write(error) from error
        if (folder / "config.json").exists():
            self.config_before = read_config(folder)
            theirs, ours = flatten(self.config_before), flatten(self.config)
            differ = [name for name in ours if name not in MAY_CHANGE and ours[name] != theirs[name]]
            if differ:
                listed = "; ".join(f"{name} is {theirs[name]!r} there, {ours[name]!r} here" for name in differ)
                raise ConfigError(
                    f"run.dir={str(folder)!r} holds another run ({listed}): give this one its own folder with "
                    "--run.dir, or run with the settings of the first to resume it"
                )
        elif strangers:
            raise ConfigError(f"run.dir={str(folder)!r} has files but no config.json: choose an empty or a new folder")

    def _check_moved(self) -> None:
        """Raises ConfigError when checkpoints are to go elsewhere, and those that there are have not gone with them."""
        now, before = self.config.run.checkpoints, self.config_before
        if before is None or before.run.checkpoints == now:
            return
        was = before.run.checkpoints
        if checkpoint.at(was, self.path).steps():
            raise ConfigError(
                f"run.checkpoints was {was!r} and is {now!r}, where there is no checkpoint: the run would begin anew. "
                "Copy what is there, or leave the setting as it was"
            )

    def _write_config(self) -> None:
        if self.config == self.config_before:
            return
        temporary = self.path / ".config.json"
        try:
            temporary.write_text(self.config.to_json() + "\n")
            os.replace(temporary, self.path / "config.json")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._cannot_write(error) from error

    def _try_store(self) -> None:
        """Raises ConfigError when checkpoints cannot be written where they are to be, or a rank does not see them."""
        place = f"run.checkpoints={self.config.run.checkpoints!r}"

        def attempt(work: Callable[[str], T]) -> T:
            try:
                return work(name)
            except OSError as error:
                raise ConfigError(
                    f"{place} cannot be written: {_reason(error)}. Check the address, the network and your access to "
                    "it, or leave out --run.checkpoints"
                ) from error

        name = self.ranks.gather(f".fastdino-{uuid.uuid4().hex[:8]}")[0]
        self.ranks.on_main(lambda: attempt(self.store.mark))
        seen = self.ranks.gather((self.store.marked(name), socket.gethostname()))
        self.ranks.on_main(lambda: attempt(self.store.unmark))
        blind = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
        if blind:
            raise ConfigError(
                f"{place} is not one place for all ranks: {blind[0]} does not see what rank 0 wrote there. Give a "
                "store or a folder that all hosts share"
            )

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"run.dir={str(self.path)!r} cannot be written: {_reason(error)}. Choose another folder with --run.dir, or "
            "make room and rights there"
        )


class Lock:
    """A lock file that says which process holds it. It is gone with the process, however that ends.

    flock is the lock, also over NFS; the text in the file is for a person. Where a file system has no flock, the file
    itself is the lock: that of a dead process of this host is taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> str | None:
        """Takes the lock; or returns who holds it. Raises OSError when the file cannot be made."""
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    return _describe(_holder(file, patience=1.0))
            except OSError:  # this file system has no flock
                if (holder := _holder(file)) and may_live(holder):
                    file.close()
                    return f"{_describe(holder)} (if it is gone, remove {self.path})"
            if self._is_there(file):
                break
            file.close()  # its holder removed it between our opening and locking it
        try:
            file.truncate(0)
            file.write(json.dumps(_ourselves()).encode())
        except OSError:  # a full disk: the lock holds, and only its holder's name is missing
            pass
        self._file = file
        os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(file)))
        return None

    def release(self) -> None:
        """Lets the lock go, if it is held."""
        if self._file is not None:
            if self._is_there(self._file):
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _is_there(self, file: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except OSError:
            return False


def _close(file: "weakref.ref[IO[bytes]]") -> None:
    """In a forked process: flock passes to it, and a worker that outlives the run must not hold the lock on."""
    if opened := file():
        opened.close()


def _ourselves() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {**this_process(), "since": since}


def _holder(file: IO[bytes], patience: float = 0.0) -> dict[str, Any]:
    """What the holder of a lock file wrote into it; empty when it has not within ``patience`` seconds, or could not."""
    end = time.monotonic() + patience
    while True:
        try:
            file.seek(0)
            found = json.loads(file.read())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            if time.monotonic() >= end:
                return {}
        time.sleep(0.05)


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on host {holder.get('host')}, since {holder.get('since')},"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
