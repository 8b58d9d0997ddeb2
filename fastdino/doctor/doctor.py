"""The command: all checks, one line each, or JSON."""

import dataclasses
import json as json_
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastdino import distributed
from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.doctor import folder, machine, together
from fastdino.doctor.finding import Finding
from fastdino.launch import LaunchError


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Checks what a training needs before one is started: a line each, with what to do. Exit code 2 if one would fail.

    Takes the recipe's settings as train does, of which it reads those of folder, device and model: fastdino doctor
    vit_small_16 --run.dir /runs/first. With --distributed it is started like a training, one process per GPU, and
    looks at each host, at all ranks together and at the network between them.
    """

    distributed: bool = False
    """Under a launcher: torchrun --nproc-per-node 8 -m fastdino doctor --distributed."""
    json: bool = False
    """Print the findings as JSON, a list of check, state, said and remedy."""

    def __call__(self, config: Config) -> int:
        """Prints the findings on rank 0 as they come; returns the exit code on every rank.

        Raises LaunchError where the launcher and --distributed do not go together, and what joining a group raises.
        """
        with distributed.init(config.engine.device) as ranks:
            if self.distributed and ranks.world_size == 1:
                raise LaunchError(
                    "--distributed is for ranks that a launcher starts: torchrun --nproc-per-node 8 -m fastdino doctor "
                    "--distributed, or leave it out for this machine alone"
                )
            if ranks.world_size > 1 and not self.distributed:
                raise LaunchError(f"{ranks.world_size} ranks were started: say --distributed to check them together")
            found = [self._say(finding, ranks) for finding in self._checks(config, ranks)]
            if self.json and ranks.is_main:
                print(json_.dumps([dataclasses.asdict(finding) for finding in found], indent=1))
            return 2 * ranks.any(any(finding.state == "failed" for finding in found))

    def _checks(self, config: Config, ranks: Ranks) -> Iterator[Finding]:
        alone = Ranks(0, 1, 0, ranks.device)
        if ranks.world_size == 1:
            yield from machine.checks(config, alone)
            yield folder.check(config)
            return
        # One rank of a host for what its ranks have in common; all for their GPUs.
        first = ranks.local_rank == 0
        mine = [*machine.checks(config, alone), folder.check(config)] if first else [machine.gpu(ranks.device)]
        yield from merged(ranks.gather([(ranks.rank, finding) for finding in mine]))
        yield from together.checks(ranks)

    def _say(self, finding: Finding, ranks: Ranks) -> Finding:
        if ranks.is_main and not self.json:
            print(finding.line(), flush=True)
        return finding


def merged(told: Iterable[list[tuple[int, Finding]]]) -> list[Finding]:
    """Findings that ranks have in common, once each and in order; the others with their ranks."""
    of_check: dict[str, dict[Finding, list[int]]] = {}
    for rank, finding in (pair for of_rank in told for pair in of_rank):
        of_check.setdefault(finding.check, {}).setdefault(finding, []).append(rank)
    found = []
    for findings in of_check.values():
        for finding, ranks in findings.items():
            where = "" if len(findings) == 1 else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: "
            found.append(dataclasses.replace(finding, said=where + finding.said))
    return found
