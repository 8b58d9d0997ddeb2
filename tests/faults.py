"""Trainings that are struck by a fault at a seeded moment, and then started again by the same command.

``python -m tests.faults --seeds 200`` trains two ranks, forked from a process that has imported everything, with the
torch engine and at ZeRO 1, 2 and 3. An undisturbed run of each lists the calls of every rank to collectives and to
the disk. A seed chooses a rank, one of these calls, and whether a signal strikes before, after or, of a write, in the
midst of it. What must hold: the other rank ends by itself; every checkpoint is whole; the same command then trains to
the end, where the checkpoint, the config and the losses are those of the undisturbed run in every byte, and nothing
else is left. ``fastdino status --requeue`` says so too. SIGTERM and SIGUSR1 end all ranks with 85, or in the start,
before anything was trained. A disk that is full within a checkpoint ends nothing but the last one; NaN on one rank is
a step that no rank takes.

The file of results is written after every case; the same command goes on with those that are missing.
"""

import argparse
import ctypes
import dataclasses
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import fault_points
from tests.fault_points import SIGNALS, WRITES, Armed, Fault, Place

ENGINES = ("torch", "zero1", "zero2", "zero3")
WORLD = 2
STEPS = 5
LIMIT = 60.0  # seconds after which ranks are taken to hang; a run takes one to five


def prepare() -> None:
    """Imports everything that a rank needs, wrapped; the ranks are forked from this process."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    fault_points.wrap()
    import torch
    from torch.utils import tensorboard  # noqa: F401

    import fastdino.data

    fault_points.wrap_images(fastdino.data)
    from fastdino.distributed import Ranks
    from fastdino.engine import zero, zero3  # noqa: F401
    from fastdino.training import trainer  # noqa: F401

    zero.import_deepspeed(Ranks(0, 1, 0, torch.device("cpu")))
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401  (late, and with it all of inductor)

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the ranks collect only what is theirs, and copy less


def config(engine: str, folder: Path) -> Any:
    """Five steps of a tiny ViT with hidden patches and drop path, saved at 2, 4 and 5; two checkpoints are kept."""
    from fastdino import config as c

    zero = {"zero_stage": int(engine[-1])} if engine != "torch" else {}
    return c.Config(
        model=c.ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.1),
        head=c.HeadConfig(num_prototypes=32, hidden_dim=32, bottleneck_dim=16),
        views=c.ViewsConfig(global_size=16, local_size=8, num_local=1),
        data=c.DataConfig(root="shapes", num_images=2 * WORLD * STEPS, image_size=16, num_workers=0),
        loss=c.LossConfig(patch_weight=1.0),
        optim=c.OptimConfig(warmup_epochs=0),
        engine=c.EngineConfig(name="torch" if engine == "torch" else "deepspeed", device="cpu", **zero),
        run=c.RunConfig(dir=folder, epochs=1, local_batch=2, log_every=1, knn_every=0, save_every_steps=2, keep=2),
    )


# ---------------------------------------------------------------------------------------------------------- one run


@dataclasses.dataclass
class Ended:
    """How the ranks of one run ended: by exit code, or minus the number of the signal."""

    codes: list[int]
    hung: bool
    struck: bool
    calls: Counter[Place]
    said: str


def run(engine: str, folder: Path, fault: Fault | None = None) -> Ended:
    """Trains ``engine``'s run in ``folder`` until all ranks have ended, those that hang by SIGKILL."""
    beside = folder.with_name(f"{folder.name}.ranks")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pids = {_fork(rank, engine, folder, beside, port, fault): rank for rank in range(WORLD)}
    codes, end, hung = dict[int, int](), time.monotonic() + LIMIT, False
    while len(codes) < WORLD:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end and not hung:
            hung = True
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.01)
    calls = Counter[Place]()
    for path in beside.glob("calls-*"):
        calls.update({Place(*place): count for *place, count in json.loads(path.read_text())})
    said = "".join(f"{path.name}: {path.read_text()[-4000:]}\n" for path in sorted(beside.glob("said-*")))
    return Ended([codes[rank] for rank in range(WORLD)], hung, (beside / "struck").exists(), calls, said)


