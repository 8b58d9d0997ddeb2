"""Every way to attend computes the same, and FLOPs are those that torch counts."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import report
from bench.kernels import attention
from bench.kernels.case import OURS, PLAIN, Variant, check, without_failing

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
SHAPE = "2x21+3x5"


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, "4x7"])
def test_all_ways_agree(shape: str, device: torch.device) -> None:
    case, _ = without_failing(attention.make_case(device, shape))
    assert {OURS, PLAIN, "SDPA"} <= case.variants.keys()
    errors = check(case)
    assert max(errors.values()) < (1e-5 if device.type == "cpu" else 2e-2)


def test_sequences_do_not_see_each_other() -> None:
    case = attention.make_case(CPU, SHAPE)
    inputs = case.make(0)
    whole = {name: variant.bind(inputs)()[0] for name, variant in case.variants.items()}
    with torch.no_grad():
        inputs.qkv[:, :21] += 1  # the first sequence
    for name, variant in case.variants.items():
        again = variant.bind(inputs)()[0]
        assert torch.equal(again[:, 21:], whole[name][:, 21:]), name
        assert not torch.equal(again[:, :21], whole[name][:, :21]), name


def test_no_figure_when_sequences_are_mixed_up() -> None:
    case = attention.make_case(CPU, SHAPE)
    right = case.variants["SDPA"].bind
    rolled = Variant(lambda inputs: lambda: [right(inputs)()[0].roll(1, dims=1), right(inputs)()[1]])
    wrong = dataclasses.replace(case, variants={**case.variants, "SDPA": rolled})
    with pytest.raises(AssertionError, match="SDPA is off by"):
        attention.figures(wrong, CPU, rounds=3)


def test_flops_are_those_of_the_formula() -> None:
    """torch counts 2 products forward and 4 backward; a fused backward has to form the scores once more."""
    case = attention.make_case(CPU, SHAPE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        case.variants[PLAIN].bind(case.make(0))()
    flops = attention.figures(case, CPU, rounds=3)["flops"]
    assert flops == counted.get_total_flops() * 7 / 6


def test_what_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise RuntimeError("No available kernel.\nAborting")

    monkeypatch.setattr(attention, "_alternatives", lambda groups, device: {"SDPA cuDNN": missing})
    found = attention.figures(attention.make_case(CPU, SHAPE), CPU, rounds=3)
    assert set(found["variants"]) == {OURS, PLAIN}
    assert capsys.readouterr().out == f"attention {SHAPE}: SDPA cuDNN is left out: RuntimeError: No available kernel.\n"


def test_command_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "attention-cpu.json"
    arguments = f"--device cpu --rounds 3 --shape {SHAPE} --out {out}"
    monkeypatch.setattr("sys.argv", ["bench.kernels.attention", *arguments.split()])
    assert attention.main() == 0
    (case,) = json.loads(out.read_text())["cases"]
    table = report.attention_table(tmp_path)
    for name in case["variants"]:
        assert f"| {name} |" in table
