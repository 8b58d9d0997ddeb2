"""Which rank is slow: the parts of its steps on each rank, timed without waiting, compared at logging steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastdino.distributed import Ranks
from fastdino.host import this_process
from fastdino.training.monitoring.nvml import Gpu, reasons

PARTS = ("data", "host", "teacher", "student", "backward", "update")
NOTABLE = 1.15  # times the median from which on a rank is slow
SHARE = 0.15  # of a step that a rank has to wait for images longer than the median
PERSISTENT = 3  # logging steps in a row: one is noise
KEPT = 256  # newest ranges of a part whose times are still to be read

clock = time.perf_counter


class Stragglers:
    """Times this rank's steps by part, and says on rank 0 which rank is slower than the others, and at what.

    On a GPU a part lies between two events, which are read at a logging step if they have passed; on a CPU between two
    looks at the clock. Every rank makes one and calls the same methods.

    What is compared does not wait for other ranks: images, and forward passes unless they have collectives, as under
    ZeRO 3 and with batch normalisation over all ranks. Backward pass and update end with collectives, so they are
    equally long on all ranks. Of GPUs that NVML knows, the clocks are compared too.

    Args:
        ranks: of the run.
        networks: teacher and student, as they are called.
        gathers: ZeRO 3 gathers weights in a forward pass.
        captured: steps are CUDA graphs, in which no event can be timed: there are ``data`` and ``host`` alone.
    """

    def __init__(self, ranks: Ranks, networks: dict[str, nn.Module], gathers: bool, captured: bool) -> None:
        self._ranks, self._captured = ranks, captured
        modules = [module for network in networks.values() for module in network.modules()]
        self._together = gathers or any(isinstance(module, nn.SyncBatchNorm) for module in modules)
        self._gpu = Gpu(ranks.device)
        self._hosts = ranks.gather(this_process()["host"])
        self._open: dict[str, Any] = {}
        self._done: dict[str, deque[tuple[Any, Any]]] = {part: deque(maxlen=KEPT) for part in PARTS[2:]}
        self._steps, self._passed = 0, dict.fromkeys(("data", "host"), 0.0)
        self._since = clock()
        self._in_a_row: dict[tuple[str, int], int] = {}
        for part, network in networks.items() if not captured else ():
            network.register_forward_pre_hook(lambda *_, part=part: self._start(part))
            network.register_forward_hook(lambda *_, part=part: self._stop(part))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The range of a part in a step."""
        if self._captured:
            yield
            return
        self._start(part)
        yield
        self._stop(part)

    def step(self, data: float, host: float) -> None:
        """A step is over, on the host: seconds that it waited for images, and that it took to ask for all else."""
        self._steps += 1
        self._passed["data"] += data
        self._passed["host"] += host

    def tell(self) -> Callable[[], tuple[dict[str, float], list[str]]]:
        """Tells the other ranks this one's times since the last call, and begins anew. Every rank calls it.

        What it returns waits for the others' hosts, which have all come here once their devices are waited for. On
        every rank it returns figures by name: the ranks' median of ``seconds_PART``, of a step (data, host, update) or
        of a micro batch; of two ranks or more ``slowest_rank`` with ``slowest_forward``, times the median. And what is
        worth saying, in lines.
        """
        now = clock()
        of_step = {**{part: total / max(self._steps, 1) for part, total in self._passed.items()}, **self._read()}
        wall = (now - self._since) / max(self._steps, 1)
        clocks = self._gpu.clocks() or (0, 0)
        told = self._ranks.share([*(of_step[part] for part in PARTS), wall, clocks[0], self._gpu.slowed_by()])
        self._steps, self._passed, self._since = 0, dict.fromkeys(self._passed, 0.0), now
        return lambda: self._compare(told())

    def _start(self, part: str) -> None:
        self._open[part] = self._mark()

    def _stop(self, part: str) -> None:
        self._done[part].append((self._open.pop(part), self._mark()))

    def _mark(self) -> Any:
        if self._ranks.device.type != "cuda":
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # in the stream at hand: the teacher's may be another
        return event

    def _read(self) -> dict[str, float]:
        """Seconds by part, a mean of the ranges that have passed. Those of a GPU that have not are read next time."""
        found = {}
        for part, ranges in self._done.items():
            times = []
            while ranges and (isinstance(ranges[0][1], float) or ranges[0][1].query()):
                start, stop = ranges.popleft()
                times.append(stop - start if isinstance(stop, float) else start.elapsed_time(stop) / 1e3)
            found[part] = statistics.fmean(times) if times else 0.0
        return found

    def _compare(self, told: list[list[float]]) -> tuple[dict[str, float], list[str]]:
        parts = {part: [numbers[i] for numbers in told] for i, part in enumerate(PARTS)}
        wall, clocks, slowed = ([numbers[len(PARTS) + i] for numbers in told] for i in range(3))
        figures = {f"seconds_{part}": statistics.median(times) for part, times in parts.items() if any(times)}
        found: dict[tuple[str, int], str] = {}
        rank, median = _worst(parts["data"])
        if parts["data"][rank] - median > SHARE * wall[rank]:
            waits = f"waits {parts['data'][rank]:.3g} s a step for images, the median {median:.3g} s"
            found["data", rank] = waits
        forward = [sum(times) for times in zip(parts["teacher"], parts["student"], strict=True)]
        rank, median = _worst(forward)
        if median and not self._together and len(told) > 1:
            ratio = forward[rank] / median
            figures |= {"slowest_rank": rank, "slowest_forward": ratio}
            if ratio > NOTABLE:
                found["forward", rank] = f"forward {ratio:.2f} x median"
        rank, low = min(enumerate(clocks), key=lambda pair: pair[1])
        median = statistics.median_high(clocks)
        if low and median / low > NOTABLE:
            why = reasons(int(slowed[rank]))
            found["clock", rank] = f"its GPU at {low:.0f} MHz, the median at {median:.0f}{why and f' ({why})'}"
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in found}
        said = [key for key, times in self._in_a_row.items() if times == PERSISTENT]
        return figures, [f"slowest rank {rank} ({self._hosts[rank]}): {found[part, rank]}" for part, rank in said]


def _worst(times: list[float]) -> tuple[int, float]:
    """The rank that takes longest, and the median; of two ranks the other one's."""
    return max(range(len(times)), key=times.__getitem__), statistics.median_low(times)
