"""The engine's interface, and the engine in plain torch: nothing is sharded, gradients are all-reduced.

It is the definition that DeepSpeed's engines are tested against.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # all of them, SyncBatchNorm too

from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.engine.optimizer import OPTIMIZERS, Shard, parameter_groups, segments
from fastdino.engine.schedules import Now


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter ``name``, as this rank holds them.

    ``tensors`` are live 1-D fp32 views: ``param`` (the master weight), ``ema`` (the teacher), and the optimizer's
    moments, ``exp_avg`` and ``exp_avg_sq`` (AdamW) or ``momentum_buffer`` (SGD, LARS). A parameter that is not trained
    has ``param`` and ``ema`` only, one tensor. Writing into them and calling :meth:`Engine.after_load` loads them.
    """

    name: str
    start: int
    stop: int
    tensors: dict[str, Tensor]


class Engine:
    """Student, teacher and optimizer of one rank. Subclasses differ in how they shard and reduce.

    Attributes:
        student: call it with the views; may wrap ``student_network``.
        student_network: the bare student, for names, shapes and buffers.
        teacher: call it, or its parts, after :meth:`wait_teacher`. Its weights are views of flat buffers in the
            precision of the run; their fp32 originals are the fragments' ``ema``.
        saves: this rank's fragments belong into a checkpoint.
    """

    student: nn.Module
    sharded: bool

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.accumulate = ranks, config.engine.accumulate
        self.student_network, self.teacher = student, teacher
        self.dtype = torch.bfloat16 if uses_bf16(config, ranks) else torch.float32
        self.groups = parameter_groups(student)
        self.optimizer = OPTIMIZERS[config.optim.name](self.groups, config.optim)
        self._untrained = {
            n: p.detach().flatten().clone() for n, p in student.named_parameters() if not p.requires_grad
        }
        self._gathers: list[dist.Work] = []
        for network in (student, teacher):
            for module in network.modules():
                if isinstance(module, BatchNorm):  # torch takes running statistics in the dtype of the weights only
                    for name, buffer in module.named_buffers(recurse=False):
                        setattr(module, name, buffer.to(self.dtype) if buffer.is_floating_point() else buffer)

    @property
    def saves(self) -> bool:
        return self.sharded or self.ranks.is_main

    @property
    def grad_norm(self) -> Tensor:
        """0-d norm of the last step's gradient over all parameters, before clipping."""
        return self.optimizer.grad_norm

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss / engine.accumulate``; called engine.accumulate times before :meth:`step`."""
        raise NotImplementedError

    def step(self, now: Now, finite: Tensor) -> None:
        """Clips, updates the student, then the teacher. Reads nothing back from the device.

        When ``finite`` (0-d bool on the device: this rank's losses are) is False or a gradient is not finite, on any
        rank, nothing changes on all ranks but the counters of skipped steps.
        """
        raise NotImplementedError

    def fragments(self) -> Iterator[Fragment]:
        """Every piece of every parameter that this rank holds; the ranks that save cover each element once."""
        for group in self.optimizer.param_groups:
            shard: Shard = group["shard"]
            state = self.optimizer.state[shard.param]
            flats = {"param": shard.param.detach(), "ema": shard.ema, **{k: state[k] for k in self.optimizer.moments}}
            for i, piece in enumerate(shard.pieces):
                views = {key: shard.views(flat)[i] for key, flat in flats.items()}
                yield Fragment(piece.name, piece.start, piece.stop, views)
        if not self.sharded or self.ranks.is_main:
            for name, values in self._untrained.items():
                yield Fragment(name, 0, values.numel(), {"param": values, "ema": values})

    def counters(self) -> dict[str, Tensor]:
        """Small live tensors, equal on all ranks, that a checkpoint needs beside the fragments.

        ``steps`` taken or skipped, ``skipped`` in all, ``skipped_in_row`` up to now, ``last_skipped`` (``steps`` before
        it; -1: none), and ``updates/GROUP``, the updates that AdamW's bias correction counts.
        """
        optimizer = self.optimizer
        updates = {
            f"updates/{g['group'].name}": optimizer.state[g["shard"].param]["step"] for g in optimizer.param_groups
        }
        return {**optimizer.counters, **updates}

    def load_counters(self, counters: dict[str, Tensor]) -> None:
        """Copies what :meth:`counters` gave. Raises KeyError when one is missing."""
        for name, counter in self.counters().items():
            counter.copy_(counters[name])

    @torch.no_grad()
    def after_load(self) -> None:
        """Rebuilds student and teacher weights from the fragments; every rank calls it."""
        self._publish_student()
        teacher, student = dict(self.teacher.named_parameters()), dict(self.student_network.named_parameters())
        for name, values in self._untrained.items():
            if self.ranks.world_size > 1:
                dist.broadcast(values, 0)
            for param in (teacher[name], student[name]):
                param.copy_(values.view_as(param))
        for group in self.optimizer.param_groups:
            if group["shard"].ema_shadow is not None:
                group["shard"].ema_shadow.copy_(group["shard"].ema)
        self._gather_teacher()
        self.wait_teacher()

    def wait_teacher(self) -> None:
        """Makes the teacher's weights ready on the current stream. Call it before anything reads them; a call of the
        teacher as a whole does."""
        while self._gathers:
            self._gathers.pop().wait()

    def _publish_student(self) -> None:
        """Writes the student's weights from the masters."""
        raise NotImplementedError

    @torch.no_grad()
    def _adopt(self, masters: list[Tensor], shadows: list[Tensor | None], parts: int, part: int) -> None:
        """Takes this rank's masters, slice ``part`` of ``parts`` of each group, and lays the teacher out like them.

        ``shadows`` are the student's weights that our optimizer has to write beside the masters.
        """
        teacher, shards = dict(self.teacher.named_parameters()), []
        self._teacher_flats: list[tuple[Tensor, Tensor]] = []  # all of a group, this rank's slice
        for group, master, shadow in zip(self.groups, masters, shadows, strict=True):
            size = master.numel()
            flat = torch.zeros(size * parts, dtype=self.dtype, device=master.device)
            point_into(flat, [teacher[name] for name in group.params])
            mine = flat[part * size : (part + 1) * size]
            ema = mine if self.dtype == torch.float32 else torch.empty_like(master)
            ema.copy_(master)
            pieces = segments(group, part * size, (part + 1) * size)
            shards.append(Shard(master, ema, pieces, shadow, None if ema is mine else mine))
            self._teacher_flats.append((flat, mine))
        for name in self._untrained:
            teacher[name].data = teacher[name].data.to(self.dtype)
        reduce = self.ranks.sum_ if self.sharded and self.ranks.world_size > 1 else None
        self.optimizer.bind(shards, reduce)
        self.teacher.register_forward_pre_hook(lambda *_: self.wait_teacher())

    def _gather_teacher(self) -> None:
        """Starts to collect the other ranks' slices of the teacher, beside whatever the device does next."""
        if self.sharded and self.ranks.world_size > 1:
            for flat, mine in self._teacher_flats:
                work = dist.all_gather_into_tensor(flat, mine, async_op=True)
                self._gathers.append(work)


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
    def step(self, now: Now, finite: Tensor) -> None:
        finite = self._reduce(finite)
        pieces = []
        for group, grad in zip(self.optimizer.param_groups, self._grads, strict=True):
            shard: Shard = group["shard"]
            shard.param.grad = grad
            pieces += shard.views(grad)
        self.optimizer.prepare(now, pieces, finite)
        self._update()
        for grad in self._grads:
            grad.zero_()

    def _wrap(self, config: Config, student: nn.Module) -> nn.Module:
        """What is called in the student's place, made while its weights are still fp32 and its own."""
        return student

    def _reduce(self, finite: Tensor) -> Tensor:
        """Makes the gradients their mean over the ranks; whether the step is finite, as far as that does not say it."""
        if self.ranks.world_size > 1:
            self._grads[0][:1].add_(torch.where(finite, 0.0, torch.nan))  # tells the others within the same all-reduce
            for grad in self._grads:
                dist.all_reduce(grad)
                grad.div_(self.ranks.world_size)
        return finite

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
            if group["shard"].param_shadow is not None:
                group["shard"].param_shadow.copy_(group["shard"].param)


def uses_bf16(config: Config, ranks: Ranks) -> bool:
    """True when weights and gradients of the forward and backward passes are bf16."""
    precision = config.engine.precision
    return precision == "bf16" or (precision == "auto" and ranks.device.type == "cuda")


def point_into(flat: Tensor, params: list[nn.Parameter], grad: bool = False) -> None:
    """Copies the parameters one after another into ``flat`` and makes them (or their gradients) views of it."""
    position = 0
    for param in params:
        view = flat[position : position + param.numel()].view_as(param)
        if grad:
            param.grad = view
        else:
            view.copy_(param.data)
            param.data = view
        position += param.numel()
