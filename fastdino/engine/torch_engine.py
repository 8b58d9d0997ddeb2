"""The engine in plain torch: nothing is sharded, gradients are all-reduced.

It is the definition that DeepSpeed's engines are tested against.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.engine.engine import Engine
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Values, cast, fill, fragments, point_into, views_of


class TorchEngine(Engine):
    """One flat fp32 master per group on every rank; in bf16 the student's weights and gradients are flat bf16."""

    sharded = False

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks, values: Values) -> None:
        super().__init__(config, student, teacher, ranks, values)
        masters = [torch.empty(group.numel, device=ranks.device) for group in self.groups]
        for group, master in zip(self.groups, masters, strict=True):
            point_into(master, list(group.params.values()))
            fill(master, fragments(group, 0, group.numel), values)
            if ranks.world_size > 1:
                dist.broadcast(master, 0)  # replicas are equal to the bit, whatever computed them
        for name in self._untrained:
            cast(student.get_parameter(name), torch.float32, ranks.device)
        self.student = self._wrap(config, student)
        for name in self._untrained:
            cast(student.get_parameter(name), self.dtype, ranks.device)
        weights = [master.to(self.dtype) for master in masters]  # the master itself in fp32
        for group, flat in zip(self.groups, weights, strict=True):
            point_into(flat, list(group.params.values()))
        self._micro_batch = 0
        self._grads = [torch.zeros_like(master) for master in masters]  # fp32 sums over micro batches
        params = [list(group.params.values()) for group in self.groups]
        self._sums = [(of, grad, views_of(grad, of)) for of, grad in zip(params, self._grads, strict=True)]
        self._later: list[tuple[Tensor, list[Tensor]]] = []  # in bf16, where later micro batches are made flat first
        if self.dtype != torch.float32 and self.accumulate > 1:
            flats = [torch.zeros_like(flat) for flat in weights]
            self._later = [(flat, views_of(flat, of)) for flat, of in zip(flats, params, strict=True)]
        self._adopt(masters, [None if f is m else f for f, m in zip(weights, masters, strict=True)], parts=1, part=0)
        self.after_load()

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulate).backward()
        self._take_gradients()

    @torch.no_grad()
    def step(self, now: Now, loss: Tensor) -> Tensor:
        assert self._micro_batch == self.accumulate, f"{self._micro_batch} backward passes before a step"
        self._micro_batch = 0
        self._reduce()
        for group, grad in zip(self.optimizer.param_groups, self._grads, strict=True):
            group["shard"].param.grad = grad
        applied = self.optimizer.prepare(now, self._grads, loss)
        self._update()
        return applied

    def abandon(self) -> None:
        self._micro_batch = 0
        for params, *_ in self._sums:
            for param in params:
                param.grad = None

    def _wrap(self, config: Config, student: nn.Module) -> nn.Module:
        """What is called in the student's place, made while its weights are still fp32 and its own."""
        return student

    def _reduce(self) -> None:
        """Averages the gradients over the ranks."""
        for grad in self._grads:
            self.ranks.mean_(grad)

    def _update(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """Adds what a backward pass has left in the parameters to the flat sums, in a launch or two per group.

        A parameter begins each pass without a gradient: autograd then hands over a tensor of its own, where it would
        add to one that is there parameter by parameter.
        """
        for i, (params, total, views) in enumerate(self._sums):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            for param in params:
                param.grad = None
            if self._micro_batch == 0:
                torch._foreach_copy_(views, grads)
            elif not self._later:
                torch._foreach_add_(views, grads)
            else:
                flat, parts = self._later[i]
                torch._foreach_copy_(parts, grads)
                total.add_(flat)
        self._micro_batch += 1

    def _publish_student(self) -> None:
        for group in self.optimizer.param_groups:
            if group["shard"].param_lp is not None:
                group["shard"].param_lp.copy_(group["shard"].param)
