"""Where the time of our training step goes: kernels by time, and how much of the step the device is busy.

``python -m bench.visit.step_profile vit_small vit_large:32`` prints it for each architecture, at the batch named there
or at that of bench.step. A step that does not fit into the device's memory is named. No file is written.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from bench.record import device_here
from bench.timing import Clock
from bench.workload import asked_config, build_trainer, random_batch
from fastdino import distributed
from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.training.flops import matmul_flops, step_flops

WARM_UP, PROFILED = 3, 2
STEPS = {"cuda": 20, "cpu": 2}
NUM_KERNELS = 25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.step_profile", description=__doc__)
    parser.add_argument("arch", nargs="+", metavar="ARCH[:BATCH]")
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    configs = [asked_config(parser, "ARCH", text, options.device) for text in options.arch]
    failed = 0
    with distributed.init(options.device.type) as ranks:
        for text, config in zip(options.arch, configs, strict=True):
            try:
                print(f"{text}\n  " + "\n  ".join(profile(config, ranks)), flush=True)
            except torch.OutOfMemoryError as error:
                print(f"{text}: {str(error).splitlines()[0]}", flush=True)
                failed += 1
            gc.collect()  # an engine and its hooks hold each other
            torch.cuda.empty_cache()
    return int(bool(failed))


def profile(config: Config, ranks: Ranks) -> list[str]:
    """Lines on where the time of a step goes."""
    on_gpu = ranks.device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, ranks, Path(folder))
        batches = [random_batch(config, ranks.device, seed) for seed in range(2)]

        def steps(number: int) -> float:
            """Mean seconds of so many steps."""
            wait()
            started = time.perf_counter()
            for i in range(number):
                trainer.train_step([batches[i % len(batches)]])
            wait()
            return (time.perf_counter() - started) / number

        steps(WARM_UP)
        seconds = steps(STEPS[ranks.device.type])
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        utilization = step_flops(config) / seconds / matmul_flops(ranks.device, dtype, Clock(ranks.device))
        images = config.run.local_batch
        lines = [f"{1e3 * seconds:.1f} ms, {images / seconds:.0f} images/s at batch {images}, MFU {utilization:.1%}"]
        if on_gpu:
            lines.append(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
            wall = steps(PROFILED)
        return lines + kernels(profiler, on_gpu, wall)


def kernels(profiler: torch.profiler.profile, on_gpu: bool, wall: float) -> list[str]:
    """Of a step that took ``wall`` seconds under the profiler; on a CPU operators stand for kernels."""
    microseconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    where = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    for event in profiler.events() or ():
        if event.device_type == where:
            microseconds[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            launches[event.name] += 1
    total = max(1e-9, microseconds.total())
    busy = f"{1e-3 * total / PROFILED:.2f} ms of kernels in {1e3 * wall:.2f} ms"
    lines = [f"{launches.total() / PROFILED:.0f} launches, {busy}"]
    for name, spent in microseconds.most_common(NUM_KERNELS):
        each = f"{1e-3 * spent / PROFILED:9.3f} ms {spent / total:6.1%} {launches[name] / PROFILED:6.1f} x"
        lines.append(f"{each}  {name[:120]}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
