"""Drop path by the uniform rule: every branch runs on a draw of its own, against the textbook and by what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.counters import OpCounts
from fastdino.data.batch import Masks
from fastdino.model import ViT
from fastdino.model.block import Shape
from fastdino.model.packing import Packing, Subset, packing_of
from fastdino_kernels import _backend
from tests.model.textbook import literal, nano, views

CPU = torch.device("cpu")
SHAPES = (2, 6, 3, 48, 48), (3, 6, 3, 24, 32)  # 12 and 18 sequences
RATE = 0.3
KEPT = (8, 12)  # int(12 * 0.7), int(18 * 0.7)
GATED = Shape(48, 3, 4, 64, swiglu=True)


def dropping(**options: Any) -> ViT:
    return nano(drop_path=RATE, drop_path_rule="uniform", **options).train()


def factors(vit: ViT, seed: int) -> list[Tensor]:
    """Per group (2 * depth, sequences): what the residual branches of each sequence are multiplied by.

    The draws in their order: for each group those of every branch but the last block's two, then these by chance.
    """
    torch.manual_seed(seed)
    counts, branches = [shape[0] * shape[1] for shape in SHAPES], 2 * len(vit.blocks)
    found = [torch.zeros(branches, n, dtype=torch.float64) for n in counts]
    for group, n, kept in zip(found, counts, KEPT, strict=True):
        for branch, order in enumerate(torch.rand(branches - 2, n).argsort(dim=1)):
            group[branch, order[:kept]] = n / kept
    by_chance = torch.bernoulli(torch.full((1, 2, sum(counts), 1), 1 - RATE, dtype=torch.float64)) / (1 - RATE)
    for branch in (0, 1):
        for group, drawn in zip(found, by_chance[0, branch, :, 0].split(counts), strict=True):
            group[branch - 2] = drawn
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"size": GATED, "layer_scale": 0.1, "registers": 2, "pos_embed": "rope", "rope_scale": 1.0}],
    ids=["v1", "swiglu, registers, LayerScale, RoPE"],
)
def test_equals_the_textbook(options: dict[str, Any]) -> None:
    """Output and every gradient of the whole network, with the draws that the seed gives; masked patches too."""
    vit, groups = dropping(mask_token=True, **options), views(*SHAPES)
    hidden = torch.rand(12, 36) < 0.3
    rows = hidden.flatten().nonzero()[:, 0]
    of_groups = factors(vit, seed=3)
    torch.manual_seed(3)
    got = torch.cat([x.flatten(0, -2) for x in vit(groups, Masks(hidden, rows, torch.ones(len(rows))))])
    tokens = [
        literal(vit, x.flatten(0, 1), None if i else hidden, of_group)[0]
        for i, (x, of_group) in enumerate(zip(groups.values(), of_groups, strict=True))
    ]
    want = torch.cat([*(x[:, 0] for x in tokens), tokens[0][:, vit.num_prefix :].flatten(0, 1)[rows]])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), list(vit.parameters()))
    theirs = torch.autograd.grad((want * weights).sum(), list(vit.parameters()))
    for (name, _), a, b in zip(vit.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


@pytest.fixture
def subsets(monkeypatch: pytest.MonkeyPatch) -> list[Subset]:
    """Every draw, in its order."""
    drawn: list[Subset] = []
    draw = Packing.draw_subsets

    def note(*args: Any) -> list[Subset]:
        drawn.extend(draw(*args))
        return drawn[-args[2] :]

    monkeypatch.setattr(Packing, "draw_subsets", note)
    return drawn


def test_every_branch_draws_its_own(subsets: list[Subset]) -> None:
    """Of every block but the last, as many at every draw, and another set of them."""
    vit = dropping()
    assert [block.drop_path for block in vit.blocks] == [RATE] * 4
    vit(views((8, 7, 3, 48, 48), (6, 7, 3, 24, 32)))
    assert len(subsets) == 2 * 3
    kept = [[rows.sort().values.tolist() for rows in subset.rows] for subset in subsets]
    assert all([len(rows) for rows in groups] == [39, 29] for groups in kept)
    assert len({str(groups) for groups in kept}) == len({str(groups[0]) for groups in kept}) == 6


@pytest.mark.parametrize(
    ("n", "drop", "kept"), [(10, 0.3, 7), (12, 0.3, 8), (1, 0.3, 1), (5, 0.9, 1), (3, 0.05, 2), (128, 0.3, 89)]
)
def test_how_many_are_kept(n: int, drop: float, kept: int) -> None:
    """max(1, int(n * (1 - drop))), each at most once."""
    subset = packing_of(((n, 3), (2 * n, 1)), CPU).draw_subsets(drop, 3)[1]
    assert len(subset.rows[0]) == len(subset.rows[0].unique()) == kept
    assert subset.packing.lengths == ((kept, 3), (max(1, int(2 * n * (1 - drop))), 1))


def test_every_sequence_is_kept_equally_often() -> None:
    packing, times = packing_of(((10, 2),), CPU), torch.zeros(10)
    torch.manual_seed(0)
    for subset in packing.draw_subsets(RATE, 2000):
        times[subset.rows[0]] += 1
    deviation = (2000 * 0.7 * 0.3) ** 0.5
    assert (times - 1400).abs().max() < 4 * deviation


def test_tokens_of_a_subset() -> None:
    rows = [torch.tensor([2, 0]), torch.tensor([1])]
    subset = Subset(packing_of(((3, 2), (2, 3)), CPU), rows, packing_of(((2, 2), (1, 3)), CPU))
    assert subset.tokens().tolist() == [4, 5, 0, 1, 9, 10, 11]


def test_follows_the_seed_and_ends_with_training(subsets: list[Subset]) -> None:
    vit, groups = dropping(), views(*SHAPES)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return vit(groups)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    subsets.clear()
    whole = vit.eval()(groups)[0]
    assert torch.equal(whole, nano(drop_path_rule="uniform").train()(groups)[0])
    assert torch.equal(whole, nano()(groups)[0])
    assert not subsets


def test_no_device_value_is_read() -> None:
    vit, groups = dropping(pos_embed="rope"), views(*SHAPES)
    packing_of.cache_clear()
    with OpCounts() as counts:
        vit(groups)[0].sum().backward()
    assert not counts.syncs


def flops(vit: ViT, groups: dict[str, Tensor]) -> int:
    """Of the linear layers, forward and backward: attention on a CPU is not counted."""
    with FlopCounterMode(display=False) as counter:
        vit(groups)[0].sum().backward()
    return counter.get_total_flops()


def test_what_is_dropped_is_not_computed() -> None:
    """7 of 10 sequences in every block but the last: as many FLOPs less, exactly."""
    groups = views((2, 5, 3, 48, 48), (4, 5, 3, 24, 32))  # 10 and 20 sequences: 7 and 14
    all_blocks, dropped = flops(nano().train(), groups), flops(dropping(), groups)
    shorter = nano().train()
    del shorter.blocks[0]
    per_block = all_blocks - flops(shorter, groups)
    assert dropped == all_blocks - 3 * per_block * 3 // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_with_the_kernels(dtype: torch.dtype, layer_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs; without one in Triton's interpreter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(_backend, "INTERPRETED", True)
    block, packing = dropping(layer_scale=layer_scale).blocks[1].to(device), packing_of(((5, 10), (4, 3)), device)
    results = []
    x = torch.randn(1, 62, 96, dtype=torch.float64, device=device)
    for width in (torch.float64, dtype):  # float64 runs the reference
        leaf = x.to(width).requires_grad_()
        block.to(width)
        torch.manual_seed(0)
        out = block(leaf, packing)
        grads = torch.autograd.grad(out.sin().sum(), [leaf, *block.parameters()])
        results.append([out.detach().double(), *(grad.double() for grad in grads)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() < tolerance * max(1, want.abs().max())
