"""The engine's interface: student, teacher and optimizer of one rank, whatever shards and reduces them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # all of them, SyncBatchNorm too

from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.engine.groups import parameter_groups
from fastdino.engine.optimizer import OPTIMIZERS
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Fragment, Shard, Values, cast, fragments, point_into

Region = tuple[nn.Module, str]  # of a network, for a compiler: a module and its method


class Engine(ABC):
    """Student, teacher and optimizer of one rank. Subclasses differ in how they shard and reduce.

    Attributes:
        student: call it with the views; may wrap ``student_network``.
        student_network: the bare student, for names and shapes.
        teacher: call it, or one of its parts, never a method of theirs: the call waits for the teacher to be gathered.
            Its weights are views of flat buffers in the precision of the run; their fp32 originals are the
            fragments' ``ema``.
        saves: True when this rank's fragments go into a checkpoint.
    """

    student: nn.Module
    sharded: bool

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks, values: Values) -> None:
        self.ranks, self.accumulate = ranks, config.engine.accumulate
        self.student_network, self.teacher = student, teacher
        self.dtype = torch.bfloat16 if config.engine.uses_bf16(ranks.device.type) else torch.float32
        self.groups = parameter_groups(student)
        self.optimizer = OPTIMIZERS[config.optim.name](self.groups, config.optim)
        frozen = {name: p.numel() for name, p in student.named_parameters() if not p.requires_grad}
        self._untrained = {name: values(name, 0, n).to(ranks.device, copy=True) for name, n in frozen.items()}
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

    def grad_norms(self) -> dict[str, Tensor]:
        """:attr:`grad_norm`, and as ``grad_norm_MODULE`` those of the network's modules: backbone, head, patch_head."""
        return self.optimizer.grad_norms()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss / engine.accumulate``; called engine.accumulate times before :meth:`step`."""

    @abstractmethod
    def step(self, now: Now, loss: Tensor) -> Tensor:
        """Clips, updates the student, then the teacher; returns ``applied``. Reads nothing back from the device.

        When ``loss`` (0-d fp32 on the device, of this rank) or a gradient is not finite, on any rank, nothing changes
        on all ranks but the counters of skipped steps, and ``applied`` (0-d bool on the device) is False.
        """

    def abandon(self) -> None:
        """Forgets the backward passes of a step that is not taken."""
        raise NotImplementedError

    def compilable(self, regions: list[Region]) -> list[Region]:
        """Those of the networks' regions that a compiler may have under this engine."""
        return regions

    def fragments(self, copy: Callable[[Tensor], Tensor] = lambda flat: flat) -> Iterator[Fragment]:
        """Every fragment of every parameter that this rank holds; the ranks that save cover each element once.

        Their tensors are views of what ``copy`` makes of each flat tensor; by default, of the flat tensors themselves:
        writing into those and calling :meth:`after_load` loads them.
        """
        for group in self.optimizer.param_groups:
            shard: Shard = group["shard"]
            state = self.optimizer.state[shard.param]
            flats = {"param": shard.param.detach(), "ema": shard.ema, **{k: state[k] for k in self.optimizer.moments}}
            views = {kind: shard.views(copy(flat)) for kind, flat in flats.items()}
            for i, fragment in enumerate(shard.fragments):
                yield replace(fragment, tensors={kind: parts[i] for kind, parts in views.items()})
        if not self.sharded or self.ranks.is_main:
            for name, values in self._untrained.items():
                same = copy(values)
                yield Fragment(name, 0, values.numel(), tensors={"param": same, "ema": same})

    def counters(self) -> dict[str, Tensor]:
        """Small live tensors, equal on all ranks.

        ``steps`` taken or skipped, ``skipped`` in all, ``skipped_in_row`` up to now, ``last_skipped`` (``steps`` before
        it; -1: none), and ``updates/GROUP``, the updates that AdamW's bias correction counts.
        """
        optimizer = self.optimizer
        updates = {
            f"updates/{g['group'].name}": optimizer.state[g["shard"].param]["step"] for g in optimizer.param_groups
        }
        return {**optimizer.counters, **updates}

    def state(self) -> dict[str, Tensor]:
        """Live tensors, equal on all ranks, that a checkpoint needs beside the fragments: counters and buffers.

        The buffers are those of the networks' state dicts: one that a module does not keep is made again with it.
        """
        state = {f"counter.{name}": value for name, value in self.counters().items()}
        for role, network in (("student", self.student_network), ("teacher", self.teacher)):
            trained = {name for name, _ in network.named_parameters()}
            state |= {f"{role}.{name}": x for name, x in network.state_dict().items() if name not in trained}
        return state

    @torch.no_grad()
    def after_load(self) -> None:
        """Rebuilds student and teacher weights from the fragments; every rank calls it."""
        self._publish_student()
        for name, values in self._untrained.items():
            if self.ranks.world_size > 1:
                dist.broadcast(values, 0)
            self._publish_untrained(name, values)
        for group in self.optimizer.param_groups:
            if group["shard"].ema_lp is not None:
                group["shard"].ema_lp.copy_(group["shard"].ema)
        self._gather_teacher()
        self.wait_teacher()

    def wait_teacher(self) -> None:
        """Makes the teacher's weights ready on the current stream; a call of the teacher does so by itself.

        Called also when nobody calls the teacher any more: nothing may be on its way when a rank leaves the others.
        """
        while self._gathers:
            self._gathers.pop().wait()

    @abstractmethod
    def _publish_student(self) -> None:
        """Writes the student's weights from the masters."""

    def _publish_untrained(self, name: str, values: Tensor) -> None:
        """Writes a parameter that is not trained, into both networks."""
        for network in (self.student_network, self.teacher):
            param = network.get_parameter(name)
            param.copy_(values.view_as(param))

    @torch.no_grad()
    def _adopt(self, masters: list[Tensor], weights: list[Tensor | None], parts: int, part: int) -> None:
        """Takes this rank's masters, slice ``part`` of ``parts`` of each group, and lays the teacher out like them.

        ``weights`` are the student's, where our optimizer has to write them beside the masters.
        """
        teacher, shards = dict(self.teacher.named_parameters()), []
        self._teacher_flats: list[tuple[Tensor, Tensor]] = []  # all of a group, this rank's slice
        for group, master, param_lp in zip(self.groups, masters, weights, strict=True):
            size = master.numel()
            flat = torch.zeros(size * parts, dtype=self.dtype, device=master.device)
            point_into(flat, [teacher[name] for name in group.params])
            mine = flat[part * size : (part + 1) * size]
            ema = mine if self.dtype == torch.float32 else torch.empty_like(master)
            ema.copy_(master)
            held = fragments(group, part * size, (part + 1) * size)
            shards.append(Shard(master, ema, held, param_lp, None if ema is mine else mine))
            self._teacher_flats.append((flat, mine))
        for name in self._untrained:
            cast(teacher[name], self.dtype, self.ranks.device)
        self.optimizer.bind(shards, self.sharded, self.ranks)
        for module in (self.teacher, *self.teacher.children()):
            module.register_forward_pre_hook(lambda *_: self.wait_teacher())

    def _gather_teacher(self) -> None:
        """Starts to collect the other ranks' slices of the teacher, beside whatever the device does next."""
        if self.sharded and self.ranks.world_size > 1:
            for flat, mine in self._teacher_flats:
                work = dist.all_gather_into_tensor(flat, mine, async_op=True)
                self._gathers.append(work)
