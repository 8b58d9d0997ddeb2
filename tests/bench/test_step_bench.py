"""The step's FLOPs, the peer that computes the same, the verdicts of compare, and the tables."""

import ast
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import record, report, step
from bench.compare import verdict
from bench.counters import KeptBytes
from bench.kernels.case import OURS
from bench.peers import contenders
from bench.peers.contenders import CHECKED_STEPS, Contender, usual
from bench.record import RESULTS
from bench.step import NUM_BATCHES, Contest
from bench.timing import Ratio
from bench.workload import nano_config, random_batch, step_config
from fastdino import distributed
from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.model import build_network
from fastdino.training.flops import step_flops
from tests.bench.conftest import kill_python_when

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FLAT = {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with distributed.init("cpu") as ranks:
        yield ranks


def test_peer_trains_like_ours_and_flops_are_counted(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step_config("vit_nano", CPU)
    made = contenders.build(config, ranks, tmp_path, [OURS, *(name for name in usual(CPU) if "compile" not in name)])
    batches = [random_batch(config, CPU, seed) for seed in range(NUM_BATCHES)]
    losses = contenders.check(made, batches, config.engine.precision)
    assert len(set(losses[OURS])) == CHECKED_STEPS, "the steps differ, so equal losses mean equal updates"
    weights_and_moments = sum((4 if p.requires_grad else 2) * p.nbytes for p in build_network(config).parameters())
    for name, contender in made.items():
        assert weights_and_moments < contender.kept.bytes < 2 * weights_and_moments, name
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        made["lightly + timm"].step(batches[0])
    pairs = 2 * 2 * config.views.num_views * config.run.local_batch * config.head.num_prototypes  # lightly's einsum
    assert flops.get_total_flops() == pytest.approx(step_flops(config) + 2 * pairs, rel=0.01)


def test_no_figure_when_losses_disagree() -> None:
    losses = iter([1.0, 0.9, 0.8, 1.0, 0.9, 0.81])
    made = {name: Contender(lambda batch: torch.tensor(next(losses)), KeptBytes(CPU)) for name in (OURS, "peer")}
    batches: list[Any] = [None] * NUM_BATCHES
    with pytest.raises(AssertionError, match=r"no figure: step 2 of peer has loss 0\.81"):
        contenders.check(made, batches, "fp32")


def test_where_memory_is_short_one_runs_after_another(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two contenders do not fit together, and one of them does not fit at all."""
    build, alive, saved = contenders.build, [], []

    def in_a_small_memory(config: Config, ranks: Ranks, folder: Path, names: Sequence[str]) -> dict[str, Contender]:
        assert not [name for name, holder in alive if holder() is not None], "those before are gone"
        if len(names) > 1 or names == ["fastdino, ZeRO 1"]:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nMore words")
        made = build(config, ranks, folder, names)
        for name, contender in made.items():  # ours is the argument of a partial, the peer has a method
            holder = contender.step.args[0].engine if name == OURS else contender.step.__self__
            alive.append((name, weakref.ref(holder)))
        return made

    monkeypatch.setattr(step, "build", in_a_small_memory)
    contest = Contest(step_config("vit_nano", CPU), ranks, ["fastdino, ZeRO 1", "lightly + timm"], rounds=2)
    contest.measure(lambda: saved.append(json.dumps(contest.case)), alone=False)
    case = contest.case
    assert [name for name, _ in alive] == list(case["contenders"]) == list(case["losses"]) == [OURS, "lightly + timm"]
    assert case["left_out"] == {"fastdino, ZeRO 1": "OutOfMemoryError: Tried to allocate 9 GiB."}
    assert case["order"] == "one after another"
    assert all(figures["launches"] for figures in case["contenders"].values())
    found = [(list(part["contenders"]), "partial" in part) for part in map(json.loads, saved)]
    both = [OURS, "lightly + timm"]
    assert found == [([], True), ([OURS], True), ([OURS], True), (both, True), (both, False)], "each as it is measured"
    printed = capsys.readouterr().out
    assert "vit_nano: one after another, because together they do not fit: OutOfMemoryError: Tried" in printed
    assert "fastdino, ZeRO 1 is left out: OutOfMemoryError: Tried to allocate 9 GiB.\n" in printed
    rows = report._step_rows({"cases": [case]}, on_gpu=False)[1]
    assert rows[0][0].endswith(", one after another")
    assert rows[2][1:3] == ["fastdino, ZeRO 1", "does not fit"]
    assert len({len(row) for row in rows}) == 1
    assert "does not fit" in step.table(case)


def test_ours_must_fit(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> dict[str, Contender]:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.")

    monkeypatch.setattr(step, "build", full)
    with pytest.raises(torch.OutOfMemoryError, match="9 GiB"):
        Contest(step_config("vit_nano", CPU), ranks, [], rounds=2).measure(lambda: None, alone=False)


def test_what_is_compiled_and_judged_waits_for_its_turn(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[dict[str, Any]] = []

    def sleep(seconds: float) -> None:
        waits.append(json.loads(json.dumps(contest.case)))
        if len(waits) == 3:
            (tmp_path / "turn").touch()

    monkeypatch.setattr("bench.step.time.sleep", sleep)
    config = step_config("vit_nano", CPU, batch=2)
    for alone in (False, True):
        waits.clear()
        (tmp_path / "turn").unlink(missing_ok=True)
        contest = Contest(config, ranks, ["lightly + timm"], 2, tmp_path / "turn")
        contest.measure(lambda: None, alone)
        assert len(waits) == 3
        assert [*waits[2]["losses"]] == [OURS, "lightly + timm"][: 1 if alone else 2]
        assert not waits[2]["contenders"]
        assert "matmul_flops_per_s" not in waits[2], "products are timed in quiet, too"
        assert set(contest.case["contenders"]) == {OURS, "lightly + timm"}


def test_a_contender_that_could_not_be_compiled_says_so(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: object, **options: object) -> Callable[..., object]:
        def call(*inputs: object) -> object:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    contest = Contest(step_config("vit_nano", CPU), ranks, ["fastdino, compiled"], rounds=2)
    contest.measure(lambda: None, alone=False)
    ours, compiled = contest.case["contenders"].values()
    assert not ours["fallback"]
    assert "runs eagerly" in compiled["fallback"]
    assert "no C++ compiler" in step.table(contest.case)
    rows = report._step_rows({"cases": [contest.case]}, on_gpu=False)[1]
    assert [row[1] for row in rows] == [OURS, "fastdino, compiled, not compiled: it failed"]


STEP = """
import sys
from bench import step
step.SAVE_SECONDS = 0.0
sys.exit(step.main())
"""


def test_a_killed_run_leaves_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    arguments = f"--device cpu --arch vit_nano:2 vit_tiny --rounds 100000 --out {out} --contender".split()

    def rounds_are_there() -> bool:
        return out.exists() and OURS in json.loads(out.read_text())["cases"][0]["contenders"]

    kill_python_when(rounds_are_there, "-c", STEP, *arguments, "lightly + timm")
    nano, tiny = json.loads(out.read_text())["cases"]
    assert (nano["batch"], tiny["batch"]) == (2, 4)
    assert nano["partial"] is tiny["partial"] is True
    assert set(nano["contenders"]) == {OURS, "lightly + timm"}
    assert all(figures["milliseconds"] > 0 for figures in nano["contenders"].values())
    assert not tiny["contenders"]
    rows = report._step_rows({"cases": [nano, tiny]}, on_gpu=False)[1]
    assert [row[0][-14:] for row in rows] == [", not finished", ""]


def test_the_batch_can_be_chosen() -> None:
    small, usual = (step_config("vit_nano", CPU, batch=batch) for batch in (2, None))
    assert (small.run.local_batch, usual.run.local_batch) == (2, 4)
    assert small.optim.lr * 2 == usual.optim.lr * 4, "the same rate in the end"


def test_nano_step_is_the_products_default() -> None:
    config = nano_config()
    assert config.engine.name == "deepspeed"
    assert config.optim.clip_mode == "tensor"


@pytest.mark.parametrize(
    ("first", "again", "word"),
    [
        ((1.10, 1.06, 1.14), (1.09, 1.06, 1.12), "SLOWER"),
        ((1.10, 1.06, 1.14), (1.02, 0.99, 1.05), "AMBIGUOUS"),
        ((1.10, 1.06, 1.14), None, "AMBIGUOUS"),
        ((1.06, 1.02, 1.10), None, "AMBIGUOUS"),
        ((1.01, 0.99, 1.03), None, "SAME"),
        ((0.80, 0.78, 0.83), None, "FASTER"),
    ],
)
def test_verdict(first: tuple[float, float, float], again: tuple[float, float, float] | None, word: str) -> None:
    assert verdict(Ratio(*first), None if again is None else Ratio(*again)) == word


def test_tables_of_the_repository_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.report", "--check"])
    assert report.main() == 0, "run python -m bench.report"


def gpu_results(folder: Path) -> None:
    """Result files of a GPU that nobody has."""
    where = {"commit": "0" * 40, "dirty": True, "device": "Model 1", "driver": "1.2", "date": "2000-01-01T00:00:00"}
    where["versions"] = dict.fromkeys(("torch", "triton", "lightly", "timm"), "0")  # type: ignore[assignment]
    seen: dict[str, Any] = {"milliseconds": 0.05, "copy_fraction": 0.91, "peak_bytes": 2e6}
    variants = {}
    for variant, median in (("fastdino", 1.0), ("reference", 9.0), ("lightly", 14.0), ("torch.compile", 6.6)):
        variants[variant] = {"times_ours": {"median": median, "low": median - 0.1, "high": median + 0.1}, **seen}
    case = {"operation": "dino_loss", "shape": "2,2,2,2", "rounds": 3, "variants": variants}
    record.write(folder / "kernels-model-1.json", {"provenance": where, "cases": [case]})


def test_report_says_what_is_not_measured(tmp_path: Path) -> None:
    text = "a\n<!-- bench:kernels -->\nold\n<!-- /bench:kernels -->\nb\n<!-- bench:step -->\n<!-- /bench:step -->\n"
    empty = report.rewritten(text, tmp_path)
    assert empty.count(report.NOT_MEASURED) == 2
    assert "old" not in empty
    assert empty.startswith("a\n")
    assert "\nb\n" in empty
    gpu_results(tmp_path)
    full = report.rewritten(empty, tmp_path)
    assert full.count(report.NOT_MEASURED) == 1, "the step alone"
    row = next(line for line in full.splitlines() if line.startswith("| `dino_loss`"))
    for figure in ("0.05", "91 %", "9.00x (8.90 to 9.10)", "6.60x", "14.00x (13.90 to 14.10), lightly"):
        assert figure in row
    assert "000000000 with changes" in full
    assert report.rewritten(full, tmp_path) == full, "writing twice changes nothing"


def test_the_fastest_way_of_a_gpu_is_written_into_the_code(tmp_path: Path) -> None:
    assert report.choices_table(tmp_path) == report.NOT_MEASURED

    def times(**milliseconds: float) -> dict[str, Any]:
        return {name.replace("_", ", "): {"milliseconds": x} for name, x in milliseconds.items()}

    attention = times(fastdino=1.0, fastdino_varlen=1.0, fastdino_xformers=1.2, fastdino_sdpa=0.9, reference=0.1)
    apart = {"packed": False, "contenders": times(fastdino=9.0, fastdino_packed=10.0)}  # as that table has it
    record.write(tmp_path / "step-b.json", {"provenance": {"device": "GPU B"}, "cases": [apart]})
    whole = {"packed": True, "contenders": {**times(fastdino=8.0), "fastdino, a pass per size": {"milliseconds": 9.0}}}
    for name, found in (("attention", {"variants": attention}), ("step", whole)):
        record.write(tmp_path / f"{name}-a.json", {"provenance": {"device": "GPU A"}, "cases": [found]})
        record.write(tmp_path / f"{name}-cpu.json", {"provenance": {"device": "CPU"}, "cases": [found]})
    rows = ["| GPU A | sdpa | packed |", "| GPU B | not measured | a pass per size |"]
    assert report.choices_table(tmp_path).splitlines()[2:] == rows
    tables = ({"GPU A": "sdpa"}, {"GPU A": True, "GPU B": False})
    for choice, wanted in zip(report.CHOSEN, tables, strict=True):
        code = choice.file.read_text()
        new = report.rewritten_code(code, choice, tmp_path)
        line, literal = choice.table.split(":")[0], new[new.index(f"\n{choice.table} = ") :].split(" = ", 1)[1]
        assert ast.literal_eval(literal[: literal.index("}") + 1]) == wanted, line
        assert report.rewritten_code(new, choice, tmp_path) == new, "writing twice changes nothing"
        assert report.rewritten_code(new, choice, RESULTS) == code, "nothing else was touched"
        formatted = ["-m", "ruff", "format", "--check", "--line-length=120", "-"]
        done = subprocess.run([sys.executable, *formatted], input=new, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("whole", "other"), [(True, contenders.PER_SIZE), (False, contenders.PACKED)])
def test_a_gpu_times_what_auto_does_not_take(whole: bool, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")
    monkeypatch.setattr("fastdino.model.packing.PACKED", {"GPU A": whole})
    ways = {contenders.PER_SIZE, contenders.PACKED} & {*usual(torch.device("cuda"))}
    assert ways == {other}


@pytest.mark.parametrize("text", ["<!-- bench:karnels -->\n<!-- /bench:karnels -->", "<!-- bench:step -->\n"])
def test_report_refuses_a_marker_that_it_cannot_serve(text: str) -> None:
    with pytest.raises(ValueError, match="bench:"):
        report.rewritten(text, RESULTS)


def two_gpus(folder: Path) -> None:
    """Files of an H100, which come first in the alphabet, and of an H200."""
    for number, name in ((1, "NVIDIA H100 80GB HBM3"), (2, "NVIDIA H200")):
        where = {"commit": "0" * 40, "dirty": False, "device": name, "driver": "1", "date": "2000-01-01T00:00:00"}
        where["versions"] = dict.fromkeys(("torch", "triton", "lightly", "timm"), "0")  # type: ignore[assignment]
        figures = {"milliseconds": 0.1 * number, "copy_fraction": 0.4 * number, "peak_bytes": 1e6 * number}
        variants = {name: {**figures, "times_ours": FLAT} for name in (OURS, "reference", "lightly")}
        case = {"operation": "dino_loss", "shape": "10,2,64,65536,bf16", "rounds": 3, "variants": variants}
        path = folder / f"kernels-{name.lower().replace(' ', '-')}.json"
        record.write(path, {"provenance": where, "cases": [case]})


def test_bounds_of_an_h200_stand_beside_its_figures_alone(tmp_path: Path) -> None:
    (tmp_path / "compile.json").write_text((RESULTS / "compile.json").read_text())
    two_gpus(tmp_path)
    assert "| 200.0 |\n" in report.compile_table(tmp_path)
    tables = report.kernels_table(tmp_path)
    assert [tables.count(f"{name} (driver 1)") for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")] == [1, 1]
    (tmp_path / "kernels-nvidia-h200.json").unlink()
    assert "| 100.0 |\n" not in report.compile_table(tmp_path)
