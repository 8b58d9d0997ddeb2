"""A group whose last rank kills itself: ``python -m fastdino.doctor.mortal HOST PORT RANK WORLD_SIZE``.

The others end with 0 when they are told by a broken connection; else a limit ends them.
"""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 30  # seconds in which a death has to be noticed


def main(host: str, port: int, rank: int, world_size: int) -> int:
    """0 when the death of another rank was noticed."""
    store = dist.TCPStore(host, port, timeout=timedelta(minutes=2), wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=LIMIT))
    dist.barrier()
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return 3 if "timed out" in str(error).lower() else 0
    return 4


if __name__ == "__main__":
    code = main(sys.argv[1], *map(int, sys.argv[2:]))
    os._exit(code)  # a group that is broken is not left
