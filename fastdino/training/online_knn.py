"""The k-NN of a run, and RankMe: every rank makes features of its part of the images, rank 0 compares them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdino.config import Config, ConfigError
from fastdino.data.benchmarks.class_folders import bank_and_test
from fastdino.data.sources.composed import Subset
from fastdino.data.sources.source import Source
from fastdino.distributed import Ranks
from fastdino.engine import cuts_weights
from fastdino.eval import Features, Knn, Reading
from fastdino.eval.features import Images, Part, check_any, extract_part
from fastdino.eval.unlabelled.rank import rankme
from fastdino.training.preemption import Interrupted, PreemptionNotice
from fastdino.training.watchdog import FOREVER, SLOW, Pulse

PUBLISHED = 20  # the k that DINO v1 reports
RANKED = 2000  # images at most whose features RankMe is of, spread over the bank


class OnlineKnn:
    """k-NN accuracy and RankMe of the teacher while it trains. The two sets are opened and checked here, once.

    Args:
        config: of the run, whose k-NN reads images as training does and sees as much of them at a time.
        ranks: of which each makes this, and calls it at the same steps.
        pulse: hears of each batch.

    Raises ConfigError on every rank for whatever an evaluation of these sets would refuse.

    Attributes:
        ranked: which images RankMe is of, and what is seen of each. Figures of others do not compare.
    """

    def __init__(self, config: Config, ranks: Ranks, pulse: Pulse) -> None:
        self.ranks, self.pulse = ranks, pulse
        root, data = knn_root(config), config.data
        self.bank, self.test, _ = ranks.everywhere(lambda: bank_and_test(root, data))
        total, count = len(self.bank), min(RANKED, len(self.bank))
        self.some = Subset(self.bank, [total * i // count for i in range(count)])
        seen = ranks.gather((self.bank.fingerprint(), self.test.fingerprint()))
        if others := [rank for rank, found in enumerate(seen) if found != seen[0]]:
            raise ConfigError(f"run.knn_root={root} holds other images for rank {others[0]} than for rank 0")
        size, crop = config.views.global_size, data.eval_crop
        self.ranked = f"{self.some.fingerprint()}, {crop:g} of each"
        self.reading = Reading(size=size, crop=crop, normalize=data.normalize, channels=data.channels)
        self.batch, self.num_workers = config.run.local_batch, data.num_workers
        # Else a call of the teacher gathers its weights from all ranks.
        self.teacher_is_whole = not cuts_weights(config, ranks)

    def __call__(
        self, backbone: nn.Module, notice: PreemptionNotice, rank_alone: bool = False
    ) -> tuple[dict[str, float], str]:
        """{"knn": percent, "knn_neighbors": k, "rankme": 1 to D} and what is to be said, on every rank; where there is
        no score an empty dict.

        k is 20, or the number of readable images in the bank if less. A notice to one rank and what fails on one give
        up the evaluation on all, and no more: files that are gone, a worker that died, memory.

        Args:
            backbone: the teacher's, where it is and in the dtype that it has.
            notice: asked after between batches.
            rank_alone: give RankMe alone, for which no more than RANKED images are read.

        Raises what a call of the backbone raises, where the other ranks wait in it.
        """
        try:
            with self.pulse.section("the k-NN"), torch.compiler.set_stance("force_eager"):  # other shapes
                sets = self._features((self.some,) if rank_alone else (self.bank, self.test), backbone, notice)
        except _GivenUp as given_up:
            return {}, str(given_up)
        with self.pulse.section("the score of the k-NN", SLOW if self.ranks.is_main else FOREVER):
            whole = [Features(*map(self.ranks.rows, features)) for features in sets]
            return self.ranks.gather(self._told(notice, *whole) if self.ranks.is_main else None)[0]

    def beside_start(self, score: dict[str, float], last: dict[str, Any] | None) -> dict[str, Any]:
        """``score`` with ``rankme_at_start``, RankMe before the first step, and ``rankme_of``, what both are of.

        Args:
            last: the newest figures of the run, which have these; None at the start itself. Where they are of other
                images, because run.knn_root is another one since, they are left out.
        """
        names = ("rankme_at_start", "rankme_of")
        start = (score["rankme"], self.ranked) if last is None else (last.get(name) for name in names)
        found = dict(zip(names, start, strict=True))
        return {**score, **found} if found["rankme_of"] == self.ranked else {**score}

    def _features(self, sources: tuple[Source, ...], backbone: nn.Module, notice: PreemptionNotice) -> list[Features]:
        """This rank's part of each source, on the CPU. Raises _GivenUp, on all ranks."""

        def take(read: Callable[[], Images]) -> Images:
            problem: BaseException | None = None
            try:
                with notice.interruptible(grace=0):
                    images = read()
            except (Interrupted, Exception) as error:
                problem = error
            self._agree(problem or (Interrupted() if notice.given else None))
            return images

        def part(source: Source) -> Features:
            ours, how = Part(self.ranks.rank, self.ranks.world_size), (self.reading, self.batch, self.num_workers)
            return extract_part(backbone, source, *how, part=ours, take=take)

        sets, problem = list[Features](), None
        try:
            sets = [Features(*(x.cpu() for x in part(source))) for source in sources]
        except _GivenUp:
            raise
        except Exception as error:
            if not self.teacher_is_whole:
                raise
            problem = error
        self._agree(problem)
        return sets

    def _agree(self, problem: BaseException | None) -> None:
        """Goes on where no rank has a problem. Every rank calls this equally often until one has."""
        self.pulse.beat()
        if self.ranks.any(problem is not None):
            raise _GivenUp(next(filter(None, self.ranks.gather(problem and self._said(problem)))))

    def _told(self, notice: PreemptionNotice, *sets: Features) -> tuple[dict[str, float], str]:
        """The score of bank and test, or RankMe of the one set that there is."""
        try:
            with notice.interruptible(grace=0):
                for features in sets:
                    check_any(features)
                return self._score(*sets) if len(sets) > 1 else self._rank(*sets)
        except (Interrupted, Exception) as error:
            return {}, self._said(error)

    def _score(self, bank: Features, test: Features) -> tuple[dict[str, float], str]:
        some = torch.isin(bank.places, torch.tensor(self.some.indices))
        found, said = self._rank(Features(*(x[some] for x in bank)))
        bank, test = (Features(*(x.to(self.ranks.device) for x in features)) for features in (bank, test))
        k = min(PUBLISHED, len(bank.labels))
        knn = 100 * Knn(neighbors=(k,)).accuracy(bank, test)[f"knn_{k}"]
        return {"knn": knn, "knn_neighbors": k, **found}, f"k-NN of the teacher {knn:.1f} %, {said}"

    def _rank(self, some: Features) -> tuple[dict[str, float], str]:
        rank = rankme(some.vectors)
        return {"rankme": rank}, f"RankMe {rank:.1f} of {some.vectors.shape[1]}"

    def _said(self, problem: BaseException) -> str:
        if isinstance(problem, Interrupted):
            return "a signal ended the k-NN"
        where = f" (rank {self.ranks.rank})" if self.ranks.world_size > 1 else ""
        return f"the k-NN failed, training goes on: {type(problem).__name__}: {problem}{where}"


class _GivenUp(Exception):
    """The evaluation ends here on all ranks; its text says why."""


def knn_root(config: Config) -> str:
    """The images of a run's k-NN; empty where it has none."""
    own = "shapes" if config.data.root == "shapes" else ""
    return (config.run.knn_root or own) if config.run.knn_every else ""
