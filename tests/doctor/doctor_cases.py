"""What test_doctor.py judges: ``fastdino doctor --distributed`` on two ranks that differ in all that is compared."""

import io
import json
import os
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest import mock

from fastdino import agreement, cli
from fastdino.doctor import machine, together
from fastdino.doctor.finding import ok


def main(folder: Path) -> None:
    """Rank 1 claims to be another host with another torch, whose clock is half a minute behind.

    Writes the findings and each rank's exit code to ``folder``/RANK.json.
    """
    rank = int(os.environ["RANK"])
    now, runs, host = time.time, agreement.what_runs(), together.this_process()
    flags = ["--distributed", "--json", "--run.dir", str(folder / "run"), "--engine.device", "cpu"]
    printed, code = io.StringIO(), 0
    with ExitStack() as stack:
        for owner, name, result in (
            (machine, "checks", [ok("kernels", f"not asked for, on rank {rank}")]),  # test_doctor.py asks one process
            (together, "this_process", host | {"host": f"gpu{rank + 3:03d}"}),
            (together, "what_runs", runs | ({"torch": "2.10.0"} if rank else {})),
        ):
            stack.enter_context(mock.patch.object(owner, name, return_value=result))
        stack.enter_context(mock.patch.object(time, "time", side_effect=lambda: now() - 30 * rank))
        stack.enter_context(redirect_stdout(printed))
        try:
            cli.main(["doctor", "demo", *flags])
        except SystemExit as ended:
            code = int(ended.code or 0)
    found = {"code": code, "printed": printed.getvalue()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
