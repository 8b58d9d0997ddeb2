"""packed_attention: the kernels against float64 and the mask written out, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino_kernels.layers import packed_attention as module
from fastdino_kernels.layers._sample_drop import Lengths, num_tokens
from fastdino_kernels.layers.packed_attention import (
    packed_attention,
    packed_attention_reference,
    packed_self_attention,
)
from fastdino_kernels.testing import TOLERANCE, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter has products in fp32 alone, and truncates to bf16 where hardware rounds: gradients read the output.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16, torch.float32]
# Of an error in norm, beyond half as much again as torch's; the interpreter truncates what it stores.
SLACK = {torch.bfloat16: 1e-3, torch.float16: 1e-3 if DEVICE == "cpu" else 1e-4, torch.float32: 2e-6}
BOTH = pytest.mark.parametrize(
    "implementation", [packed_attention, packed_attention_reference], ids=["kernel", "reference"]
)
Call = Callable[..., Tensor]
# Queries and keys: groups of one tile and of several, ragged; sequences of whole tiles; one query each, as of CLS; more
# queries than keys.
MIXED = ((2, 67), (5, 10), (1, 129))
SHAPES: list[tuple[Lengths, Lengths]] = [
    (MIXED, MIXED),
    (((2, 64),), ((2, 64),)),
    (((1, 128),), ((1, 128),)),
    (((2, 1), (5, 1)), ((2, 67), (5, 10))),
    (((1, 70), (2, 20)), ((1, 3), (2, 70))),
]


def inputs(queries: Lengths, keys: Lengths, dtype: torch.dtype, H: int = 2, D: int = 16) -> list[Tensor]:
    """Of q, k, v and the output's gradient; scores of many sizes, so that some weights are nearly 1."""
    generator = torch.Generator().manual_seed(D)
    M, N = num_tokens(queries), num_tokens(keys)
    random = [torch.randn(tokens, H, D, generator=generator) for tokens in (M, N, N, M)]
    random[0] *= torch.randn(M, H, 1, generator=generator).exp()
    return [x.to(dtype).to(DEVICE) for x in random]


def results(implementation: Call, tensors: list[Tensor], queries: Lengths, keys: Lengths) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *tensors, grad = tensors
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = implementation(*leaves, queries=queries, keys=keys)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def plain(q: Tensor, k: Tensor, v: Tensor, *, queries: Lengths, keys: Lengths) -> Tensor:
    """torch's attention, group by group."""
    outputs, first = [], [0, 0, 0]
    for sequences, *each in ((n, of_q, of_k, of_k) for (n, of_q), (_, of_k) in zip(queries, keys, strict=True)):
        parts = (x[i : i + sequences * n] for x, i, n in zip((q, k, v), first, each, strict=True))
        heads = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in parts)
        outputs.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
        first = [i + sequences * n for i, n in zip(first, each, strict=True)]
    return torch.cat(outputs)


def judge(queries: Lengths, keys: Lengths, dtype: torch.dtype, **sizes: int) -> None:
    tensors = inputs(queries, keys, dtype, **sizes)
    got = results(packed_attention, tensors, queries, keys)
    by_torch = results(plain, tensors, queries, keys)
    exact = results(packed_attention_reference, [x.double() for x in tensors], queries, keys)
    for of_kernel, of_torch, right in zip(got, by_torch, exact, strict=True):
        assert of_kernel.dtype == dtype
        ours, theirs = (((x.double() - right).norm() / right.norm()).item() for x in (of_kernel, of_torch))
        assert ours <= 1.5 * theirs + SLACK[dtype], f"{ours:.3g}, torch {theirs:.3g}"
        # The largest error is that of one key whose query is large: weights are rounded beside another greatest score.
        assert error(of_kernel, right) <= 3 * error(of_torch, right) + TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), SHAPES, ids=str)
def test_kernel(queries: Lengths, keys: Lengths, dtype: torch.dtype) -> None:
    judge(queries, keys, dtype)


@pytest.mark.parametrize("D", module.WIDTHS)
def test_widths_of_a_head(D: int) -> None:
    judge(((2, 70), (1, 20)), ((2, 70), (1, 20)), DTYPES[0], D=D, H=3)


def test_one_token_sees_itself() -> None:
    tensors = inputs(((3, 1),), ((3, 1),), torch.bfloat16)
    out, grad_q, grad_k, grad_v = results(packed_attention, tensors, ((3, 1),), ((3, 1),))
    assert torch.equal(out, tensors[2])
    assert torch.equal(grad_v, tensors[3])
    assert max(grad_q.abs().max(), grad_k.abs().max()) < 1e-5


@BOTH
def test_formula(implementation: Call) -> None:
    """softmax over all tokens with minus infinity between sequences, written out."""
    queries, keys = ((2, 3), (1, 66)), ((2, 70), (1, 5))
    q, k, v, grad = (x.double().cpu() for x in inputs(queries, keys, torch.bfloat16))
    owners = []
    for lengths in (queries, keys):
        tokens = torch.tensor([each for n, each in lengths for _ in range(n)])
        owners.append(torch.repeat_interleave(torch.arange(len(tokens)), tokens))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    weights = scores.masked_fill(owners[0][:, None] != owners[1][None], -torch.inf).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, v)
    wants = [want.detach(), *torch.autograd.grad(want, leaves, grad)]
    got = results(implementation, inputs(queries, keys, torch.bfloat16), queries, keys)
    for a, b in zip(got, wants, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0.02, atol=0.02 * b.abs().max().item())


