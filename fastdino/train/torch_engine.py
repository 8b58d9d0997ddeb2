"""The engine's interface."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastdino.train.schedules import Now


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter ``name``, as this rank holds them.

    ``tensors`` are live 1-D fp32 views: ``param`` (the master weight), ``ema`` (the teacher), and the optimizer's
    moments, ``exp_avg`` and ``exp_avg_sq`` (AdamW) or ``momentum_buffer`` (SGD, LARS). A parameter that is not trained
    has ``param`` and ``ema`` only. Writing into them and calling :meth:`Engine.after_load` loads a checkpoint.
    """

    name: str
    start: int
    stop: int
    tensors: dict[str, Tensor]


class Engine:
    """Student, teacher and optimizer of one rank; TorchEngine and DeepSpeedEngine differ only in how they shard."""

    student: nn.Module  # call it; may be a wrapper
    teacher: nn.Module  # call it under no_grad; waits for its own weights
    student_network: nn.Module  # the bare student: names, buffers
    saves: bool  # this rank's fragments belong into a checkpoint
    grad_norm: Tensor  # 0-d, norm over all parameters before clipping, of the last step

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss / engine.accumulate``; called engine.accumulate times before :meth:`step`."""
        raise NotImplementedError

    def step(self, now: Now, finite: Tensor) -> None:
        """Clips, updates student and teacher. Nothing changes on any rank when ``finite`` (0-d bool: this rank's losses
        are finite) is false or a gradient is not finite on any rank. Reads nothing back from the device."""
        raise NotImplementedError

    def fragments(self) -> Iterator[Fragment]:
        """Every piece of every parameter that this rank holds. Together the ranks that save cover each element once."""
        raise NotImplementedError

    def counters(self) -> dict[str, Tensor]:
        """Small live tensors, equal on all ranks: ``steps`` taken or skipped, ``skipped``, ``skipped_in_row``,
        ``last_skipped`` (value of ``steps`` before it, -1: none), ``updates/GROUP`` (AdamW's bias correction)."""
        raise NotImplementedError

    def load_counters(self, counters: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def after_load(self) -> None:
        """Rebuilds student and teacher weights from the fragments, on all ranks (a collective)."""
        raise NotImplementedError

    def wait_teacher(self) -> None:
        """Makes the teacher's weights safe to read; a forward pass of the teacher does it by itself."""
        raise NotImplementedError
