"""What the figures rest on: paired ratios, interleaving, counters."""

import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdino_kernels
from bench import compare
from bench.counters import LiveBytes, OpCounts, kernels_counted, launches, peak_bytes, saved_bytes
from bench.kernels.measure import BENCHES, Benches
from bench.record import ROOT
from bench.timing import Clock, Work, interleave, paired_ratio, unpaired_ratio
from fastdino_kernels import prototype_weight
from tests.children import environment, wait_for

CPU = torch.device("cpu")


def test_paired_ratio_ignores_drift_and_outliers() -> None:
    """Both series double half-way, as when a processor is throttled, and one round was disturbed."""
    base = [1.0 + 0.001 * (i % 7) for i in range(50)] + [2.0 + 0.001 * (i % 5) for i in range(50)]
    slower = [1.1 * x for x in base]
    slower[17] *= 40
    ratio = paired_ratio(slower, base)
    assert ratio.median == pytest.approx(1.1)
    assert ratio.low == pytest.approx(1.1)
    assert ratio.high == pytest.approx(1.1)


def test_interval_holds_what_is_uncertain() -> None:
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).mul(0.2).add(1).tolist()
    few, many = paired_ratio(noise[:20], [1.0] * 20), paired_ratio(noise, [1.0] * 400)
    assert few.low < 1 < few.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_unpaired_ratio_is_that_of_the_medians() -> None:
    """Series that were measured apart, which may be of different length; what does not overlap is told apart."""
    base, slower = [1.0 + 0.01 * (i % 5) for i in range(40)], [1.1 + 0.01 * (i % 7) for i in range(20)]
    ratio = unpaired_ratio(slower, base)
    assert ratio.median == pytest.approx(1.13 / 1.02)
    assert 1.05 < ratio.low <= ratio.median <= ratio.high < 1.15


def test_interleave_takes_turns_and_restores() -> None:
    seen: list[str] = []
    works = {
        "a": Work(lambda index: seen.append("a"), lambda index: seen.append("restore a")),
        "b": Work(lambda index: seen.append("b")),
    }
    seconds, _ = interleave(works, rounds=20, clock=Clock(CPU), warmup=1)
    assert [len(x) for x in seconds.values()] == [20, 20]
    for start in range(0, len(seen), 3):
        assert sorted(seen[start : start + 3]) == ["a", "b", "restore a"], "a round runs each once"
        assert "a,restore a" in ",".join(seen[start : start + 3])
    assert {seen[start] for start in range(0, len(seen), 3)} == {"a", "b"}, "none always comes first"


def test_clock_counts_work_and_not_sleep() -> None:
    def busy() -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    clock = Clock(CPU)
    assert clock(busy) >= 0.02
    assert clock(lambda: time.sleep(0.05)) < 0.02


def test_op_counts() -> None:
    x = torch.randn(1000)
    with OpCounts() as counts:
        x.view(10, 100).t()
        torch.empty(5)
        x.add(1)  # reads 4000 bytes, writes 4000
        x.add_(x)  # one tensor, read and written
        torch._foreach_lerp_([x], [torch.ones(1).expand(1000)], 0.5)  # 4000 + 4 read, 4000 written; ones writes 4
    assert dict(counts.calls) == {"aten::add": 1, "aten::add_": 1, "aten::_foreach_lerp_": 1, "aten::ones": 1}
    assert counts.bytes == 8000 + 8000 + 8004 + 4
    assert not counts.syncs
    for sync in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x[0] > 0), lambda: x.nonzero()):
        with OpCounts() as counts:
            sync()
        assert counts.syncs.total() == 1


def test_peak_of_live_tensors() -> None:
    def work() -> torch.Tensor:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        del b
        return c + 1

    assert peak_bytes(work, CPU) == 2 * 4000
    with LiveBytes() as live:
        kept = work()
    assert live.live == 4000
    del kept
    assert live.live == 0


def test_saved_bytes_leave_parameters_out() -> None:
    weight = torch.nn.Parameter(torch.randn(50, 20))
    x = torch.randn(8, 20, requires_grad=True)  # so that the product keeps the weight too
    with saved_bytes() as saved:
        y = x @ weight.t()  # keeps x and the weight, which is there anyway
        (y.sin() * y).sum()  # keeps y twice and sin(y)
    assert saved() == x.nbytes + 2 * y.nbytes


def test_triton_launches_are_counted_and_nothing_runs() -> None:
    rows, ones = torch.tensor([[3.0, 4.0]]), torch.ones(1, 1)
    with kernels_counted() as kernels:
        prototype_weight(rows, ones)
    assert dict(kernels) == {"_weight_kernel": 1}
    assert launches(lambda: torch.zeros(3).add(1), CPU) == 2
    torch.testing.assert_close(prototype_weight(rows, ones), rows / 5, msg="the patch is gone")


def test_launches_queued_before_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def profile(**_: object) -> nullcontext[SimpleNamespace]:
        seen.append("profiler")
        return nullcontext(SimpleNamespace(events=list))

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    assert launches(lambda: seen.append("work"), torch.device("cuda")) == 0
    assert seen == ["wait", "profiler", "work", "wait"]


@pytest.mark.parametrize("lives", [True, False])
def test_a_side_of_compare_that_dies_is_no_verdict(lives: bool) -> None:
    """An exit code of 1 would mean that this tree is slower."""
    wait = "input()" if lives else ""  # dies at the first call, or before
    side = object.__new__(compare.Side)
    command = [sys.executable, "-c", f"print('{{\"wrong\": null}}', flush=True); {wait}"]
    side.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with side:
        assert side.ready() is None
        if not lives:
            side.process.wait()
        with pytest.raises(compare.Wrong, match="the process died"):
            side.seconds()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy without git has no base")
def test_a_comparison_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.compare", "--base", "HEAD", "--case", "dino_loss"]
    comparison = subprocess.Popen(command, cwd=ROOT, env=environment(TMPDIR=str(tmp_path)))
    wait_for(lambda: any(tmp_path.glob("*/bench")))
    comparison.terminate()
    assert comparison.wait(60) == 143
    assert not [*tmp_path.iterdir()]


def test_a_side_of_compare_is_idle_when_it_tells_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    clock = Clock(CPU)
    monkeypatch.setattr(clock, "synchronize", lambda: seen.append("wait"))
    work = Work(lambda index: seen.append("run"), lambda index: seen.append("refill"))
    assert compare._alone(work, clock, 0.0) >= 0
    assert seen == ["run", "refill", "wait"]


def test_what_the_base_lacks_costs_no_other_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benches = Benches(dict.fromkeys(BENCHES))
    monkeypatch.setattr(compare, "BENCHES", benches)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.delitem(sys.modules, "bench.kernels.fp8_linear", raising=False)
    monkeypatch.delattr(fastdino_kernels, "fp8_linear")  # as in a commit from before it
    assert compare.serve(CPU, "fp8_linear") == 1
    assert "it does not have what bench/ of this tree times: cannot import name 'fp8_linear'" in capsys.readouterr().out
    assert benches["koleo_loss"].name == "koleo_loss"
