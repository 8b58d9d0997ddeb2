"""Every engine at every world size takes the same steps: 2 gloo processes against 1, ZeRO against plain torch."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.record import ROOT
from bench.tables.parity import difference
from fastdino.config import Config, ConfigError, EngineConfig
from fastdino.distributed import Ranks
from fastdino.engine import _check_fp8, build_engine
from fastdino.engine.zero import TESTED, check_version, deepspeed_config
from fastdino.launch import LaunchError
from tests.children import forked
from tests.engine import engine_cases

ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
SOURCES = {"torch": "zero3", "zero0": "zero2", "zero1": "zero3", "zero2": "torch", "zero3": "zero1"}


def launch(work: Callable[..., None], *args: object, ranks: int, builds: Path) -> None:
    """Calls ``work`` on each rank; it has to be silent and to compile nothing (into ``builds``)."""
    done = forked(work, *args, ranks=ranks, TORCH_EXTENSIONS_DIR=str(builds))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout == "", "DeepSpeed has to be quiet"
    assert not builds.exists() or not any(builds.iterdir()), "nothing may be compiled"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of engine_cases.py by world size."""
    folder = tmp_path_factory.mktemp("engines")
    two, one = folder / "two.pt", folder / "one.pt"
    launch(engine_cases.main, two, None, ranks=2, builds=folder / "builds")
    launch(engine_cases.main, one, two, ranks=1, builds=folder / "builds")
    return {1: torch.load(one), 2: torch.load(two)}


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def assert_same_run(got: dict[str, Any], want: dict[str, Any], loss: float, student: float, teacher: float) -> None:
    torch.testing.assert_close(got["losses"], want["losses"], rtol=0, atol=loss)
    torch.testing.assert_close(got["grad_norm"], want["grad_norm"], rtol=loss, atol=0)
    assert identical(got["counters"], want["counters"])
    tolerance = {"param": student, "ema": teacher}
    for kind in want["state"]:
        moments = loss * max(float(v.abs().max()) for v in want["state"][kind].values())
        assert difference(got["state"][kind], want["state"][kind]) <= tolerance.get(kind, 10 * moments), kind
    for role, bound in {"student": student, "teacher": teacher}.items():
        assert difference(got["networks"][role], want["networks"][role]) <= bound, role


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_equals_one_process_of_plain_torch(results: Any, world_size: int, engine: str) -> None:
    got, want = results[world_size][f"fp32/{engine}"], results[1]["fp32/torch"]
    assert_same_run(got, want, loss=1e-5, student=1e-4, teacher=2e-5)


