"""AdamW, SGD and LARS on flat fp32 shards, the teacher among their states; nothing is read back from the device.

A shard is one rank's slice of a parameter group, whose tensors lie one after another in one flat tensor. A tensor may
straddle ranks, so its norm is summed over them: one all-reduce of one number per tensor and step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdino.config import OptimConfig
from fastdino.train.schedules import Now
from fastdino_kernels.ema import ema_update_

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
SGD_MOMENTUM = 0.9  # LARS too
LARS_ETA = 0.001


@dataclass(frozen=True)
class Group:
    """Trainable parameters that share weight decay and freezing, by name."""

    name: str
    regularized: bool  # gets weight decay, and under LARS the trust ratio
    last_layer: bool
    params: dict[str, nn.Parameter]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params.values())


def parameter_groups(network: nn.Module) -> list[Group]:
    """The trainable parameters of ``network`` in groups: decay, no_decay, last_layer; empty ones left out.

    Biases and 1-D parameters take no weight decay, everything else does, tokens and position embeddings included. The
    prototypes (names with ``last_layer``) are apart so that they can be frozen. Source: DINO v1's get_params_groups.
    """
    groups: dict[str, Group] = {}
    for name, param in network.named_parameters():
        if param.requires_grad:
            regularized = not (name.endswith(".bias") or param.ndim == 1)
            last_layer = "last_layer" in name
            key = ("last_layer_" if last_layer else "") + ("decay" if regularized else "no_decay")
            groups.setdefault(key, Group(key, regularized, last_layer, {})).params[name] = param
    return [groups[key] for key in ("decay", "no_decay", "last_layer_decay", "last_layer_no_decay") if key in groups]


class Segment(NamedTuple):
    """Elements [start, stop) of a flattened parameter, at ``offset`` of this rank's shard."""

    name: str
    start: int
    stop: int
    offset: int


def segments(group: Group, start: int, stop: int) -> list[Segment]:
    """What elements [start, stop) of the group's flat tensor are; padding beyond its last parameter is nothing."""
    found, position = [], 0
    for name, param in group.params.items():
        low, high = max(start, position), min(stop, position + param.numel())
        if low < high:
            found.append(Segment(name, low - position, high - position, low - start))
        position += param.numel()
    return found


