"""A slow rank is named, at what it is slow, and only when it stays so; nothing waits for it to be found out."""

import json
import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastdino.distributed import Ranks
from fastdino.training.monitoring import nvml, stragglers
from fastdino.training.monitoring.nvml import Gpu, reasons
from fastdino.training.monitoring.stragglers import PARTS, Stragglers
from tests.children import forked
from tests.training import watch_cases

CPU = torch.device("cpu")


class Told(Ranks):
    """One of four ranks that have all told what they are given here."""

    def __init__(self, numbers: list[dict[str, float]]) -> None:
        super().__init__(0, 4, 0, CPU)
        self.numbers = [[of.get(name, 0.0) for name in (*PARTS, "wall", "clock", "slowed")] for of in numbers]

    def gather(self, value: Any) -> list[Any]:
        return [f"gpu{rank:03d}" for rank in range(4)]

    def share(self, numbers: list[float]) -> Callable[[], list[list[float]]]:
        assert len(numbers) == len(self.numbers[0])
        return lambda: self.numbers


def said(odd: dict[str, float], times: int = 5, gathers: bool = False, network: nn.Module | None = None) -> list[str]:
    """Lines of ``times`` logging steps at which rank 2 tells ``odd``."""
    usual = {"data": 0.001, "teacher": 0.1, "student": 0.3, "backward": 0.6, "wall": 1.2, "clock": 1980.0}
    watch = Stragglers(Told([usual, usual, usual | odd, usual]), {"student": network or nn.Identity()}, gathers, False)
    return [line for _ in range(times) for line in watch.tell()()[1]]


FORWARD = {"student": 0.384}  # with the teacher 1.21 times the others'


def test_a_slow_gpu_is_named_once_when_it_stays_slow():
    assert said(FORWARD) == ["slowest rank 2 (gpu002): forward 1.21 x median"]
    assert said(FORWARD, times=2) == []
    assert said({"student": 0.34}) == [], "1.10 times is not worth a line"
    assert said({}) == []


def test_a_rank_that_recovers_and_is_slow_again_is_named_again():
    watch = Stragglers(Told([{"student": 1.0}] * 4), {}, False, False)
    slow, equal = ([[0, 0, 0, s, 0, 0, 1, 0, 0] for s in row] for row in ((1, 1, 2, 1), (1, 1, 1, 1)))
    lines = []
    for numbers in [slow] * 5 + [equal] + [slow] * 5:
        watch._ranks.numbers = numbers  # type: ignore[attr-defined]
        lines += watch.tell()()[1]
    assert lines == ["slowest rank 2 (gpu002): forward 2.00 x median"] * 2


def test_forward_passes_that_wait_for_other_ranks_are_not_compared():
    assert said(FORWARD, gathers=True) == []
    assert said(FORWARD, network=nn.SyncBatchNorm(3)) == []


def test_a_rank_that_waits_for_images_is_named_at_any_stage():
    line = "slowest rank 2 (gpu002): waits 0.25 s a step for images, the median 0.001 s"
    assert said({"data": 0.25}) == said({"data": 0.25}, gathers=True) == [line]
    assert said({"data": 0.15}) == [], "an eighth of a step is not worth a line"


def test_a_gpu_with_a_low_clock_is_named_with_the_reason():
    line = "slowest rank 2 (gpu002): its GPU at 1200 MHz, the median at 1980 (too hot, power brake)"
    assert said({"clock": 1200.0, "slowed": 0x20 + 0x40 + 0x80 + 0x1}, gathers=True) == [line]
    assert said({"clock": 1200.0}) == ["slowest rank 2 (gpu002): its GPU at 1200 MHz, the median at 1980"]
    assert said({"clock": 0.0}) == [], "it is not known"
    assert reasons(0x1) == "", "idle"


def test_parts_of_captured_steps_are_not_timed():
    """Within a capture an event marks no time."""
    network = nn.Identity()
    watch = Stragglers(Ranks(0, 1, 0, CPU), {"student": network}, False, True)
    network(torch.ones(1))
    with watch("backward"):
        pass
    watch.step(data=0.5, host=1.0)
    assert watch.tell()()[0] == {"seconds_data": 0.5, "seconds_host": 1.0}