def test_one_tensor_of_queries_keys_and_values() -> None:
    *tensors, grad = inputs(MIXED, MIXED, torch.bfloat16)
    qkv = torch.stack(tensors, 1).requires_grad_()
    out = packed_self_attention(qkv, MIXED)
    (got,) = torch.autograd.grad(out, qkv, grad)
    want = results(packed_attention, [*tensors, grad], MIXED, MIXED)
    assert torch.equal(out, want[0])
    assert torch.equal(got, torch.stack(want[1:], 1))


def test_strides() -> None:
    """Heads first, as some layers lay them out; a gradient that is the same for all tokens; numbers two apart."""
    lengths = ((2, 70), (3, 9))
    dense = inputs(lengths, lengths, torch.bfloat16)
    dense[3] = dense[3][:1].expand_as(dense[3]).contiguous()
    strided = [
        dense[0].transpose(0, 1).contiguous().transpose(0, 1),
        dense[1].repeat_interleave(2, dim=-1)[..., ::2],
        torch.stack([dense[2], dense[2]], 1)[:, 1],
        dense[3][:1].expand_as(dense[3]),
    ]
    for got, want in zip(*(results(packed_attention, x, lengths, lengths) for x in (strided, dense)), strict=True):
        assert torch.equal(got, want)


def test_every_run_gives_the_same() -> None:
    tensors = inputs(MIXED, MIXED, torch.bfloat16)
    first, again = (results(packed_attention, tensors, MIXED, MIXED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_nan_stays_in_its_sequence(which: int) -> None:
    """And infinite keys behind the last of a sequence, which are the next one's, do no harm."""
    lengths = ((2, 70), (2, 9))
    tensors = inputs(lengths, lengths, torch.bfloat16)
    tensors[which][75] = float("nan")
    tensors[which][150] = float("inf")
    for result in results(packed_attention, tensors, lengths, lengths):
        assert torch.isfinite(result[:70]).all()
        assert torch.isfinite(result[140:149]).all()
    assert not torch.isfinite(results(packed_attention, tensors, lengths, lengths)[0][75]).any()


def test_great_scores() -> None:
    """Of some thousands: weights are 0 and 1, and a sequence of which all scores are very low has no other weights."""
    lengths = ((1, 70), (1, 10))
    q, k, v, grad = inputs(lengths, lengths, torch.float16)
    for sign in (1, -1):
        tensors = [sign * 5 * q.abs(), 5 * k.abs(), v, grad]
        got = results(packed_attention, tensors, lengths, lengths)
        exact = results(packed_attention_reference, [x.double() for x in tensors], lengths, lengths)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02 * b.abs().max().item() + 1e-3)


def test_gradients_of_the_reference() -> None:
    queries, keys = ((2, 2), (1, 3)), ((2, 3), (1, 1))
    *tensors, _ = (x.double().cpu() for x in inputs(queries, keys, torch.float16, H=1, D=3))
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, queries=queries, keys=keys), leaves)


X = torch.zeros(6, 2, 16)
TWICE: Lengths = ((2, 3),)
REFUSED: dict[str, tuple[Any, ...]] = {
    "tokens of q": (X[:5], X, X, TWICE, TWICE, r"q \(6, H, d\).* got q \(5, 2, 16\)"),
    "heads": (X, X[:, :1], X, TWICE, TWICE, r"k \(6, 1, 16\)"),
    "values": (X, X, X[:3], TWICE, TWICE, r"v \(3, 2, 16\)"),
    "rank": (X[None], X, X, TWICE, TWICE, r"q \(1, 6, 2, 16\)"),
    "dtypes": (X, X.half(), X, TWICE, TWICE, "torch.float16 on cpu"),
    "integers": (X.int(), X.int(), X.int(), TWICE, TWICE, "one floating dtype.*torch.int32"),
    "sequences": (X, X, X, ((3, 2),), TWICE, "the same sequences"),
    "groups": (X, X, X, ((2, 2), (2, 1)), TWICE, "the same sequences"),
    "no group": (X[:0], X[:0], X[:0], (), (), "one or more groups"),
    "no key": (X[:2], X[:0], X[:0], ((2, 1),), ((2, 0),), "no zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    q, k, v, queries, keys, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, v, queries=queries, keys=keys)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a GPU")
@pytest.mark.parametrize(
    "lengths", [((128, 201), (512, 37)), ((64, 261), (256, 54)), ((4, 1374),), ((33, 785), (7, 1))], ids=str
)
@pytest.mark.parametrize(("H", "D"), [(6, 64), (2, 128)])
def test_real_sizes(lengths: Lengths, H: int, D: int) -> None:
    judge(lengths, lengths, torch.bfloat16, H=H, D=D)
    judge([(n, 1) for n, _ in lengths], lengths, torch.bfloat16, H=H, D=D)
