"""The throughput gate that needs no GPU: exact counts of a training step, and one ratio of processor time.

Counts are compared with bench/results/counts.json, the ratio with bench/results/cpu_ratio.json; a failure says which
figure changed and how to record a change that is meant. tests/bench/test_planted.py judges the gate itself.
"""

import json

from bench.gates import ratio
from fastdino import distributed
from tests.children import forked, python


def test_counts_are_as_recorded() -> None:
    """In a process of its own, because DeepSpeed keeps the process group that it saw first."""
    done = forked(python, "-m", "bench.gates.counts", "--check")
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr[-2000:]}"


def test_a_step_keeps_pace_with_the_peer() -> None:
    recorded = json.loads(ratio.RATIO.read_text())["ratio"]
    with distributed.init("cpu") as ranks:
        found, wrong = ratio.judge(ranks, recorded)
    assert not wrong, f"{wrong} {found}"
