"""``fastdino bench``: each part of a step has its own time and their sum is the step's, by every engine."""

import dataclasses
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.workload import nano_config, random_batch
from fastdino import distributed
from fastdino.config import ConfigError
from fastdino.data import Batch
from fastdino.distributed import Ranks
from fastdino.training.throughput import ablation, parts, timing
from fastdino.training.throughput.bench import Bench
from fastdino.training.throughput.parts import PARTS, TRACED_STEPS, breakdown, trace
from fastdino.training.throughput.timing import step_seconds, warm_up
from fastdino.training.trainer import Trainer
from tests.children import forked

ENGINES: dict[str, tuple[str, Any]] = {"torch": ("torch", 1), **{f"ZeRO {n}": ("deepspeed", n) for n in (1, 2)}}
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def main(folder: Path) -> None:
    """Writes ``folder``/ENGINE.json of the benchmark by every engine; by one of them sharding is ablated."""
    torch.set_num_threads(1)
    ablation.SWITCHES = tuple(s for s in ablation.SWITCHES if s.setting in ("engine.zero_stage", "model.attention"))
    for name, (engine, stage) in ENGINES.items():
        config = nano_config(engine=engine, zero_stage=stage)
        Bench(seconds=0.3, json=folder / f"{name}.json", ablate=() if name == "ZeRO 1" else None)(config)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with distributed.init("cpu") as ranks:
        yield Trainer(nano_config(engine="torch"), ranks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """What alone moves the benchmark's clocks."""
    now = 0.0

    def move(seconds: float) -> None:
        nonlocal now
        now += seconds

    for module in (timing, parts):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    return move


def test_what_is_slower_shows_in_its_part(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    """And in no other, however the parts lie in each other; together they are all of the time."""
    engine = trainer.engine
    batches = [random_batch(trainer.config, torch.device("cpu"), 0)]
    prepare = engine.optimizer.prepare

    def prepare_and_talk(*args: Any) -> torch.Tensor:
        dist.all_reduce(torch.zeros(1), async_op=True)
        return prepare(*args)

    def slower(original: Callable[..., Any]) -> Callable[..., Any]:
        def pausing(*args: Any, **kwargs: Any) -> Any:
            clock(1.0)
            return original(*args, **kwargs)

        return pausing

    monkeypatch.setattr(engine.optimizer, "prepare", prepare_and_talk)
    places: dict[str, tuple[object, str]] = {
        "teacher": (engine.teacher.backbone, "forward"),
        "student forward": (engine.student_network.backbone, "forward"),
        "losses": (sys.modules["fastdino.method.dino"], "dino_loss"),
        "backward": (torch.Tensor, "backward"),
        "optimizer and EMA": (engine.optimizer, "step"),
        "communication": (dist.ProcessGroup, "allreduce"),
        "other": (trainer, "_normalized"),
    }
    assert {"data", *places} == PARTS.keys()
    for part in PARTS:
        with monkeypatch.context() as patch:
            if part in places:
                owner, name = places[part]
                patch.setattr(owner, name, slower(getattr(owner, name)))
            found = breakdown(trainer, slower(lambda: batches) if part == "data" else lambda: batches, 2)
        assert found == dict.fromkeys(PARTS, 0.0) | {part: 1.0}


def test_what_watched_a_trainer_leaves_nothing(trainer: Trainer) -> None:
    before = [dist.ProcessGroup.allreduce, {*vars(trainer)}, {*vars(trainer.engine)}, {*vars(trainer.engine.teacher)}]
    breakdown(trainer, lambda: [next(trainer.batches)], 1)
    after = [dist.ProcessGroup.allreduce, {*vars(trainer)}, {*vars(trainer.engine)}, {*vars(trainer.engine.teacher)}]
    assert after == before


def test_a_step_that_would_be_replayed_is_taken_part_by_part(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of the whole step has no parts, and nothing may wait while one is captured."""

    def replay(*_: object) -> dict[str, torch.Tensor]:
        raise AssertionError("the graph was replayed")

    monkeypatch.setattr(trainer, "_take", replay)
    assert breakdown(trainer, lambda: [next(trainer.batches)], 1)["teacher"] > 0
    with pytest.raises(AssertionError, match="replayed"):
        trainer.train_step([next(trainer.batches)])


@pytest.mark.parametrize("name", ["steps.json", "steps.json.gz"])
def test_a_trace_has_the_parts_as_ranges(name: str, trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / name
    trace(trainer, lambda: [next(trainer.batches)], path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(data)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for part in PARTS.keys() - {"communication"}:
        assert ranges.count(part) >= TRACED_STEPS, part
    inside = next(e for e in events if e.get("name") == "aten::linear")
    assert any(e["ts"] <= inside["ts"] < e["ts"] + e["dur"] for e in events if e.get("name") == "teacher")


def test_a_step_is_repeated_as_long_as_is_asked(clock: Callable[[float], None]) -> None:
    taken: list[None] = []
    assert step_seconds(lambda: taken.append(clock(0.25)), ALONE, 1.0) == 0.25
    assert len(taken) == 6, "the one in which the time is over is taken, and one that was asked for before it"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    done = forked(main, folder, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_by_every_engine(two_ranks: Path, engine: str) -> None:
    found = json.loads((two_ranks / f"{engine}.json").read_text())
    assert found["world_size"] == 2
    assert found["parts"].keys() == PARTS.keys()
    assert all(seconds > 0 for seconds in found["parts"].values()), "communication too"
    whole = found["images"] / found["training"]
    assert 0.4 * whole < sum(found["parts"].values()) < 2.5 * whole, "of steps that were not watched"
    assert found["mfu"]["matmul"] == pytest.approx(
        found["training"] / 2 * found["image_flops"] / found["matmul_flops"]
    ), "of one device's share"
    assert 0 <= found["data_wait"] < 1
    assert found["first_step"] > 0
    assert found["config"]["engine"]["name"] in engine.replace("ZeRO", "deepspeed")


def test_sharding_is_ablated_on_two_ranks(two_ranks: Path) -> None:
    found = json.loads((two_ranks / "ZeRO 1.json").read_text())["ablation"]
    assert [cost["on"] for cost in found["costs"]] == [["engine.zero_stage"], []]
    assert all(cost["seconds"] > 0 and cost["peak_memory"] > 1e8 for cost in found["costs"])
    assert found["skipped"].keys() == {"model.attention"}


def test_an_ablation_that_is_stopped_leaves_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, measure, turns = tmp_path / "figures.json", ablation._measure, iter(range(3))

    def stopped(*given: Any) -> Any:
        assert "training" in json.loads(file.read_text()), "what comes before the ablation"
        if next(turns) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(ablation, "_measure", stopped)
    bench = Bench(seconds=0.05, json=file, ablate=("model.packed",))
    with pytest.raises(KeyboardInterrupt):
        bench(nano_config(engine="torch"))
    found = json.loads(file.read_text())["ablation"]
    assert found["partial"] == "2 of 4"
    assert [cost["on"] for cost in found["costs"]] == [["model.packed"], []]
    monkeypatch.setattr(ablation, "_measure", measure)
    bench(nano_config(engine="torch"))
    assert "partial" not in json.loads(file.read_text())["ablation"]


def test_an_ablation_of_no_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ablate=.*'engine.packed'.* must be some of model.attention, "):
        Bench(ablate=("engine.packed",))


def test_a_table_tells_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = Bench(seconds=0.2, profile=tmp_path / "trace")(nano_config(engine="torch"))
    lines = found.table().splitlines()
    assert lines[0] == "vit_nano on 1 x CPU, float32, torch engine; 4 images a step"
    assert any(line.startswith("MFU: ") and "what matrix products reach here" in line for line in lines)
    assert "first step                  61.3 s\n" in dataclasses.replace(found, first_step=61.3).table()
    assert "it needs --data.num-workers" in dataclasses.replace(found, pipeline=found.step / 3).table()
    fast = dataclasses.replace(found, pipeline=found.step * 3, num_workers=1)
    assert "keeps up with" in fast.table()
    assert "takes turns with the step: with --data.num-workers 1" in dataclasses.replace(fast, num_workers=0).table()
    known = dataclasses.replace(found, published_flops=4 * found.matmul_flops)
    assert "the published peak" in known.table()
    assert "matrix products reach 25.0% of that peak here" in known.table()
    assert json.loads((tmp_path / "trace").read_text())["traceEvents"]


def test_a_warm_up_tells_the_seconds_of_the_first_step(clock: Callable[[float], None]) -> None:
    seconds = iter([30.0, 0.5, 0.25, 0.25])
    assert warm_up(lambda: clock(next(seconds)), ALONE, 10.0) == 30.0
    assert not list(seconds), "the steps after it are taken too"


@pytest.mark.parametrize("flag", ["json", "profile"])
@pytest.mark.parametrize("place", ["missing/figures", ".", "/dev/null"])
def test_a_file_that_cannot_be_written_is_said_at_once(
    flag: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> list[Batch]:
        raise AssertionError("it was measured first")

    monkeypatch.setattr(Bench, "_measure", never)
    with pytest.raises(ConfigError, match=f"--{flag} .* cannot be written: "):
        Bench(**{flag: tmp_path / place})(nano_config(engine="torch"))


def test_a_file_that_can_be_written_is_not_made_before(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("figures")
    Bench(json=tmp_path / "new", profile=old)._check_files()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert old.read_text() == "figures"


def test_files_are_where_the_user_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell expands no tilde behind a = sign. Of two files by one name, one would be lost."""
    monkeypatch.setenv("HOME", str(tmp_path))
    bench = Bench(json=Path("~/figures"), profile=Path("~/trace"))
    assert (bench.json, bench.profile) == (tmp_path / "figures", tmp_path / "trace")
    with pytest.raises(ConfigError, match=r"--json=.*figures' must be another file than --profile"):
        Bench(json=Path("~/figures"), profile=tmp_path / "figures")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_measurement_takes_time(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--seconds"):
        Bench(seconds=seconds)
