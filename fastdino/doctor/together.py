"""All ranks: what they run, their clocks and GPUs, how fast they talk, and whether they notice that one dies."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from fastdino.agreement import clock_offsets, off, refuse_others, what_runs
from fastdino.config import ConfigError
from fastdino.distributed import Ranks
from fastdino.doctor.finding import Finding, failed, left_out, ok, warning
from fastdino.doctor.mortal import LIMIT
from fastdino.host import this_process
from fastdino.launch import place

SIZES = {"cuda": (1, 16, 256), "cpu": (1, 4, 16)}  # MB that are reduced
TIMES = 5  # each, after once that is not timed
SLOW = 0.5  # of the hosts' median, below which a pair of them is slow


def checks(ranks: Ranks) -> Iterator[Finding]:
    """All of this file; every rank goes through them, and rank 0's are right."""
    hosts = ranks.gather(this_process()["host"])
    names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
    counts = {host: hosts.count(host) for host in hosts}
    yield ok("hosts", ", ".join(f"{host}: {count} ranks" for host, count in counts.items()))
    yield agreement(ranks, names)
    yield clocks(ranks, names)
    yield gpus(ranks, names)
    yield bandwidth(ranks)
    yield pairs(ranks, hosts)
    yield death(ranks)


def agreement(ranks: Ranks, names: list[str]) -> Finding:
    """Whether all have the same code and versions, without which no training begins."""
    runs = ranks.gather(what_runs())
    try:
        refuse_others(names, runs)
    except ConfigError as error:
        said, _, remedy = str(error).partition(". ")
        return failed("agreement", said, remedy)
    return ok("agreement", f"all have {', '.join(f'{what} {name}' for what, name in runs[0].items())}")


def clocks(ranks: Ranks, names: list[str]) -> Finding:
    """Whether they show the same time."""
    wrong = [off(name, offset) for name, offset in zip(names, clock_offsets(ranks), strict=True) if offset]
    if wrong:
        said, _, remedy = wrong[0].partition(". ")
        return warning("clocks", said, remedy)
    return ok("clocks", "within a second of rank 0's, as far as the ranks can tell")


def gpus(ranks: Ranks, names: list[str]) -> Finding:
    """Whether each has its own."""
    device = ranks.device
    mine = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    found = ranks.gather(mine)
    if None in found:
        return left_out("GPUs", "the ranks compute on CPUs")
    for one, other in itertools.combinations(range(len(found)), 2):
        if found[one] == found[other]:
            remedy = "Start one process per GPU, and let its launcher set LOCAL_RANK or show each its own GPU"
            return failed("GPUs", f"{names[one]} and {names[other]} share the GPU {found[one]}", remedy)
    return ok("GPUs", f"{len(found)}, one for each rank")


def bandwidth(ranks: Ranks) -> Finding:
    """Of an all-reduce over all ranks, by size. 2 (W - 1) / W of it pass each rank."""
    wire = 2 * (ranks.world_size - 1) / ranks.world_size
    found = {size: wire * size / 1e3 / _seconds(ranks, size) for size in SIZES[ranks.device.type]}
    return ok("all-reduce", ", ".join(f"{size} MB at {speed:.2f} GB/s" for size, speed in found.items()))


def pairs(ranks: Ranks, hosts: list[str]) -> Finding:
    """The same between the first ranks of each two hosts, as many pairs at a time as there are."""
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(firsts) < 2:
        return left_out("host pairs", "there is one host")
    size, mine = SIZES[ranks.device.type][-1], {}
    for drawn in _rounds(firsts):
        for pair in (pair for pair in drawn if ranks.rank in pair):
            group = dist.new_group([*pair], use_local_synchronization=True)
            mine[pair] = size / 1e3 / _seconds(ranks, size, group)
            dist.destroy_process_group(group)
        ranks.barrier()
    found = {pair: speed for of in ranks.gather(mine) for pair, speed in of.items()}
    speeds = sorted(found.values())
    (one, other), slowest = min(found.items(), key=lambda item: item[1])
    median = speeds[len(speeds) // 2]
    said = f"{len(found)} at {median:.2f} GB/s in the median, {hosts[one]} and {hosts[other]} at {slowest:.2f}"
    if slowest < SLOW * median:
        return warning("host pairs", said, "See to the cables and ports of both: each is in other pairs too")
    return ok("host pairs", said)


def _rounds(firsts: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in the rounds of a tournament: nobody is in two pairs of a round."""
    players: list[int | None] = [*firsts, *([None] if len(firsts) % 2 else [])]
    for _ in range(len(players) - 1):
        half = len(players) // 2
        drawn = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in drawn if a is not None and b is not None]
        players.insert(1, players.pop())


def _seconds(ranks: Ranks, size: int, group: Any = None) -> float:
    """Of an all-reduce of ``size`` MB, the fastest of some."""
    x = torch.zeros(size * 10**6 // 4, device=ranks.device)

    def once() -> float:
        _wait(ranks)
        started = time.perf_counter()
        dist.all_reduce(x, group=group)
        _wait(ranks)
        return time.perf_counter() - started

    return min([once() for _ in range(1 + TIMES)][1:])


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def death(ranks: Ranks) -> Finding:
    """Whether ranks notice that one of them was killed: a process of each in a group, of which the last dies."""
    store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if ranks.is_main else None
    met = place(os.environ).address  # on rank 0's host
    host, port = ranks.gather((met[0] if met else "localhost", store.port if store else 0))[0]
    command = [sys.executable, "-m", "fastdino.doctor.mortal", host, str(port), str(ranks.rank), str(ranks.world_size)]
    started, env = time.monotonic(), {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        code = child.wait(timeout=180 + 2 * LIMIT)
    except subprocess.TimeoutExpired:
        child.kill()
        code = child.wait()
    codes = ranks.gather(code)
    wrong = [rank for rank, code in enumerate(codes) if code != (-9 if rank == ranks.world_size - 1 else 0)]
    if wrong:
        remedy = "Let GLOO_SOCKET_IFNAME name an interface that leads to all hosts, and let no firewall drop packets"
        said = f"ranks that did not meet, or notice that the last was killed: {', '.join(map(str, wrong))} (exit code "
        return failed("a dead rank", f"{said}{codes[wrong[0]]})", remedy)
    return ok("a dead rank", f"the others noticed at once; {time.monotonic() - started:.0f} s with their start")