def test_times_are_means_of_a_step_and_of_a_micro_batch(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 10.0, 13.0, 20.0, 20.0])
    monkeypatch.setattr(stragglers, "clock", lambda: next(times))
    network = nn.Identity()
    watch = Stragglers(Ranks(0, 1, 0, CPU), {"student": network}, False, False)
    for _ in range(2):
        network(torch.ones(1))
    watch.step(data=0.5, host=4.0)
    assert watch.tell()()[0] == {"seconds_data": 0.5, "seconds_host": 4.0, "seconds_student": 2.0}
    assert watch.tell()()[0] == {}, "all begins anew"


def test_without_nvml_nothing_is_known():
    gpu = Gpu(CPU)
    assert (gpu.clocks(), gpu.slowed_by(), gpu.uncorrected(), gpu.driver()) == (None, 0, None, None)


def test_what_a_gpu_does_not_support_is_not_known(monkeypatch):
    """The library's own calls, as far as they go without a GPU."""

    def refuse(*_: object) -> None:
        raise RuntimeError("NVMLError_NotSupported")

    library = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid, NVML_CLOCK_SM=1,
        nvmlDeviceGetClockInfo=lambda gpu, kind: {("GPU-12ab", 1): 1200}[gpu, kind],
        nvmlDeviceGetMaxClockInfo=lambda gpu, kind: 1980, nvmlSystemGetDriverVersion=lambda: "580.82",
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: 0x40, nvmlDeviceGetTotalEccErrors=refuse,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    gpu = nvml.Gpu(torch.device("cuda", 0))
    assert (gpu.clocks(), gpu.slowed_by(), gpu.uncorrected(), gpu.driver()) == ((1200, 1980), 0x40, None, "580.82")


@pytest.mark.gpu
def test_events_of_a_gpu_are_read_without_waiting():
    device = torch.device("cuda", 0)
    x, network = torch.randn(2048, 2048, device=device), nn.Linear(2048, 2048, device=device)
    watch = Stragglers(Ranks(0, 1, 0, device), {"student": network}, False, False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            network(x)
        watch.tell()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(50):
        network(x)
    torch.cuda.synchronize()
    assert 0 < watch.tell()()[0]["seconds_student"] < 0.1


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has said, by case."""
    folder = tmp_path_factory.mktemp("watch")
    done = forked(watch_cases.main, folder, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_training_names_its_slow_rank_and_no_other(trainings):
    """Of two ranks whose clocks are those of the test: on one a forward pass takes longer, from its second step on."""
    warned = [{name: found["said"] for name, found in of.items()} for of in trainings]
    assert warned[0]["slow"] == [f"step 4: slowest rank 1 ({socket.gethostname()}): forward 1.25 x median"]
    assert warned[0]["equal"] == warned[0]["once"] == []
    assert warned[1]["slow"] == warned[1]["equal"] == []


@pytest.mark.parametrize(("case", "differs"), [("version", "torch 2.10.0, not 2."), ("code", "code another, not ")])
def test_a_rank_with_another_version_or_code_is_refused(trainings, case, differs):
    """One message, which rank 0 says, and exit code 2."""
    first, other = (of[case]["error"] for of in trainings)
    assert first.startswith(f"2: rank 1 ({socket.gethostname()}) runs {differs}")
    assert "All ranks need one commit of fastdino and the same packages" in first
    assert other == "2: rank 0 refused the run: its message says why"


def test_a_clock_that_is_off_is_warned_of_and_the_run_goes_on(trainings):
    (line,) = [line for line in trainings[0]["clock"]["said"] if "slowest rank" not in line]  # by this machine's clock
    assert line.startswith(f"the clock of rank 1 ({socket.gethostname()}) is ")
    assert 29 < float(line.split(" is ")[1].split(" s ahead of")[0]) <= 30
    assert [of["clock"]["error"] for of in trainings] == ["", ""]
