"""The engine in plain torch: nothing is sharded, gradients are all-reduced.

It is the definition that DeepSpeed's engines are tested against.
"""

import torch
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.engine.engine import Engine
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Shard, point_into


class TorchEngine(Engine):
    """One flat fp32 master per group on every rank; in bf16 the student's weights and gradients are flat bf16."""

    sharded = False

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks) -> None:
        super().__init__(config, student, teacher, ranks)
        self.student = self._wrap(config, student)
        masters = [torch.cat([p.detach().flatten() for p in group.params.values()]) for group in self.groups]
        for name in self._untrained:
            param = student.get_parameter(name)
            param.data = param.data.to(self.dtype)
        weights = [master.to(self.dtype) for master in masters]  # the master itself in fp32
        self._micro_grads = [torch.zeros_like(flat) for flat in weights]  # what autograd adds to
        self._grads = self._micro_grads  # fp32 sums over micro batches
        if self.dtype != torch.float32:
            self._grads = [torch.zeros_like(master) for master in masters]
        for group, flat in zip(self.groups, weights, strict=True):
            point_into(flat, list(group.params.values()))
        self._point_gradients()
        self._adopt(masters, [None if f is m else f for f, m in zip(weights, masters, strict=True)], parts=1, part=0)
        self.after_load()

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulate).backward()
        self._add_micro_batch()

    @torch.no_grad()
    def step(self, now: Now, finite: Tensor) -> Tensor:
        self._reduce()
        grads = []
        for group, grad in zip(self.optimizer.param_groups, self._grads, strict=True):
            shard: Shard = group["shard"]
            shard.param.grad = grad
            grads += shard.views(grad)
        applied = self.optimizer.prepare(now, grads, finite)
        self._update()
        for grad in self._grads:
            grad.zero_()
        return applied

    def _wrap(self, config: Config, student: nn.Module) -> nn.Module:
        """What is called in the student's place, made while its weights are still fp32 and its own."""
        return student

    def _reduce(self) -> None:
        """Averages the gradients over the ranks."""
        for grad in self._grads:
            self.ranks.mean_(grad)

    def _update(self) -> None:
        self.optimizer.step()

    def _add_micro_batch(self) -> None:
        if self._grads is not self._micro_grads:
            for total, grad in zip(self._grads, self._micro_grads, strict=True):
                total.add_(grad)
                grad.zero_()

    def _point_gradients(self) -> None:
        for group, grads in zip(self.groups, self._micro_grads, strict=True):
            point_into(grads, list(group.params.values()), grad=True)

    def _publish_student(self) -> None:
        for group in self.optimizer.param_groups:
            if group["shard"].param_lp is not None:
                group["shard"].param_lp.copy_(group["shard"].param)
