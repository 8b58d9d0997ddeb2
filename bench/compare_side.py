"""One side of :mod:`bench.compare`: judges the case, says so, then times one call for every line it reads."""

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch

import fastdino_kernels
from bench.kernels.case import OURS, PLAIN, check
from bench.kernels.measure import OPERATIONS, make_work, num_inputs
from bench.step import NUM_BATCHES, build
from bench.step import check as check_step
from bench.timing import Clock, Work
from bench.workload import random_batch, step_config
from fastdino import distributed

WARMUP = 3


def main() -> int:
    device, name = torch.device(sys.argv[1]), sys.argv[2]
    assert Path.cwd() in Path(fastdino_kernels.__file__).parents, "another tree is installed over this one"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            work = _step(device, Path(folder)) if name == "step" else _kernel(name, device)
        except AssertionError as error:
            print(json.dumps({"wrong": str(error)}), flush=True)
            return 1
        clock = Clock(device)  # calibrates its pause, which wants a device that is awake
        host = 0.0
        for _ in range(WARMUP):
            host = clock.host_seconds(lambda: work.run(0))
            work.after(0)
        print(json.dumps({"wrong": None}), flush=True)
        for _ in sys.stdin:
            print(_alone(work, clock, 0.0 if name == "step" else host), flush=True)
    return 0


def _alone(work: Work, clock: Clock, host_seconds: float) -> float:
    """Seconds of one call. Whoever reads them lets the other side run, so the device must be done with this one."""
    seconds = clock(lambda: work.run(0), host_seconds)
    work.after(0)
    clock.synchronize()
    return seconds


def _kernel(name: str, device: torch.device) -> Work:
    """Ours at the operation's first shape, judged against float64; every call has other inputs."""
    case = OPERATIONS[name].cases(device, OPERATIONS[name].SHAPES[device.type][:1], False)[0]
    for other in case.variants.keys() - {OURS, PLAIN}:
        del case.variants[other]
    check(case)
    inputs = [case.make(1 + i) for i in range(num_inputs(case, device))]
    return make_work(case.variants[OURS], inputs, itertools.count())


def _step(device: torch.device, folder: Path) -> Work:
    """A training step, whose losses must be those of the public peer."""
    config = step_config("vit_small" if device.type == "cuda" else "vit_nano", device)
    ranks = distributed.init("cuda" if device.type == "cuda" else "cpu")
    batches = [random_batch(config, device, seed) for seed in range(NUM_BATCHES)]
    contenders = build(config, ranks, folder, compiled=False)
    check_step(contenders, batches, config)
    order = itertools.cycle(batches)
    return Work(lambda index: contenders[OURS].step(next(order)))


if __name__ == "__main__":
    sys.exit(main())
