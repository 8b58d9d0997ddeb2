"""Who else is told what metrics.jsonl says: Prometheus, node_exporter and Weights & Biases."""

import json
import logging
import os
import uuid
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from fastdino.config import Config, ConfigError
from fastdino.distributed import Ranks

PATIENCE = 30.0  # seconds for Weights & Biases' server to answer, at the first line and at the end

log = logging.getLogger(__name__)


class Monitors:
    """Tells numbers to whom the settings name, and writes ``metrics.prom``. A context manager; rank 0 does the work.

    Entering raises ConfigError, on every rank, for a package that is not installed and a port that cannot be had. From
    then on nothing ends the run: a disk, a server or a network that fails is warned of once.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks, self._folder = config, ranks, config.run.dir
        self._values: dict[str, float] = {}
        self._gauges: dict[str, Any] = {}
        self._server: Any = None
        self._registry: Any = None
        self._wandb: ModuleType | None = None
        self._run: Any = None
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        self._ranks.on_main(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        if self._run:
            self._try("Weights & Biases", lambda: self._run.finish(exit_code=int(kind is not None)))

    def write(self, step: int, values: dict[str, float | int | str]) -> None:
        """Tells the numbers among ``values``; each is told on until there is a newer one of its name."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        self._values |= {"step": float(step), **numbers}
        self._try("metrics.prom", self._write_file)
        for name, value in self._values.items() if self._server else ():
            self._gauge(name).set(value)
        if self._wandb:
            self._try("Weights & Biases", lambda: self._log({"step": step, **numbers}))

    def _open(self) -> None:
        run = self._config.run
        if run.wandb:
            try:
                import wandb
            except ImportError as error:
                raise _not_installed("run.wandb", run.wandb, "wandb", error) from error
            self._wandb = wandb
        if run.prometheus:
            try:
                from prometheus_client import CollectorRegistry, start_http_server
            except ImportError as error:
                raise _not_installed("run.prometheus", run.prometheus, "prometheus-client", error) from error
            self._registry = CollectorRegistry()
            try:
                self._server, _ = start_http_server(run.prometheus, registry=self._registry)
            except OSError as error:
                raise ConfigError(
                    f"run.prometheus={run.prometheus} cannot be listened at ({error.strerror}): another run or program "
                    "may have the port, and those below 1024 are not for everybody. Take another, or 0 for none"
                ) from error

    def _gauge(self, name: str) -> Any:
        from prometheus_client import Gauge

        if name not in self._gauges:
            gauge = Gauge(f"fastdino_{name}", "see docs/monitoring.md", ["run"], registry=self._registry)
            self._gauges[name] = gauge.labels(str(self._folder))
        return self._gauges[name]

    def _write_file(self) -> None:
        """For node_exporter's textfile collector, which finds a whole file."""
        run = str(self._folder).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines = [f'# TYPE fastdino_{n} gauge\nfastdino_{n}{{run="{run}"}} {v!r}\n' for n, v in self._values.items()]
        temporary = self._folder / ".metrics.prom"
        try:
            temporary.write_text("".join(lines))
            os.replace(temporary, self._folder / "metrics.prom")
        finally:
            temporary.unlink(missing_ok=True)

    def _log(self, values: dict[str, float]) -> None:
        assert self._wandb is not None
        if self._run is None:  # begun by the first line, when the folder is known to be a run's
            settings = self._wandb.Settings(
                init_timeout=PATIENCE, login_timeout=PATIENCE, finish_timeout=PATIENCE, console="off", silent=True
            )
            self._run = self._wandb.init(
                project=self._config.run.wandb, id=_kept_id(self._folder / "wandb.id"), resume="allow",
                name=self._folder.name, dir=str(self._folder), config=json.loads(self._config.to_json()),
                settings=settings,
            )  # fmt: skip
            # Steps between a checkpoint and a kill are told twice, which W&B's own count would not take.
            self._run.define_metric("*", step_metric="step")
        self._run.log(values)

    def _try(self, what: str, work: Any) -> None:
        try:
            work()
        except Exception as error:  # of W&B's, its service's, of a network, a disk
            if what == "Weights & Biases":
                self._wandb = self._run = None
            if what not in self._warned:
                self._warned.add(what)
                reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
                log.warning("%s cannot be told (%s): training goes on without", what, reason.splitlines()[0])


def _kept_id(path: Path) -> str:
    """The W&B run that this run folder belongs to: a resumption goes on in it."""
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:8]
        path.write_text(known)
    return known


def _not_installed(setting: str, value: object, package: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{setting}={value} needs the package {package}, and {error}: pip install 'fastdino[monitoring]', or leave the "
        "setting out"
    )
