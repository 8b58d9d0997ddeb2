"""ZeRO 3 beside the other engines: losses, weights, what is sent and kept, and the traps that DeepSpeed sets at it."""

import itertools
from typing import Any

import pytest
import torch

from bench.tables.parity import METHODS, PRECISIONS, difference
from fastdino.config import Config
from fastdino.engine.zero import deepspeed_config
from tests.engine import zero3_cases
from tests.engine.test_engine import assert_same_run, launch

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of zero3_cases.py by world size; two processes go on from what one has saved, too."""
    folder = tmp_path_factory.mktemp("zero3")
    one, two = folder / "one.pt", folder / "two.pt"
    launch(zero3_cases.main, one, None, ranks=1, builds=folder / "builds")
    launch(zero3_cases.main, two, one, ranks=2, builds=folder / "builds")
    return {1: torch.load(one), 2: torch.load(two)}


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("v2 selective/zero3", "v2/torch"),
        ("v2 accumulate/zero3", "v2 accumulate/torch"),
        ("apart/zero3", "apart/torch"),  # blocks that run twice
        ("timm/zero3", "timm/torch"),
        ("json/zero3", "v1/torch"),  # other buckets, no prefetch, weights kept for the backward pass
    ],
)
@WORLD_SIZES
def test_a_step_of_either_method_equals_plain_torch(results: Any, world_size: int, case: str, other: str) -> None:
    got, want = results[world_size][case], results[world_size][other]
    torch.testing.assert_close(got["losses"], want["losses"], rtol=0, atol=1e-5)
    torch.testing.assert_close(got["grad_norm"], want["grad_norm"], rtol=1e-5, atol=0)
    assert difference(got["student"], want["student"]) <= 1e-4
    assert difference(got["teacher"], want["teacher"]) <= 2e-5


@WORLD_SIZES
def test_the_cases_move(results: Any, world_size: int) -> None:
    """Else what is compared were the start."""
    matrix = results[world_size]["matrix"]
    for method, precision in itertools.product(METHODS, PRECISIONS):
        assert matrix[f"{method} {precision}"]["moved"] > 5e-4
    assert difference(*(results[world_size]["timm/zero3"][role] for role in ("student", "teacher"))) > 5e-4


BOUNDS = {
    "fp32": {"loss": 1e-5, "grad_norm": 1e-5, "student": 1e-4, "teacher": 2e-5},
    "bf16": {"loss": 0.0, "grad_norm": 1e-5, "student": 0.0, "teacher": 0.0},  # from ZeRO 1
    "bf16 zero0": {"loss": 6e-2, "grad_norm": 0.1, "student": 1.5e-1, "teacher": 1e-1},  # gradients reduced in fp32
}


@pytest.mark.parametrize(("checkpointing", "stage"), zero3_cases.MATRIX)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
@WORLD_SIZES
def test_every_stage_takes_the_same_steps(
    results: Any, world_size: int, method: str, precision: str, checkpointing: str, stage: str
) -> None:
    found = results[world_size]["matrix"][f"{method} {precision} {checkpointing} {stage}"]
    bounds = BOUNDS.get(f"{precision} {stage}", BOUNDS[precision])
    assert found.keys() == bounds.keys()
    assert all(found[name] <= bound for name, bound in bounds.items()), found


@WORLD_SIZES
def test_stages_take_the_settings_of_a_json(results: Any, world_size: int) -> None:
    """Gradients of bf16 that are reduced in fp32, in small buckets."""
    want = results[world_size]["v1/torch"]["losses"]
    for stage in range(4):
        got = results[world_size][f"json bf16/zero{stage}"]["losses"]
        torch.testing.assert_close(got, want, rtol=0, atol=0.1)


@WORLD_SIZES
def test_a_parameter_without_gradient_steps_with_none(results: Any, world_size: int) -> None:
    """DeepSpeed would step it with the gradient of the step before."""
    got, want = (results[world_size][f"quiet/{engine}"] for engine in ("zero3", "torch"))
    assert_same_run(got, want, loss=3e-5, student=1e-4, teacher=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@WORLD_SIZES
def test_the_teacher_is_the_masters_average_bit_for_bit(results: Any, world_size: int, precision: str) -> None:
    found = results[world_size][f"average {precision}"]
    assert len(found) == 4
    assert all(found.values()), found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@WORLD_SIZES
def test_a_resumed_run_is_the_same_run(results: Any, world_size: int, precision: str) -> None:
    got, want = (results[world_size][f"{name} {precision}"] for name in ("resume", "five"))
    assert torch.equal(got["losses"], want["losses"][3:])
    for kind, tensors in want["state"].items():
        assert all(torch.equal(got["state"][kind][name], x) for name, x in tensors.items()), kind


def test_two_processes_go_on_from_one(results: Any) -> None:
    """The way back is among test_engine.py's."""
    got, want = results[2]["reshard fp32"], results[1]["five fp32"]
    assert_same_run(got, {**want, "losses": want["losses"][3:]}, loss=1e-5, student=1e-4, teacher=2e-5)
    for name, weight in results[2]["reshard bf16"]["loaded"]["teacher"].items():
        assert torch.equal(weight.flatten(), results[1]["five bf16"]["three"]["state"]["ema"][name].bfloat16())


def test_compiled_blocks_take_the_same_steps(results: Any) -> None:
    eager, compiled = results[2]["compiled"]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)


@WORLD_SIZES
def test_blocks_are_gathered_at_once_where_they_run_once(results: Any, world_size: int) -> None:
    assert results[world_size]["units"] == {"packed": 6, "apart": 0, "timm": 0}
    assert "ran twice before one backward pass" in results[world_size]["twice"]


def test_what_a_step_sends(results: Any) -> None:
    """Weights for forward, backward and teacher, gradients once, whatever is computed again; a gather for a block."""
    found = results[2]["collectives"]
    calls, elements, _ = found["reduce-scatter"]
    assert (calls, elements) == (1, found["trained"])
    calls, elements, _ = found["all-gather"]
    assert 2 * found["all"] < elements <= 3 * found["all"]
    assert calls <= 3 * (4 + 2), "of 4 blocks; the head and the rest"
    assert "all-gather" not in results[1]["collectives"]


def test_the_config_of_stage_3() -> None:
    zero = deepspeed_config(Config(), 3, bf16=True, unit=10**7)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0, "a persistent parameter hides what its average writes"
    assert not zero["memory_efficient_linear"], "rounds otherwise"
    assert zero["reduce_bucket_size"] == 2 * 10**7
    assert zero["stage3_max_live_parameters"] == 3 * 10**7
