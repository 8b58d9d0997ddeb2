"""A step in fewer launches: torch.compile of a network's regions, CUDA graphs of the whole; eager is the way out."""

import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastdino.config import Config, ConfigError
from fastdino.distributed import Ranks
from fastdino.engine import zero_stage
from fastdino.engine.schedules import Now

log = logging.getLogger(__name__)

GRAPHS = 64  # of one region's code: every mixture of shapes, gradient and reading is one, and a process may train again

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}  # folders of run.cache by who reads them
Backend = str | Callable[..., Any]  # what torch.compile takes


def compiles(config: Config, device: torch.device) -> bool:
    """What ``engine.compile`` comes to on a device. What auto cannot compile is left alone; on is tried."""
    if config.engine.compile == "auto":
        return device.type == "cuda" and config.model.attention != "xformers"
    return config.engine.compile == "on"


def keep_compiled_in(folder: Path) -> None:
    """Makes Inductor and Triton keep what they compile in ``folder``, unless the environment names another.

    Where it cannot be written, a warning says so, and they keep it where they would: no run ends for it.
    """
    for variable, name in CACHES.items():
        named = os.environ.get(variable, "")
        torchs_own = Path(named).is_relative_to(default_cache_dir())  # which it writes into the environment itself
        if named and not torchs_own:
            continue
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / name) as file:
                file.write(b"room?")
        except OSError as error:
            log.warning(
                "run.cache=%s cannot be written (%s), so the next run may have to compile again: name a folder that "
                "can be", folder, error.strerror,
            )  # fmt: skip
            return
        os.environ[variable] = str(folder / name)


def compile_regions(regions: Iterable[tuple[nn.Module, str]], backend: Backend = "inductor") -> None:
    """Has torch compile methods of modules at their first calls, backward too, each shape of their input on its own.

    Regions of equal code and shapes share one graph, so that a ViT costs one block's time. When one cannot be compiled
    they all run eagerly from there on, and one warning says why.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    torch._functorch.config.force_non_lazy_backward_lowering = True  # else it would fail where nothing can stand in
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)  # engine.precision=fp32 is exact
    compiler = _Compiler(backend)
    for module, method in regions:
        setattr(module, method, compiler.region(getattr(module, method)))


class _Compiler:
    """Regions that are compiled together or not at all."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.failed = backend, False

    def region(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=self.backend)

        def call(*args: Any) -> Any:
            if self.failed:
                return eager(*args)
            try:
                return compiled(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of dynamo, inductor, Triton, a C++ compiler: they have no type in common
                result = eager(*args)  # raises once more what is not the compiler's fault
                self.failed = True
                log.warning(
                    "engine.compile: %s cannot be compiled, so every step runs eagerly: slower, and with more memory "
                    "for activations. engine.compile=off says nothing. %s", eager.__qualname__, _first_line(error),
                )  # fmt: skip
                return result

        return call


class SideStream:
    """A context whose work on a GPU goes on beside what follows it, until :meth:`join`. Elsewhere work is in turns.

    What it makes may be used after the join and dropped at any time: its memory is used again by this context alone,
    which begins behind all that was asked of the device before. The first time nothing goes on beside it, because what
    depends on shapes alone is made then, kept, and used by others before a join.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self._first = torch.cuda.Stream(device) if device.type == "cuda" else None, True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        if self._first:
            self._first = False
            self.join()

    def join(self) -> None:
        """What follows comes after what the context has begun."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def captures(config: Config, ranks: Ranks) -> bool:
    """What ``engine.cuda_graphs`` comes to; raises ConfigError when it is asked for where a step cannot be captured."""
    if config.engine.cuda_graphs == "off":
        return False
    stage = 0 if config.engine.name == "torch" else zero_stage(config, ranks)
    remedies = []
    if ranks.device.type != "cuda":
        remedies.append("they need a GPU")
    if config.optim.name != "adamw":
        remedies.append(f"optim.name={config.optim.name} takes its rates from the host, use adamw")
    if stage:
        remedies.append(f"ZeRO {stage} decides on the host within a step, use engine.zero_stage=0 or engine.name=torch")
    if config.engine.cuda_graphs == "auto":
        return ranks.world_size == 1 and not remedies
    if remedies:
        raise ConfigError(f"engine.cuda_graphs=on: {'; '.join(remedies)}")
    return True


class StepGraphs:
    """Training steps that are captured once for each kind of step, then replayed: one launch for all of it.

    The first steps of a kind run as they are, which makes what later ones reuse. Batches and the schedules' values are
    copied to where the graphs read them.

    Args:
        step: given tensors of a batch, ``now`` and whether it is a logging step, updates state in place and returns
            figures. It may not wait for the device, nor take anything else that changes from the host.
        abandon: forgets a step that ended in the middle, so that it can be taken again.
        device: a GPU.
    """

    EAGER = 2  # steps of a kind before its capture

    def __init__(
        self,
        step: Callable[[list[Any], Now, bool], dict[str, Tensor]],
        abandon: Callable[[], None],
        device: torch.device,
    ) -> None:
        self._step, self._abandon = step, abandon
        self._values = torch.zeros(len(Now.NUMBERS), dtype=torch.float64, device=device)
        self._batches: list[Any] = []
        self._seen: Counter[tuple[bool, bool]] = Counter()
        self._graphs: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}
        self._beside = SideStream(device)
        self.failed = False

    def __call__(self, batches: list[Any], now: Now, logs: bool) -> dict[str, Tensor]:
        """Figures of one step, which the next one overwrites."""
        if self.failed:
            return self._step(batches, now, logs)
        kind, fixed = (now.freeze_last_layer, logs), self._place(batches, now)
        if self._seen[kind] < self.EAGER:
            self._seen[kind] += 1
            with self._beside():  # on the stream of the captures: what autograd keeps of a stream must be of that one
                figures = self._step(self._batches, fixed, logs)
            self._beside.join()
            return figures
        if kind not in self._graphs:
            why = ""
            try:
                self._graphs[kind] = self._capture(fixed, logs)
            except Exception as error:  # CUDA, NCCL and who else is called have their own
                why = _first_line(error)
            if why:  # here, because the error held a step's tensors, and memory may be what was short
                self.failed = True
                self._graphs.clear()
                self._abandon()
                log.warning(
                    "engine.cuda_graphs: a step cannot be captured, so each is launched kernel by kernel, as with off. "
                    "%s", why,
                )  # fmt: skip
                return self._step(batches, now, logs)
        graph, figures = self._graphs[kind]
        graph.replay()
        return figures

    def _place(self, batches: list[Any], now: Now) -> Now:
        """Copies what changes from step to step to where it stays; the schedules' values as 0-d tensors."""
        if not self._batches:
            self._batches = [batch.each(torch.clone) for batch in batches]
        for ours, theirs in zip(self._batches, batches, strict=True):
            torch._foreach_copy_(ours.tensors(), theirs.tensors())
        fixed: dict[str, Any] = dict(zip(Now.NUMBERS, self._values.unbind(), strict=True))
        for name, value in fixed.items():
            value.fill_(getattr(now, name))
        return replace(now, **fixed)

    def _capture(self, now: Now, logs: bool) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None  # they never run at once
        # Workers' threads may call CUDA meanwhile: only this thread's calls count.
        with torch.cuda.graph(graph, pool=pool, stream=self._beside.stream, capture_error_mode="thread_local"):
            return graph, self._step(self._batches, now, logs)


def _first_line(error: Exception) -> str:
    """The error's type and what it says first, if anything; of one that dynamo passes on, the error within."""
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
