"""The whole training step beside a careful public peer, in the same run: same weights, views, precision.

Correct first: before anything is timed, ours and the peers' losses over three steps must agree. All take turns where
they fit into the device's memory together. Else, or with --alone, one runs after another, each with its own warm-up;
the file says so, and names what does not fit even alone. ``python -m bench.step`` writes it as it goes,
bench/results/step-DEVICE.json: what is not finished is marked as partial.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.kernels.case import OURS, first_line
from bench.peers.contenders import CONTENDERS, NOT_COUNTED, Contender, build, check, counted, usual
from bench.record import add, device_here, may_add, positive, provenance, result_path, write
from bench.timing import Clock, Ratio, interleave, paired_ratio, unpaired_ratio
from bench.workload import asked_config, random_batch
from fastdino import distributed
from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.model.packing import is_packed
from fastdino.training.flops import matmul_flops, step_flops

ARCHS = {"cuda": ["vit_small", "vit_base"], "cpu": ["vit_tiny"]}
ROUNDS = {"cuda": 60, "cpu": 15}
NUM_BATCHES = 4
IN_TURNS, ALONE = "in turns", "one after another"
SAVE_SECONDS = 5.0  # from one save to the next while rounds are timed: figures cost time
Figures = dict[str, Any]


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    path, where = result_path("step", device), provenance(device, "bench.step")
    changed = options.rounds or options.batch or options.alone or options.out
    part = bool(options.arch) and not changed and may_add(path, where)
    others = usual(device) if options.contender is None else options.contender
    archs = options.arch or ARCHS[device.type]
    configs = [asked_config(parser, "--arch", text, device, options.batch) for text in archs]
    with distributed.init("cuda" if device.type == "cuda" else "cpu") as ranks:
        rounds = options.rounds or ROUNDS[device.type]
        contests = [Contest(config, ranks, others, rounds, options.when) for config in configs]
        document = {"provenance": where, "cases": [contest.case for contest in contests]}

        def save() -> None:
            if part:
                add(path, document, lambda case: (case["arch"], case["batch"]))
            elif options.out or not (options.arch or changed or options.contender is not None):
                write(options.out or path, document)

        for contest in contests:
            contest.measure(save, options.alone)
            print(table(contest.case), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH[:BATCH]",
        help="such as vit_small vit_large:32; default: ViT-S and -B on a GPU; is added to a file of the same code",
    )
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, help="beside fastdino; default: those unlike it")
    parser.add_argument("--batch", type=positive, help="images of a step, of architectures that name none")
    parser.add_argument("--rounds", type=positive)
    parser.add_argument("--alone", action="store_true", help="one after another, as where memory is short")
    parser.add_argument(
        "--when", type=Path, metavar="FILE", help="compile and judge at once, and time when FILE is there"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/step-DEVICE.json, if nothing is changed")
    return parser


class Contest:
    """Ours and others at one architecture. ``case`` is its entry in a result file, ``partial`` until it is whole."""

    def __init__(
        self, config: Config, ranks: Ranks, others: Sequence[str], rounds: int, when: Path | None = None
    ) -> None:
        self.config, self.ranks, self.names, self.rounds = config, ranks, [OURS, *others], rounds
        self.when, self.clock = when, Clock(ranks.device)
        views = config.views
        self.case: dict[str, Any] = {
            "arch": config.model.arch, "views": f"2 x {views.global_size} + {views.num_local} x {views.local_size}",
            "batch": config.run.local_batch, "prototypes": config.head.num_prototypes,
            "precision": config.engine.precision, "rounds": rounds, "order": IN_TURNS, "partial": True,
            "packed": is_packed(config.model.packed, ranks.device), "step_flops": step_flops(config),
            "losses": {}, "contenders": {}, "left_out": {},
        }  # fmt: skip

    def measure(self, save: Callable[[], None], alone: bool) -> None:
        """All figures. Calls ``save`` before the first and whenever there are more.

        Raises AssertionError, and times nothing, when the losses disagree; OutOfMemoryError when ours does not fit.
        """
        save()
        self.batches = [random_batch(self.config, self.ranks.device, seed) for seed in range(NUM_BATCHES)]
        if not alone and (why := self._use(self.names, lambda made: self._in_turns(made, save))):
            print(f"{self.case['arch']}: one after another, because together they do not fit: {why}", flush=True)
            alone = True
        if alone:
            self.case |= {"order": ALONE, "losses": {}, "contenders": {}}
            self._one_after_another(save)
        self.batches = []
        del self.case["partial"]
        save()

    def _await_turn(self) -> None:
        """Begins to time: waits for the file that it was told of, and takes the rate of products, which MFU is of."""
        if "matmul_flops_per_s" in self.case:
            return
        while self.when is not None and not self.when.exists():
            time.sleep(0.1)
        dtype = torch.bfloat16 if self.case["precision"] == "bf16" else torch.float32
        self.case["matmul_flops_per_s"] = matmul_flops(self.ranks.device, dtype, self.clock)

    def _in_turns(self, contenders: dict[str, Contender], save: Callable[[], None]) -> None:
        self.case["losses"] = check(contenders, self.batches, self.case["precision"])
        self._await_turn()
        figures, saved = self.case["contenders"], time.monotonic()

        def after_round(seconds: dict[str, list[float]]) -> None:
            nonlocal saved
            if len(seconds[OURS]) == self.rounds or time.monotonic() > saved + SAVE_SECONDS:
                for name in contenders:
                    figures[name] = self._speed(seconds[name], paired_ratio(seconds[name], seconds[OURS]))
                save()
                saved = time.monotonic()

        works = {name: contender.work(self.batches) for name, contender in contenders.items()}
        interleave(works, self.rounds, self.clock, hide_launches=False, after_round=after_round)
        for name, contender in contenders.items():
            figures[name] |= self._counted(contender, name)
            save()

    def _one_after_another(self, save: Callable[[], None]) -> None:
        seconds: dict[str, list[float]] = {}

        def measure_it(made: dict[str, Contender]) -> None:
            self.case["losses"] = check(made, self.batches, self.case["precision"], self.case["losses"])
            self._await_turn()
            works = {name: contender.work(self.batches) for name, contender in made.items()}
            seconds.update(interleave(works, self.rounds, self.clock, hide_launches=False)[0])
            for name, contender in made.items():
                figures = self._speed(seconds[name], unpaired_ratio(seconds[name], seconds[OURS]))
                self.case["contenders"][name] = figures | self._counted(contender, name)

        for name in self.names:
            if why := self._use([name], measure_it):
                if name == OURS:
                    raise torch.OutOfMemoryError(why)
                print(f"{name} is left out: {why}", flush=True)
                self.case["left_out"][name] = why
            save()

    def _use(self, names: Sequence[str], use: Callable[[dict[str, Contender]], None]) -> str:
        """Builds these contenders for ``use`` and drops them; says why if they do not fit into the device's memory."""
        why = ""
        try:
            with tempfile.TemporaryDirectory() as folder:
                use(build(self.config, self.ranks, Path(folder), names))
        except torch.OutOfMemoryError as error:
            why = first_line(error)
        self.ranks.release()  # here, because the error held the tensors
        gc.collect()  # an engine and its hooks hold each other
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return why

    def _counted(self, contender: Contender, name: str) -> Figures:
        """And why it is not what its name says, if it could not be compiled."""
        return counted(contender, name, self.batches[0]) | {"fallback": contender.fallback}

    def _speed(self, seconds: list[float], times_ours: Ratio) -> Figures:
        """What the rounds so far say of a contender, which is not counted yet."""
        return speed(self.config, seconds, times_ours, self.case["matmul_flops_per_s"]) | NOT_COUNTED