@dataclass(frozen=True)
class Shard:
    """This rank's slice of a group. ``ema`` is the teacher's; ``shadow`` its rounded copy that the teacher computes
    with, None where that is ``ema`` itself."""

    param: Tensor  # 1-D fp32
    ema: Tensor
    shadow: Tensor | None
    pieces: list[Segment]

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view of ``flat``, laid out like the shard, for each piece."""
        return [flat[p.offset : p.offset + p.stop - p.start] for p in self.pieces]


class Optimizer(torch.optim.Optimizer):
    """What the three optimizers share: clipping, the skip of a non-finite step, the teacher, counters.

    A step is :meth:`prepare` with the gradients of all groups, then :meth:`step`, which may be called once for all
    groups or, as DeepSpeed does, once for each. Before the first, :meth:`bind` names the shards.
    """

    moments: tuple[str, ...]

    def __init__(self, groups: list[Group], config: OptimConfig) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": 1.0, "frozen": False}
        super().__init__([{"params": list(group.params.values()), "group": group} for group in groups], defaults)
        self.clip, self.clip_mode = config.clip, config.clip_mode

    def bind(self, shards: list[Shard], reduce: Callable[[Tensor], object] | None) -> None:
        """Makes the shards what the groups update, with moments of zero. ``reduce`` sums over the ranks that hold the
        other slices, in place; None when each rank holds everything."""
        names = [name for group in self.param_groups for name in group["group"].params]
        device = shards[0].param.device
        for group, shard in zip(self.param_groups, shards, strict=True):
            group["params"], group["shard"] = [shard.param], shard
            group["index"] = torch.tensor([names.index(p.name) for p in shard.pieces], dtype=torch.long, device=device)
            state: dict[str, Tensor] = {key: torch.zeros_like(shard.param) for key in self.moments}
            state["ema"] = shard.ema
            state["step"] = torch.zeros((), device=device)  # updates so far; fp32 because the fused kernels want it
            self.state[shard.param] = state
        self.index = torch.cat([group["index"] for group in self.param_groups])
        self.reduce, self.num_params = reduce, len(names)
        self.counters = {
            key: torch.zeros((), dtype=torch.long, device=device) for key in ("steps", "skipped", "skipped_in_row")
        }
        self.counters["last_skipped"] = torch.full((), -1, device=device)

    @torch.no_grad()
    def prepare(self, now: Now, grads: list[Tensor], finite: Tensor) -> None:
        """Sets the schedules' values and judges the step from all gradients, before any of them is used.

        Args:
            now: what the schedules say.
            grads: the gradient of every piece of every group's shard, in order; any shape and dtype.
            finite: 0-d bool; False makes the step a no-op, on all ranks among which the shards are split.
        """
        for group in self.param_groups:
            group["lr"], group["momentum"] = now.lr, now.momentum
            group["weight_decay"] = now.weight_decay if group["group"].regularized else 0.0
            group["frozen"] = now.freeze_last_layer and group["group"].last_layer
        squares = self._sum_squares(grads, self.index, torch.where(finite, 0.0, torch.nan))
        self.grad_norm = squares.sum().sqrt()
        self.ok = torch.isfinite(self.grad_norm)
        self.found_inf = (~self.ok).float()  # the fused kernels' word for: leave everything as it is
        norms = squares.sqrt() if self.clip_mode == "tensor" else self.grad_norm.expand(self.num_params)
        self.scale = (self.clip / (norms + 1e-6)).clamp(max=1)
        self._count()

    def _sum_squares(self, tensors: list[Tensor], index: Tensor, offset: float | Tensor = 0.0) -> Tensor:
        """(num_params,) squared L2 norms of whole parameters, from the pieces of those in ``index``.

        A not finite ``offset`` of one rank reaches all of them through the sum.
        """
        squares = torch.zeros(self.num_params, device=index.device)
        if tensors:
            norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
            squares.index_copy_(0, index, norms.square())  # a rank holds at most one piece of a parameter
        squares.add_(offset)
        if self.reduce is not None:
            self.reduce(squares)
        return squares

    def _count(self) -> None:
        skipped = (~self.ok).long()
        count = self.counters
        count["last_skipped"].copy_(torch.where(self.ok, count["last_skipped"], count["steps"]))
        count["skipped"].add_(skipped)
        count["skipped_in_row"].add_(1).mul_(skipped)
        count["steps"].add_(1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the groups' parameters and moments unless frozen, then their teacher."""
        for group in self.param_groups:
            shard: Shard = group["shard"]
            state = self.state[shard.param]
            if not group["frozen"]:  # DINO v1 sets these gradients to None: no moment, no decay, no count either
                assert shard.param.grad is not None
                state["step"].add_(self.ok)
                if self.clip and shard.pieces:
                    torch._foreach_mul_(shard.views(shard.param.grad), list(self.scale[group["index"]].unbind()))
                self.update(group, shard.param, shard.param.grad, state)
            # In fp64 1 - momentum keeps its digits; momentum 1, for a skipped step, leaves the teacher bit for bit.
            momentum = 1 - self.ok.double() * (1 - group["momentum"])
            ema_update_(shard.ema, shard.param.detach(), momentum, shard.shadow)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """One group's update from clipped gradients; nothing changes where ``self.ok`` is False."""
        raise NotImplementedError


class AdamW(Optimizer):
    """AdamW with betas 0.9, 0.999 and eps 1e-8. Source: Loshchilov and Hutter 2019, algorithm 2."""

    moments = ("exp_avg", "exp_avg_sq")

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        torch._fused_adamw_(
            [param], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            lr=group["lr"], beta1=ADAM_BETAS[0], beta2=ADAM_BETAS[1], weight_decay=group["weight_decay"], eps=ADAM_EPS,
            amsgrad=False, maximize=False, found_inf=self.found_inf,
        )  # fmt: skip


class SGD(Optimizer):
    """SGD with momentum 0.9; weight decay is added to the gradient, as in torch.optim.SGD."""

    moments = ("momentum_buffer",)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        torch._fused_sgd_(
            [param], [grad], [state["momentum_buffer"]],
            lr=group["lr"], momentum=SGD_MOMENTUM, weight_decay=group["weight_decay"], dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, found_inf=self.found_inf,
        )  # fmt: skip


class LARS(Optimizer):
    """Layer-wise adaptive rates: momentum 0.9, trust ratio 0.001 * norm(w) / norm(grad + decay) for each tensor.

    Biases and 1-D parameters take the plain gradient. Source: You et al. 2017; DINO v1's LARS.
    """

    moments = ("momentum_buffer",)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        shard: Shard = group["shard"]
        if group["group"].regularized:
            grad.add_(param, alpha=group["weight_decay"])
            weights, updates = (
                self._sum_squares(shard.views(flat), group["index"]).sqrt() for flat in (param.detach(), grad)
            )
            ratio = torch.where((weights > 0) & (updates > 0), LARS_ETA * weights / updates, 1.0)
            if shard.pieces:
                torch._foreach_mul_(shard.views(grad), list(ratio[group["index"]].unbind()))
        velocity = state["momentum_buffer"]
        velocity.copy_(torch.where(self.ok, velocity * SGD_MOMENTUM + grad, velocity))
        param.copy_(torch.where(self.ok, param - group["lr"] * velocity, param))


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "lars": LARS}