def _fork(rank: int, engine: str, folder: Path, beside: Path, port: str, fault: Fault | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the runner
        output = os.open(beside / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        struck = None if fault is None or fault.place.rank != rank else fault
        fault_points.armed = Armed(rank, folder, struck, (beside / "struck").touch)
        code = _train(engine, folder)
        calls = [(*dataclasses.astuple(place), count) for place, count in fault_points.armed.calls.items()]
        fault_points.armed = None
        (beside / f"calls-{rank}").write_text(json.dumps(calls))
    finally:
        sys.stderr.flush()
        os._exit(code)


def _train(engine: str, folder: Path) -> int:
    """As the command does, its exit codes included."""
    from fastdino.config import UserError
    from fastdino.training import trainer

    try:
        trainer.train(config(engine, folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


# ---------------------------------------------------------------------------------------------------------- one case


@dataclasses.dataclass(frozen=True)
class Reference:
    """An undisturbed run of an engine: what it left, and the calls it made."""

    final: dict[str, str]
    calls: Counter[Place]


def reference(job: tuple[str, Path]) -> Reference:
    engine, folder = job
    ended = run(engine, folder / f"undisturbed-{engine}")
    assert ended.codes == [0] * WORLD, ended.said
    return Reference(final(folder / f"undisturbed-{engine}"), ended.calls)


def draw(seed: int, kind: str, calls: Counter[Place]) -> list[Fault]:
    """What strikes in the case ``seed`` of ``kind``: every fifth kill is followed by another one, of the resumption."""
    rng = random.Random(f"{kind} {seed}")
    return [_draw(rng, kind, calls) for _ in range(2 if kind == "kill" and seed % 5 == 4 else 1)]


def _draw(rng: random.Random, kind: str, calls: Counter[Place]) -> Fault:
    places = sorted(place for place in calls if (place.call == "normalize") == (kind == "nan"))
    if kind == "disk":
        places = [p for p in places if p.call in WRITES and p.path.startswith("checkpoints/.")]
    if kind == "nan":
        places = [place for place in places if place.rank == 1]
    rank = rng.choice(sorted({place.rank for place in places}))
    place = rng.choice([place for place in places if place.rank == rank])
    moments = {"nan": ["after"], "disk": ["before"]}.get(kind, ["before", "after"])
    if place.call == "write":
        moments.append("half")
    return Fault(place, rng.randint(1, calls[place]), rng.choice(moments), kind)


def case(job: tuple[int, str, str, Reference, Path]) -> dict[str, Any]:
    """Lets the faults of one seed strike, starts the command again, and says what was wrong; see the module."""
    seed, kind, engine, expected, folder = job
    folder, begun = folder / f"{engine}-{kind}-{seed}", time.monotonic()
    found: dict[str, Any] = {"seed": seed, "kind": kind, "engine": engine, "faults": [], "codes": [], "wrong": []}
    said = []
    for fault in draw(seed, kind, expected.calls):
        ended = run(engine, folder, fault)
        steps, broken = _checkpoints(folder)
        found["faults"].append({"what": str(fault), "struck": ended.struck, "newest": max(steps, default=None)})
        found["codes"].append(ended.codes)
        found["wrong"] += broken + _wrong_end(fault, ended, steps) + _wrong_answer(folder, ended)
        found["hung"] = found.get("hung", False) or ended.hung
        said.append(ended.said)
    want = _final_of_nan(engine, folder, fault) if kind == "nan" else expected.final
    if any(found["codes"][-1]):
        ended = run(engine, folder)
        found["resumed"] = ended.codes == [0] * WORLD
        found["wrong"] += [] if found["resumed"] else [f"the same command ended with {ended.codes}"]
        found["hung"] |= ended.hung
        said.append(ended.said)
    got = final(folder)
    differ = [name for name in {**want, **got} if want.get(name) != got.get(name)]
    found["wrong"] += [f"differs from the undisturbed run: {', '.join(differ)}"] if differ else []
    found["wrong"] += _wrong_answer(folder, ended)
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*") if not p.name.startswith(".restarts-")]
    found["wrong"] += [f"left: {', '.join(left)}"] if left else []
    found |= {"exact": not differ, "seconds": round(time.monotonic() - begun, 1)}
    if found["wrong"]:
        found["said"] = said
    else:
        shutil.rmtree(folder)
    return found


def final(folder: Path) -> dict[str, str]:
    """What a run left that does not depend on the time: its newest checkpoint and config by digest, and its losses."""
    newest = folder / f"checkpoints/step-{max(_checkpoints(folder)[0], default=0):08d}"
    told = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.glob("*")}
    settings, metrics = (
        path.read_text() if path.exists() else "" for path in (folder / "config.json", folder / "metrics.jsonl")
    )
    lines = [json.loads(line) for line in metrics.splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return told | {"config.json": settings.replace(str(folder), ""), "losses": str(losses)}


def _checkpoints(folder: Path) -> tuple[list[int], list[str]]:
    """Steps of the checkpoints, and what is wrong with those that are not whole, as their manifests have it."""
    steps, broken = [], []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        steps.append(int(path.name[5:]))
        try:
            files = json.loads((path / "manifest.json").read_text())["files"]
            for name, size in files.items():
                content = (path / name).read_bytes()
                assert size == {"bytes": len(content), "crc32": zlib.crc32(content)}, f"{path / name} is damaged"
        except (OSError, ValueError, AssertionError) as error:
            broken.append(str(error))
    return steps, broken


def _wrong_end(fault: Fault, ended: Ended, steps: list[int]) -> list[str]:
    """What is wrong with how the ranks ended after a fault."""
    codes, newest, victim = ended.codes, max(steps, default=0), fault.place.rank
    if ended.hung:
        return [f"hung: {codes} after {fault}"]
    killed = ended.struck and fault.kind in SIGNALS and codes[victim] == -SIGNALS[fault.kind]
    fine = {
        "kill": killed,
        "nan": codes == [0] * WORLD,
        "disk": (codes == [0] * WORLD or (codes == [2] * WORLD and newest >= STEPS - 1)) and "No space" in ended.said,
    }
    # a notice that comes before the first step or after the last one ends a process as any other program
    noticed = codes == [85] * WORLD or codes == [0] * WORLD or (killed and newest in (0, STEPS))
    well = fine.get(fault.kind, noticed) if ended.struck else codes == [0] * WORLD
    return [] if well else [f"ended with {codes} at step {newest} after {fault}"]


def _wrong_answer(folder: Path, ended: Ended) -> list[str]:
    """What is wrong with whether a job script is told to start the run again."""
    from fastdino import status

    if not (folder / "config.json").exists():  # nothing was begun
        return []
    again, why = status.requeue(folder)
    over = ended.codes in ([0] * WORLD, [2] * WORLD) or status.read(folder)["state"] == "finished"
    return [] if again != over else [f"after {ended.codes} the run is {'' if again else 'not '}started again: {why}"]


def _final_of_nan(engine: str, folder: Path, fault: Fault) -> dict[str, str]:
    """Of a run whose other rank had the NaN: the step is nobody's, whoever had it."""
    beside = folder.with_name(f"{folder.name}-other")
    other = dataclasses.replace(fault, place=dataclasses.replace(fault.place, rank=0))
    ended = run(engine, beside, other)
    assert ended.codes == [0] * WORLD, ended.said
    assert ended.struck
    want = final(beside)
    assert want["losses"].count("nan") == 1, want["losses"]
    return want


# ---------------------------------------------------------------------------------------------------------- all cases


def asked(seeds: int) -> Iterator[tuple[str, int, str]]:
    """(kind, seed, engine) of ``seeds`` kills and of what comes beside them."""
    counts = {"kill": seeds, "term": seeds // 10, "usr1": seeds // 10, "disk": seeds // 10, "nan": seeds // 15}
    for first, (kind, count) in enumerate(counts.items()):
        yield from ((kind, seed, ENGINES[(first + seed) % len(ENGINES)]) for seed in range(count))


def summary(cases: list[dict[str, Any]]) -> dict[str, int]:
    """Figures over all cases."""
    strikes = [(case, fault) for case in cases for fault in case["faults"] if fault["struck"]]
    return {
        **{kind: sum(case["kind"] == kind for case, _ in strikes) for kind in (*SIGNALS, "disk", "nan")},
        "survived": sum(not case["wrong"] for case, _ in strikes),
        "resumptions": sum("resumed" in case for case in cases),
        "exact": sum(case["exact"] for case in cases if "resumed" in case),
        "hung": sum(case["hung"] for case in cases),
    }


def main() -> int:
    from bench.record import RESULTS, positive, write

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seeds", type=positive, default=30, help="kills; beside them a third as many other faults")
    parser.add_argument("--jobs", type=positive, default=2, help="cases at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults-cpu.json", help="the file of results")
    options = parser.parse_args()
    where, cases = _found(options.out)
    done = {(case["kind"], case["seed"]) for case in cases}
    if left := [each for each in asked(options.seeds) if each[:2] not in done]:
        prepare()
        context = multiprocessing.get_context("fork")
        with tempfile.TemporaryDirectory() as scratch, context.Pool(options.jobs) as pool:
            folder = Path(scratch)
            undisturbed = dict(zip(ENGINES, pool.map(reference, [(name, folder) for name in ENGINES], 1), strict=True))
            jobs = [(seed, kind, engine, undisturbed[engine], folder) for kind, seed, engine in left]
            for number, found in enumerate(pool.imap_unordered(case, jobs), 1):
                cases = sorted([*cases, found], key=lambda case: (case["kind"], case["seed"]))
                write(options.out, {"provenance": where, **summary(cases), "cases": cases})
                verdict = "; ".join(found["wrong"]) or f"{found['codes']}, exact"
                what = ", then ".join(fault["what"] for fault in found["faults"])
                print(f"{number}/{len(left)} {found['engine']}: {what}: {verdict} ({found['seconds']} s)", flush=True)
    print(json.dumps(summary(cases)))
    return int(any(case["wrong"] for case in cases))


def _found(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where the figures come from, and the cases that ``out`` has of the same code on the same device."""
    import torch

    from bench.record import provenance

    code = b"".join(Path(file).read_bytes() for file in (__file__, fault_points.__file__))
    where = provenance(torch.device("cpu"), "tests.faults") | {"runner": f"{zlib.crc32(code):08x}"}
    before = json.loads(out.read_text()) if out.exists() else {"provenance": {}, "cases": []}
    same = all(before["provenance"].get(key) == where[key] for key in ("sources", "versions", "runner", "device"))
    return where, before["cases"] if same else []


if __name__ == "__main__":
    sys.exit(main())
