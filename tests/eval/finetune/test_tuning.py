"""The loop that trains a classifier: its loss and rates by hand, and what it keeps."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.eval.features import EvaluationError, Reading
from fastdino.eval.finetune.tuning import BalancedLoss, Course, Learned, tune

READING = Reading(size=4, normalize="image")


def test_weights_make_up_for_the_size_of_classes() -> None:
    """Counts 3, 1: an image of the first counts 2/3, of the second 2."""
    loss = BalancedLoss(torch.tensor([3, 1]), "weights")
    assert loss.weight is not None
    assert loss.weight.tolist() == pytest.approx([2 / 3, 2.0])
    logits, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    each = math.log(1 + math.exp(-1)), math.log(2)
    assert loss(logits, labels).item() == pytest.approx((2 / 3 * each[0] + 2 * each[1]) / (2 / 3 + 2))


def test_logit_adjustment_adds_the_log_of_the_prior() -> None:
    loss, logits = BalancedLoss(torch.tensor([9, 1]), "logit-adjust"), torch.tensor([[0.5, 0.0]])
    shifted = torch.tensor([[0.5 + math.log(0.9), math.log(0.1)]])
    for label in (0, 1):
        assert loss(logits, torch.tensor([label])).item() == pytest.approx(
            F.cross_entropy(shifted, torch.tensor([label])).item()
        )


def test_a_classifier_adjusted_in_training_is_that_of_equal_classes() -> None:
    """One feature that says nothing: plain, its logits are the log of the prior; adjusted, they are equal."""
    labels = torch.tensor([0] * 9 + [1])
    for balance, want in (("none", math.log(9)), ("logit-adjust", 0.0), ("weights", 0.0)):
        bias = torch.zeros(2, requires_grad=True)
        loss, optimizer = BalancedLoss(torch.tensor([9, 1]), balance), torch.optim.LBFGS([bias], max_iter=50)  # type: ignore[arg-type]

        def closure(bias: Tensor = bias, loss: BalancedLoss = loss, of: torch.optim.Optimizer = optimizer) -> Tensor:
            of.zero_grad()
            value = loss(bias.expand(10, 2), labels)
            value.backward()
            return value

        optimizer.step(closure)
        assert (bias[0] - bias[1]).item() == pytest.approx(want, abs=1e-3)


def test_the_rate_rises_for_a_tenth_and_falls_by_a_cosine() -> None:
    course = Course(epochs=4, steps=10)
    assert [course.rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert course.rate(4) == 1.0
    assert course.rate(22) == pytest.approx(0.5)
    assert 0 < course.rate(39) < 0.01
    assert Course(epochs=1, steps=1).rate(0) == 0.5


class Counter(nn.Module):
    """Its weight counts the steps; a part of it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fixed = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1), requires_grad=False)
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images.mean((1, 2, 3))[:, None] * 0 + self.weight


class Plus(torch.optim.SGD):
    """Adds 1, whatever the gradient; notes the rate."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=8.0)
        self.rates: list[float] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)


def batches(count: int, empty: tuple[int, ...] = ()) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(count):
        size = 0 if i in empty else 2
        yield torch.zeros(size, 3, 4, 4, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)


def told(losses: list[float]) -> Callable[[], float]:
    left = iter(losses)
    return lambda: next(left)


def tuned(losses: list[float], course: Course, empty: tuple[int, ...] = ()) -> tuple[Counter, Plus, Learned]:
    model = Counter()
    optimizer, loss = Plus([model.weight]), BalancedLoss(torch.tensor([1, 1]), "none")
    given = batches(course.epochs * course.steps, empty)
    learned = tune(model, optimizer, given, loss, course, READING, told(losses))
    return model, optimizer, learned


@pytest.mark.parametrize(
    ("losses", "best", "epochs"),
    [
        ([9.0, 5.0, 6.0, 6.0, 4.0], 1, 3),  # patience of 2 ends it before the 4
        ([9.0, 5.0, 6.0, 4.0, 5.0, 5.0], 3, 5),
        ([1.0, 5.0, 6.0], 0, 2),  # nothing that was learned helped
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], 5, 5),
        ([9.0, 5.0, math.nan, 1.0], 1, 2),
        ([9.0, 5.0, 5.0, 5.0], 1, 3),  # as good is not better
    ],
)
def test_early_stopping_keeps_the_best(losses: list[float], best: int, epochs: int) -> None:
    model, optimizer, learned = tuned(losses, Course(epochs=5, steps=3, patience=2))
    assert (learned.best, len(learned.losses) - 1) == (best, epochs)
    assert len(optimizer.rates) == 3 * epochs
    assert model.weight.tolist() == [3.0 * best] * 2
    assert learned.diverged == any(map(math.isnan, losses))


def test_rates_are_the_peak_times_the_schedule_and_an_unreadable_batch_is_no_step() -> None:
    course = Course(epochs=2, steps=3)
    _, optimizer, _ = tuned([3.0, 2.0, 1.0], course, empty=(2,))
    assert optimizer.rates == [8.0 * course.rate(step) for step in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize("as_a_whole", [False, True])
def test_the_mode_is_the_courses(as_a_whole: bool) -> None:
    model, _, _ = tuned([3.0, 2.0], Course(epochs=1, steps=2, as_a_whole=as_a_whole))
    assert model.modes == [as_a_whole] * 2
    assert not model.training


def test_damaged_weights_are_refused() -> None:
    with pytest.raises(EvaluationError, match="held-out loss of these weights is nan"):
        tuned([math.nan], Course(epochs=1, steps=1))


def test_bf16_reaches_the_model_and_the_loss_is_fp32() -> None:
    class Seen(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            self.seen = super().forward(images.flatten(1))
            return self.seen

    model = Seen(48, 2)
    reading = Reading(size=4, normalize="image", precision="bf16")
    optimizer, loss = torch.optim.SGD(model.parameters(), 0.1), BalancedLoss(torch.tensor([1, 1]), "none")
    tune(model, optimizer, batches(1), loss, Course(epochs=1, steps=1), reading, told([2.0, 1.0]))
    assert model.seen.dtype == torch.bfloat16
    assert loss(model.seen, torch.tensor([0, 1])).dtype == torch.float32
