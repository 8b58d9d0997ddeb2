"""DINO: the student predicts the output of its own moving-average teacher from other views of the same image.

Read this first. B images per rank, S student views, T = 2 teacher views (the global ones), K prototypes, D features,
M patches that are hidden from the student and predicted too, if any are.
Source: Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, equation 1 and algorithm 1; for
patches Zhou et al. 2022 (iBOT), for both and KoLeo together Oquab et al. 2024 (DINOv2).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.config import LossConfig
from fastdino.data import Batch, Masks
from fastdino.engine.graphs import SideStream
from fastdino.engine.schedules import Now
from fastdino.method.targets import Target
from fastdino.model import Outputs
from fastdino_kernels import dino_loss, koleo_loss, linear_ibot_loss

MAX_PATCHES = 512  # that statistics look at


class Dino:
    """One step of the method: which network sees which views, and what their outputs cost.

    Args:
        student: a :class:`fastdino.model.Network`, or what an engine wraps around one.
        teacher: the same with the moving-average weights; takes no gradient.
        config: temperatures and weights.
        target: makes the center of the teacher's logits of views.
        patch_target: the same of patches; there is one exactly when the batches have masks.
        beside: where the teacher works; by default before the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: LossConfig,
        target: Target,
        patch_target: Target | None = None,
        beside: SideStream | None = None,
    ) -> None:
        self.beside = beside or SideStream(torch.device("cpu"))
        self.student, self.teacher, self.config = student, teacher, config
        self.target, self.patch_target = target, patch_target
        self._newest: _Newest | None = None

    def loss(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro batch, an fp32 scalar with gradient, and its parts by name, without weight and gradient.

        ``dino``: mean cross-entropy over pairs of a teacher view and another student view.
        ``ibot``: cross-entropy at the hidden patches, of which the teacher sees all and the student none; a mean over
        the patches of a view, then over all global views, those that hide none included.
        ``koleo``: of the student's global views, summed over the two; before the head.

        Args:
            batch: its views are normalised: ``global`` (2, B, C, G, G), and ``local`` (L, B, C, l, l) if there are any.
            now: the schedules' values at this step.
        """
        views, masks, config = batch.views, batch.masks, self.config
        assert (masks is None) == (self.patch_target is None), "masks are in a batch exactly when patches are predicted"
        temps: dict[str, Any] = {"student_temp": config.student_temp, "teacher_temp": now.teacher_temp}
        with torch.no_grad(), self.beside():
            seen: Outputs = self.teacher({"global": views["global"]}, masks and masks._replace(hidden=None))
            logits = F.linear(seen.cls_points, seen.prototypes)
            center = self.target(seen.cls_points.flatten(0, 1), seen.prototypes, now.teacher_temp)
            patch_center = None
            if self.patch_target is not None:
                patch_center = self.patch_target(seen.patch_points, seen.patch_prototypes, now.teacher_temp)
        self._newest = _Newest(masks, seen, logits, center, patch_center, now.teacher_temp)
        made: Outputs = self.student(views, masks)
        self.beside.join()
        # nobody else reads the student's logits
        loss = dino_loss(F.linear(made.cls_points, made.prototypes), logits, center, **temps, inplace_grad=True)
        parts = {"dino": loss}
        if masks is not None and patch_center is not None:
            parts["ibot"] = linear_ibot_loss(
                made.patch_points, made.patch_prototypes, seen.patch_points, seen.patch_prototypes, patch_center,
                masks.weight, **temps,
            )  # fmt: skip
            loss = loss + config.patch_weight * parts["ibot"]
        if config.koleo_weight:
            parts["koleo"] = 2 * koleo_loss(made.cls[:2])
            loss = loss + config.koleo_weight * parts["koleo"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def after_step(self, applied: Tensor) -> None:
        """Called once per optimizer step; ``applied``, 0-d bool on the device, is False when the step was skipped."""
        for target in (self.target, self.patch_target):
            if target is not None:
                target.after_step(applied)
        self._newest = None  # its centers have moved

    def abandon(self) -> None:
        """Forgets the losses of a step that is not taken."""
        for target in (self.target, self.patch_target):
            if target is not None:
                target.abandon()
        self._newest = None

    def state(self) -> dict[str, Tensor]:
        """Live tensors, equal on all ranks, that a checkpoint saves and restores by name; ``patch_`` for patches."""
        patch_state = self.patch_target.state() if self.patch_target else {}
        return self.target.state() | {f"patch_{name}": x for name, x in patch_state.items()}

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """What tells learning from collapse, of the newest :meth:`loss`, as 0-d fp32 tensors on the device.

        Called between the loss and :meth:`after_step`, so it sees the targets that the loss has used.

        ``teacher_entropy``: mean entropy in nats of one view's target (0: all on one prototype; ln K: uniform).
        ``kl_to_uniform``: ln K less that. ``usage_entropy``: entropy of the mean target over the batch (0: all views
        share one prototype). ``center_norm``. ``feature_std``: deviation over the batch of the normalised features
        times sqrt(D): about 1 for directions spread at random, 0 for one point.

        Where patches are predicted, of the teacher's patches that were read: ``patch_entropy`` and
        ``patch_usage_entropy``, of up to MAX_PATCHES of them. ``patch_cos``: mean cosine with their view's CLS token
        (1: copies of it). ``contrast``: 1 less the mean cosine of two patches of a view (0: all are one vector).
        """
        assert self._newest is not None, "statistics are of a loss, before its step"
        masks, seen, logits, center, patch_center, temp = self._newest
        entropy, usage = _entropies(logits.flatten(0, 1), center, temp)
        unit = F.normalize(seen.cls.flatten(0, 1).float(), dim=-1)
        found = {
            "teacher_entropy": entropy,
            "kl_to_uniform": math.log(logits.shape[-1]) - entropy,
            "usage_entropy": usage,
            "center_norm": center.norm(),
            "feature_std": unit.std(0, correction=0).mean() * math.sqrt(unit.shape[-1]),
        }
        if masks is not None and masks.hidden is not None and patch_center is not None:
            view = masks.rows // masks.hidden.shape[1]
            some = seen.patch_points[:: -(-len(seen.patch_points) // MAX_PATCHES)]
            patch_logits = F.linear(some, seen.patch_prototypes)
            found["patch_entropy"], found["patch_usage_entropy"] = _entropies(patch_logits, patch_center, temp)
            found["patch_cos"], found["contrast"] = _likeness(seen.patches, unit, view)
        return found


class _Newest(NamedTuple):
    """What the newest loss was of, and what it was asked to predict."""

    masks: Masks | None
    seen: Outputs  # by the teacher
    logits: Tensor  # (T, B, K)
    center: Tensor  # (K,)
    patch_center: Tensor | None  # (K',)
    temp: float | Tensor


def _entropies(logits: Tensor, center: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor]:
    """Of the targets that (R, K) logits become: their mean entropy, and the entropy of their mean."""
    log_p = torch.log_softmax((logits.float() - center) / temp, dim=-1)
    p = log_p.exp()
    mean_p = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -torch.special.xlogy(mean_p, mean_p).sum()


def _likeness(patches: Tensor, cls: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of (M, D) patches with the CLS token of their view, and 1 less that of two patches of a view.

    ``cls`` (2B, D) is normalised; ``view`` (M,) are indices into it.
    """
    unit = F.normalize(patches.float(), dim=-1)
    total = torch.zeros_like(cls).index_add_(0, view, unit)
    count = cls.new_zeros(len(cls)).index_add_(0, view, cls.new_ones(len(view)))
    pairs = (count * (count - 1)).sum()  # ordered; |sum of unit vectors|^2 is their cosines' sum, each with itself too
    alike = (total.square().sum() - count.sum()) / pairs.clamp(min=1)
    return (unit * cls[view]).sum(-1).mean(), 1 - alike
