"""The soft cross-entropy of a few images at a time, loss and gradient, so that the second reading finds them cached."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdino_kernels.losses.row_cross_entropy import scale_
from fastdino_kernels.losses.soft_cross_entropy import (
    Terms,
    consume,
    dense_rows,
    soft_cross_entropy_forward,
    soft_cross_entropy_gradient_,
)


def images_per_group(num_images: int) -> int:
    """All of them, so that there is one group: three launches.

    Groups that fit the L2 cache (16 images of 12 views and 65536 prototypes in bf16 are 25 MB) save a reading from
    memory, and cost three launches each. Which is more awaits a measurement; bench.kernels has both.
    """
    return num_images


def grouped_cross_entropy(student: Tensor, teacher: Tensor, center: Tensor, terms: Terms, group: int) -> Tensor:
    """``soft_cross_entropy`` with the gradient in place, in the forward pass.

    It is taken as if the result's own were 1, and multiplied by that in the backward pass, by launches that look at the
    number on the device and, at 1, leave.
    """
    return _GroupedCrossEntropy.apply(student, teacher, center, terms, group)


class _GroupedCrossEntropy(torch.autograd.Function):
    """Saves the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, center: Tensor, terms: Terms, group: int) -> Tensor:
        student, teacher, center = dense_rows(student), dense_rows(teacher), center.contiguous()
        loss, one = center.new_zeros(()), center.new_ones(())
        for start in range(0, student.shape[1], group):
            images = slice(start, start + group)
            logits, targets = student[:, images].detach(), teacher[:, images]
            share, *statistics = soft_cross_entropy_forward(logits, targets, center, None, *terms)
            soft_cross_entropy_gradient_(logits, None, one, targets, center, None, *statistics, *terms)
            loss += share
        torch.autograd.graph.increment_version(student)  # whoever else saved the logits must not use them now
        ctx.grad, ctx.consumed = student.detach(), False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        consume(ctx)
        grad: Tensor = ctx.grad
        for rows in [grad.flatten(0, 1)] if grad.is_contiguous() else grad:
            scale_(rows, grad_loss)
        return grad, None, None, None, None
