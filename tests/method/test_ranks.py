"""1, 2 and 4 gloo processes on the same global batches: one loss, one center, few collectives."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.counters import OpCounts
from fastdino.distributed import Ranks
from fastdino.method.targets import Centering, Sinkhorn
from tests.children import forked
from tests.method import rank_cases
from tests.method.rank_cases import LOSSES

STAGES = [f"{name}, ZeRO {stage}" for name in LOSSES for stage in (1, 2) if name != "mixed" or stage == 2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What rank_cases.py writes, by world size."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for size in (1, 2, 4):
        done = forked(rank_cases.main, folder / f"{size}.pt", ranks=size)
        assert done.returncode == 0, done.stderr[-6000:]
        found[size] = torch.load(folder / f"{size}.pt")
    return found


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("size", [2, 4])
def test_sinkhorn_balances_all_ranks_samples(results, size, split):
    """However they lie, ranks without any among them."""
    torch.testing.assert_close(results[size][split], results[1]["even"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [*STAGES, "center, accumulated"])
@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_centers_do_not_depend_on_the_ranks(results, size, case):
    found, expected = results[size][case], results[1][case]
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=2e-5, atol=0)
    for name in found.keys() - {"losses"}:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_centering_does_not_depend_on_accumulation(results):
    whole, parts = results[1]["center, ZeRO 1"], results[1]["center, accumulated"]
    assert whole.keys() == parts.keys() == {"losses", "center", "patch_center"}
    torch.testing.assert_close(parts["losses"], whole["losses"], rtol=2e-5, atol=0)
    for name in ("center", "patch_center"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6, msg=name)


def test_collectives_are_few_and_small():
    """Of a step of two micro batches at two ranks: one of the points' width for centering, three per Sinkhorn."""
    points, prototypes, applied = torch.randn(6, 5), torch.randn(7, 5), torch.tensor(True)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        ranks = Ranks(0, 2, 0, torch.device("cpu"))
        for target, expected in ((Centering(7, 0.9, 2, ranks), 1), (Sinkhorn(ranks), 2 * 3)):
            with OpCounts() as counts:
                target(points, prototypes, 0.05)
                target(points, prototypes, 0.05)
                target.after_step(applied)
            assert counts.collectives == {"allreduce_": expected}
            assert not counts.syncs
    finally:
        dist.destroy_process_group()
