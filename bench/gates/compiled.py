"""Counts of a compiled training step, from inductor's own listing of its graphs: no GPU and no C++ compiler is needed.

Regions are compiled for a CPU, whose fused loops stand for a GPU's kernels; inductor fuses alike for both. They are
listed and not run, so that outputs are arbitrary, and code is written for no vector unit: the same on every machine.
"""

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo import guards
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import _disable_current_modes

from bench.counters import OpCounts, kernels_counted
from bench.workload import build_trainer, random_batch
from fastdino.config import Config
from fastdino.distributed import Ranks

CPU = torch.device("cpu")
WARMUP_STEPS = 2  # the first one makes buffers and caches that later ones keep
LAUNCH = re.compile(
    r"^ +(?:\w+ = )?(cpp_fused\w+?|extern_kernels\.\w+|torch\.ops\.(?!fastdino)[\w.]+?)(?:_\d+)?\(", re.M
)


def count_compiled(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The counters of one step as on a GPU of a ``config`` whose engine.compile is on, after warm-up.

    ``recompilations``: regions that are compiled in a later step too. ``fallbacks``: regions that run eagerly after
    all. ``graph_kernels``: what compiled graphs launch, by the name of the fused loop or of the library's function.
    ``aten_calls``: those outside of graphs; of our own operators the ``triton_launches`` count, in graphs and outside.
    """
    batch = random_batch(config, CPU, 0)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        kernels = stack.enter_context(kernels_counted())
        fallbacks = stack.enter_context(_fallbacks_named())
        listed = stack.enter_context(_graphs_listed())
        trainer = build_trainer(config, ranks, Path(folder))
        for _ in range(WARMUP_STEPS):
            trainer.train_step([batch])
        kernels.clear()
        listed.clear()
        with _recompilations_named() as recompilations:
            trainer.train_step([batch])
        figures = {
            "host_syncs": {},
            "collectives": {},
            "triton_launches": dict(sorted(kernels.items())),
            "aten_calls": {},
            "graph_kernels": dict(sorted(listed.items())),
            "recompilations": dict(sorted(recompilations.items())),
            "fallbacks": dict(sorted(fallbacks.items())),
        }
        if not recompilations:  # nothing can be compiled while operations are counted
            with OpCounts() as counts:
                trainer.train_step([batch])
            found = {"host_syncs": counts.syncs, "collectives": counts.collectives, "aten_calls": counts.calls}
            figures |= {name: dict(sorted(counter.items())) for name, counter in found.items()}
    torch._dynamo.reset()
    return figures


@contextmanager
def _graphs_listed() -> Iterator[Counter[str]]:
    """Within it a graph's kernels are counted by name at every call of it; fused loops do not run."""
    counted: Counter[str] = Counter()
    run, compile_ = CompiledFxGraph.__call__, torch.compile

    def listed(graph: CompiledFxGraph, inputs: Any) -> Any:
        counted.update(LAUNCH.findall(graph.source_code))
        with _disable_current_modes():
            return run(graph, inputs)

    def uncounted(eager: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = compile_(eager, **options)

        def call(*args: Any) -> Any:
            with _disable_current_modes():
                return compiled(*args)

        return call

    with (
        mock.patch.object(CompiledFxGraph, "__call__", listed),
        mock.patch.object(torch, "compile", uncounted),
        mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=lambda *args: None),
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", list),
        torch._inductor.config.patch({"cpp.threads": 1, "fx_graph_cache": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        torch._dynamo.reset()
        yield counted


@contextmanager
def _recompilations_named() -> Iterator[Counter[str]]:
    """Compilations by function and file, as torch's log of recompilations tells them, or only their number."""
    seen: Counter[str] = Counter()
    stats = torch._dynamo.utils.counters["stats"]
    before, level = stats["unique_graphs"], guards.recompiles_log.level
    handler = logging.Handler()
    handler.emit = lambda record: seen.update(re.findall(r"Recompiling function (\w+ in \S+):", record.getMessage()))  # type: ignore[method-assign]
    guards.recompiles_log.addHandler(handler)
    guards.recompiles_log.setLevel(logging.DEBUG)
    try:
        with (
            mock.patch.object(guards, "is_recompiles_enabled", return_value=True),
            mock.patch.object(guards.recompiles_log, "propagate", False),
        ):
            yield seen
    finally:
        guards.recompiles_log.removeHandler(handler)
        guards.recompiles_log.setLevel(level)
        if more := stats["unique_graphs"] - before - seen.total():
            seen["others"] += more


@contextmanager
def _fallbacks_named() -> Iterator[Counter[str]]:
    """Regions of which the product says that they run eagerly."""
    seen: Counter[str] = Counter()
    product, handler = logging.getLogger("fastdino"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.update(re.findall(r"^engine\.compile: (\S+) cannot", record.getMessage()))  # type: ignore[method-assign]
    product.addHandler(handler)
    try:
        yield seen
    finally:
        product.removeHandler(handler)
