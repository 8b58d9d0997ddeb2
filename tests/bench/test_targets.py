"""The targets name cases and variants that bench.kernels has, and are judged on the right side."""

from typing import Any

import pytest
import torch

from bench.kernels.measure import OPERATIONS
from bench.targets import TARGETS, Target, read


def document(device: str) -> dict[str, Any]:
    """A result file in which every variant of every case takes 2 ms and 6 bytes, and ours half of it."""
    found = []
    for operation, module in OPERATIONS.items():
        for case in module.cases(torch.device("cpu"), module.SHAPES[device], compiled=True):
            for variant in case.variants:
                share = 1 if variant == "fastdino" else 2
                found.append({"extra_info": {
                    "operation": operation, "shape": case.shape, "variant": variant, "milliseconds": float(share),
                    "times_ours": {"median": float(share)}, "copy_fraction": 0.5, "peak_bytes": 3 * share,
                }})  # fmt: skip
    return {"benchmarks": [*found, {"extra_info": {}}]}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_target_can_be_read(device: str) -> None:
    cases = read(document(device))
    values = {target.text: target.read(cases) for target in TARGETS if target.device == device}
    assert values
    assert set(values.values()) <= {2.0, 50.0, 3e-6}


def test_reached() -> None:
    at_least, at_most = (Target("cpu", "", lambda cases: 0.0, 2.0, at_most=at_most) for at_most in (False, True))
    assert [target.reached(value) for target in (at_least, at_most) for value in (1.9, 2.0, 2.1)] == [
        False, True, True, True, True, False,
    ]  # fmt: skip
