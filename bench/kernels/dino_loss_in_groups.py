"""dino_loss by groups of images, a variant that waits for a GPU: the gradient may find the logits in the L2 cache.

16 images of 12 views and 65536 prototypes in bf16 are 25 MB. A group saves a reading and costs three launches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels._backend import scale_
from fastdino_kernels.losses.dino_loss import dino_loss_forward, dino_loss_gradient_


def dino_loss_in_groups(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temp: float, teacher_temp: float, group: int
) -> Tensor:
    """:func:`~fastdino_kernels.dino_loss` of dense logits, its gradient written over them by the forward pass.

    The gradient is taken as if the loss's own were 1, and scaled in the backward pass.
    """
    return _DinoLossInGroups.apply(student, teacher, center, student_temp, teacher_temp, group)


class _DinoLossInGroups(torch.autograd.Function):
    """Saves the gradient."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, group: int
    ) -> Tensor:
        num_images, loss, temps = student.shape[1], center.new_zeros(()), (student_temp, teacher_temp, None)
        for start in range(0, num_images, group):
            images = slice(start, start + group)
            logits, targets = student[:, images].detach(), teacher[:, images]
            share = center.new_full((), logits.shape[1] / num_images)  # the kernels take the mean over their images
            mean, *statistics = dino_loss_forward(logits, targets, center, *temps)
            dino_loss_gradient_(logits, None, share, targets, center, *statistics, *temps)
            loss += share * mean
        torch.autograd.graph.increment_version(student)
        ctx.grad = student.detach()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        for rows in ctx.grad:
            scale_(rows, grad_loss)
        return ctx.grad, None, None, None, None, None