def test_one_process_shards_nothing_unless_told(results: Any) -> None:
    assert {world_size: found["auto"] for world_size, found in results.items()} == {
        1: "ReplicatedEngine", 2: "ShardedEngine",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["global", "v2", "lars", "sgd", "accumulate"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_other_optimizers_clips_and_micro_batches(results: Any, world_size: int, engine: str, case: str) -> None:
    want = results[1]["fp32/torch" if case == "accumulate" else f"{case}/torch"]
    assert_same_run(results[world_size][f"{case}/{engine}"], want, loss=1e-5, student=1e-4, teacher=2e-5)


def test_the_cases_differ(results: Any) -> None:
    """Else the tests above would compare nothing: clipping bites, each optimizer is its own."""
    for cases in [
        ("fp32", "global"),
        ("fp32", "v2"),
        ("global", "v2"),
        ("fp32", "sgd"),
        ("global", "sgd"),
        ("sgd", "lars"),
    ]:
        one, other = (results[1][f"{case}/torch"]["state"]["param"] for case in cases)
        assert difference(one, other) > 2e-4, cases
    assert difference(results[1]["fp32/torch"]["state"]["param"], results[1]["fp32/torch"]["state"]["ema"]) > 5e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_stays_near_fp32(results: Any, world_size: int, engine: str) -> None:
    got, exact = results[world_size][f"bf16 accumulate/{engine}"], results[1]["fp32/torch"]
    torch.testing.assert_close(got["losses"], exact["losses"], rtol=0, atol=6e-2)
    for kind, bound in {"param": 1.5e-2, "ema": 3e-3}.items():  # the learning rates of the steps add up to 1.5e-2
        assert difference(got["state"][kind], exact["state"][kind]) <= bound
    for role, kind in {"student": "param", "teacher": "ema"}.items():
        for name, weight in got["networks"][role].items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight.flatten(), got["state"][kind][name].bfloat16()), f"{role} {name}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_start_exact_in_bf16(results: Any, world_size: int, engine: str) -> None:
    """A tensor that no step changes keeps all digits that bf16 would have cut."""
    got, exact = results[world_size][f"bf16 resume/{engine}"], results[world_size]["resume/torch"]
    untrained = got["state"]["param"]["head.last_layer.g"]
    assert torch.equal(untrained, exact["state"]["param"]["head.last_layer.g"])
    for role, kind in {"student": "param", "teacher": "ema"}.items():
        for name, weight in got["loaded"][role].items():
            want = results[world_size][f"fp32/{SOURCES[engine]}"]["three"]["state"][kind][name]
            assert torch.equal(weight.flatten(), want.bfloat16())


@pytest.mark.parametrize(("world_size", "case"), [(1, "resume"), (2, "resume"), (1, "reshard")])  # from 2 to 1
@pytest.mark.parametrize("engine", ENGINES)
def test_state_moves_between_engines_and_world_sizes(results: Any, world_size: int, engine: str, case: str) -> None:
    want = results[1]["fp32/torch"]
    want = {**want, "losses": want["losses"][3:]}
    assert_same_run(results[world_size][f"{case}/{engine}"], want, loss=1e-5, student=1e-4, teacher=2e-5)


@pytest.mark.parametrize("what", ["gradient", "flag"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(
    results: Any, world_size: int, engine: str, what: str
) -> None:
    result = results[world_size][f"skip {what}/{engine}"]
    (state, networks, counters), (state_after, networks_after, counters_after) = result["before"], result["after"]
    assert identical(state, state_after)
    assert identical(networks, networks_after)
    expected = {"steps": 3, "skipped": 1, "skipped_in_row": 1, "last_skipped": 2}
    assert {k: int(counters_after[k]) for k in expected} == expected
    assert all(torch.equal(counters[k], v) for k, v in counters_after.items() if k.startswith("updates/"))
    expected = {"steps": 4, "skipped": 1, "skipped_in_row": 0, "last_skipped": 2}
    assert {k: int(result["counters"][k]) for k in expected} == expected
    assert not identical(state["ema"], result["state"]["ema"]), "training goes on"
    assert difference(result["state"]["param"], results[1][f"skip {what}/torch"]["state"]["param"]) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_prototypes_do_not_move_nor_count(results: Any, world_size: int, engine: str) -> None:
    counters = results[world_size][f"fp32/{engine}"]["counters"]
    assert {name: int(counters[f"updates/{name}"]) for name in ("decay", "no_decay", "last_layer_decay")} == {
        "decay": 5, "no_decay": 5, "last_layer_decay": 3,
    }  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_prototypes_at_rate_zero_count(results: Any, world_size: int, engine: str) -> None:
    counters = results[world_size][f"v2/{engine}"]["counters"]
    assert {int(value) for name, value in counters.items() if name.startswith("updates/")} == {5}


@pytest.mark.parametrize("case", ["fp32", "bf16 accumulate", "v2"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_host_sync_in_a_step(results: Any, world_size: int, engine: str, case: str) -> None:
    assert results[world_size]["syncs control"], "the counter must see one where there is one"
    assert results[world_size][f"{case}/{engine}"]["syncs"] == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_config(stage: Any, bf16: bool) -> None:
    config = deepspeed_config(Config(engine=EngineConfig(accumulate=3)), stage, bf16)
    assert config["gradient_clipping"] == 0.0, "DeepSpeed's default clips at 1.0"
    assert config["gradient_accumulation_steps"] == 3
    assert config["zero_optimization"]["stage"] == stage
    bf16 = bf16 and stage > 0
    assert config["bf16"] == {"enabled": bf16, "check_grad_overflow": False}
    assert config["communication_data_type"] == ("bf16" if bf16 else "fp32")


@pytest.mark.parametrize("version", ["0.19.7", "0.19.9", "0.20.0+cu130", "unknown"])
def test_a_deepspeed_that_is_not_tested_is_refused(version: str) -> None:
    with pytest.raises(LaunchError, match=rf"DeepSpeed {re.escape(version)} is installed.*pip install deepspeed=="):
        check_version(version)


def test_the_deepspeed_of_setup_and_constraints_is_tested() -> None:
    for version in TESTED:
        check_version(f"{version}+cu130")
    for file in ("setup.py", "constraints.txt"):
        assert re.findall(r"deepspeed==([\d.]+)", (ROOT / file).read_text()) == [TESTED[-1]]


def test_batch_norm_over_processes_needs_gpus() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match="SyncBatchNorm"):
        build_engine(Config(), network, network, Ranks(0, 2, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("device", "capability", "hip", "found"),
    [
        ("cpu", None, None, "computes on cpu"),
        ("cuda:0", (8, 6), None, r"computes on RTX, 8\.6"),
        ("cuda:0", (9, 4), "6.4", "computes on cuda:0"),
        ("cuda:0", (8, 9), None, None),
        ("cuda:0", (10, 0), None, None),
    ],
)
def test_fp8_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: Any, hip: str | None, found: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX")
    monkeypatch.setattr(torch.version, "hip", hip)
    if found is None:
        _check_fp8(torch.device(device))
    else:
        with pytest.raises(ConfigError, match=f"engine.fp8=True needs an NVIDIA GPU.*8.9 or more.*{found}: leave it"):
            _check_fp8(torch.device(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp8_is_refused_before_anything_moves() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"engine.fp8=True needs"):
        build_engine(Config(engine=EngineConfig(fp8=True)), network, network, Ranks(0, 1, 0, torch.device("cpu")))