def speed(config: Config, seconds: list[float], times_ours: Ratio, peak_flops: float) -> Figures:
    """Of a contender, by its median."""
    median = statistics.median(seconds)
    return {
        "milliseconds": 1e3 * median, "images_per_second": config.run.local_batch / median,
        "times_ours": asdict(times_ours), "mfu": step_flops(config) / median / peak_flops,
    }  # fmt: skip


def table(case: dict[str, Any]) -> str:
    """The case in a few lines."""
    lines = [f"{case['arch']}, {case['views']} px, batch {case['batch']}, {case['precision']}, {case['order']}"]
    for name, f in case["contenders"].items():
        ratio = f["times_ours"]
        peak = f"{f['peak_bytes'] / 1e6:8.1f} MB" if f["peak_bytes"] is not None else "          -"
        lines.append(
            f"  {name:30} {f['milliseconds']:9.2f} ms {f['images_per_second']:9.1f} images/s"
            f"  MFU {100 * f['mfu']:5.1f} %  {peak}  syncs {f['host_syncs']}  launches {f['launches']}"
            f"  x {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        )
    lines += [f"  {name:30} {f['fallback']}" for name, f in case["contenders"].items() if f.get("fallback")]
    lines += [f"  {name:30} does not fit: {why}" for name, why in case["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
