"""Liger's and fla's losses, bound as bench.kernels binds them, in Triton's interpreter."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.kernels import ibot_loss, peers_triton
from bench.kernels.case import Case, check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KL = nn.KLDivLoss(reduction="batchmean", log_target=True)
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def with_peer(shape: str, loss: peers_triton.RowLoss) -> Case:
    case = ibot_loss.BENCH.case(shape, DEVICE, compiled=False)
    return dataclasses.replace(case, variants=case.variants | {"peer": ibot_loss.divergence(loss)})


@pytest.mark.parametrize("shape", ["8,100", "8,100,bf16"])
def test_a_divergence_is_brought_to_the_cross_entropy(shape: str) -> None:
    """torch's own, of which Liger's is a subclass with the same arguments."""
    assert check(with_peer(shape, KL))["peer"] < (1e-2 if "bf16" in shape else 1e-5)


@pytest.mark.parametrize("wrong", [lambda p, q: KL(q, p), lambda p, q: 1.1 * KL(p, q)], ids=["reversed", "scaled"])
def test_a_wrong_divergence_gets_no_figure(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="peer is off by"):
        check(with_peer("8,100", wrong))


def test_row_losses_compute_ibot_loss() -> None:
    losses = peers_triton.row_losses()
    if not losses:
        pytest.skip("liger-kernel is not installed")
    assert set(losses) == {"Liger KL", "Liger JSD"}
    assert isinstance(losses["Liger KL"], nn.KLDivLoss)
    names = losses if torch.cuda.is_available() else ["Liger JSD"]  # the interpreter cannot run the other's cast
    for name in names:
        assert check(with_peer("8,100", losses[name]))["peer"] < 1e-5


def test_linear_losses_compute_the_same_divergence() -> None:
    losses = peers_triton.linear_losses()
    if not losses:
        pytest.skip("neither fla-core nor liger-kernel is installed")
    torch.manual_seed(0)
    x, teacher_x = (torch.randn(8, 16, device=DEVICE) for _ in range(2))
    weight, teacher_weight = (torch.randn(100, 16, device=DEVICE) for _ in range(2))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    given = (x / STUDENT_TEMP, weight, teacher_x / TEACHER_TEMP, teacher_weight)
    student, teacher = (a.double() @ b.double().T for a, b in (given[:2], given[2:]))
    want = KL(student.log_softmax(-1), teacher.log_softmax(-1))
    exact = [want, *torch.autograd.grad(want, (x, weight), retain_graph=True)]
    for name, loss in losses.items():
        if "torch.compile" in name:  # compiles for half a minute what is torch's own formula
            continue
        got = loss(*given)
        for a, b in zip([got, *torch.autograd.grad(got, (x, weight), retain_graph=True)], exact, strict=True):
            assert torch.allclose(a, b.to(a.dtype), rtol=1e-3, atol=1e-3), name


def test_entropy_is_what_a_divergence_lacks() -> None:
    torch.manual_seed(0)
    teacher, center = torch.randn(5, 30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    log_q = ((teacher - center) / TEACHER_TEMP).log_softmax(-1)
    log_p = torch.randn(5, 30, dtype=torch.float64).log_softmax(-1)
    cross_entropy = -(log_q.exp() * log_p).sum(-1).mean()
    found = KL(log_p, log_q) + peers_triton.entropy(teacher, center, TEACHER_TEMP)
    torch.testing.assert_close(found, cross_entropy)
