"""A classifier learns: batches become steps, and what is kept is what was best on held-out images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdino.data.views import normalize
from fastdino.eval.classify.calibration import Balance, class_weights, logit_adjustment
from fastdino.eval.classify.logreg import fit, solver
from fastdino.eval.features import EvaluationError, Features, Reading, device_and_dtype

STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)  # C of logistic regression, from strong to weak regularisation
Images = tuple[Tensor, Tensor]
"""Of a batch: uint8 (B, C, s, s) and int64 (B,) labels."""


class BalancedLoss:
    """Cross-entropy, mean over a batch; what of it makes up for classes of different sizes.

    weights: an image counts n / (C n_c), its class having n_c of the n. logit-adjust: log(n_c / n) is added to the
    logits, so that without it the classifier's are those of classes of equal size (Menon et al. 2021).

    Args:
        counts: (C,) images of each class, one or more.
        balance: the remedy.
    """

    def __init__(self, counts: Tensor, balance: Balance) -> None:
        self.balance: Balance = balance
        self.weight = class_weights(counts).float() if balance == "weights" else None
        adjust = logit_adjustment(counts) if balance == "logit-adjust" else torch.zeros(len(counts))
        self.shift = -adjust.float()

    def __call__(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """(B, C) of any dtype and (B,) -> 0-d fp32."""
        weight = None if self.weight is None else self.weight.to(logits.device)
        shifted = logits.float() + self.shift.to(logits.device)
        return F.cross_entropy(shifted, labels, weight=weight, label_smoothing=smoothing)


class Solved(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor  # (C, D) fp32
    bias: Tensor  # (C,) fp32
    c: float
    """Its inverse strength of regularisation."""


def solve(learn: Features, held: Features, loss: BalancedLoss) -> Solved:
    """Logistic regression on standardised features, by scikit-learn; of STRENGTHS that with the least held-out loss.

    It takes features as they are: the mean and deviation of those learned from are folded in. What is minimised is
    ``loss``: with logit-adjust the log of the prior leaves the bias, with weights images count by their class.
    Raises EvaluationError where scikit-learn is not installed, and where a class has no readable image to learn from.
    """
    if len(learn.labels.unique()) < len(loss.shift) or not len(held.labels):
        raise EvaluationError("of a class, or of all held out, no image can be read: see the warnings above")
    std, mean = torch.std_mean(learn.vectors.double(), dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x, y = ((learn.vectors - mean) / std).cpu(), learn.labels.cpu()
    model, found, losses = solver(loss.balance), [], []
    for c in STRENGTHS:
        fit(model, x, y, c)
        weight, bias = (torch.from_numpy(x).to(mean) for x in (model.coef_, model.intercept_))
        if len(bias) == 1:  # of two classes: that of the second, above the first
            weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
        weight = weight / std
        bias = bias - weight @ mean - loss.shift.to(mean)
        found.append(Solved(weight.float(), bias.float(), c))
        losses.append(float(loss(held.vectors.double() @ weight.T + bias, held.labels)))
    return found[losses.index(min(losses))]


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long a classifier learns, and in what steps."""

    epochs: int
    steps: int
    """Of an epoch."""
    warmup: float = 0.1
    """Share of all steps in which the rate rises; after them it falls by a cosine, to 0."""
    patience: int = 10
    """Epochs without a better held-out loss after which it ends."""
    smoothing: float = 0.0
    """Of the labels."""
    as_a_whole: bool = False
    """In training mode, with drop path and batch statistics; else as it is evaluated."""

    def rate(self, step: int) -> float:
        """What multiplies the learning rates in a step, counted from 0."""
        total = self.epochs * self.steps
        warmup = math.ceil(self.warmup * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@dataclass(frozen=True)
class Learned:
    """How it went."""

    losses: list[float]
    """On held-out images: before the first step, and after each epoch."""

    @property
    def best(self) -> int:
        """The epoch after which the weights are kept; 0: those from before the first step."""
        return min(range(len(self.losses)), key=lambda epoch: _or_worst(self.losses[epoch]))

    @property
    def diverged(self) -> bool:
        """It ended because the loss was no longer finite."""
        return not math.isfinite(self.losses[-1])


def tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Images],
    loss: BalancedLoss,
    course: Course,
    reading: Reading,
    held_out_loss: Callable[[], float],
) -> Learned:
    """Trains what requires a gradient in ``model``, in place, and leaves it as it was when ``held_out_loss`` was best.

    The groups of ``optimizer`` have their peak rates as lr. ``batches`` are course.epochs * course.steps or more.
    Raises EvaluationError where the held-out loss is not finite before the first step.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    learned, best = Learned([held_out_loss()]), _copied(model)
    if learned.diverged:
        raise EvaluationError(f"the held-out loss of these weights is {learned.losses[0]}: they are damaged")
    model.train(course.as_a_whole)
    with tqdm(total=course.epochs * course.steps, desc="finetune", unit="step", leave=False, disable=None) as bar:
        for epoch in range(1, course.epochs + 1):
            for step in range((epoch - 1) * course.steps, epoch * course.steps):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * course.rate(step)
                _step(model, optimizer, next(batches), lambda x, y: loss(x, y, course.smoothing), reading)
                bar.update()
            learned.losses.append(held_out_loss())
            bar.set_postfix_str(f"epoch {epoch}, held-out loss {learned.losses[-1]:.4f}")
            if learned.best == epoch:
                best = _copied(model)
            elif learned.diverged or epoch - learned.best >= course.patience:
                break
    model.load_state_dict(best, strict=False)
    model.eval()
    return learned


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Images,
    loss: Callable[[Tensor, Tensor], Tensor],
    reading: Reading,
) -> None:
    images, labels = batch
    if not len(labels):  # none of them could be read
        return
    device, dtype = device_and_dtype(model)
    x = normalize(images.to(device, non_blocking=True), reading.normalize).to(dtype)
    optimizer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
        logits = model(x)
    loss(logits, labels.to(device)).backward()
    optimizer.step()


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """What a step may change: parameters that learn, and buffers."""
    fixed = {name for name, param in model.named_parameters() if not param.requires_grad}
    return {name: x.detach().clone() for name, x in model.state_dict().items() if name not in fixed}


def _or_worst(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
