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
from fastdino.engine.schedules import Now
from fastdino_kernels import AdamWHyper, adamw_ema_, ema_update_, make_segments, segment_squares

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
    """This rank's slice of a group: 1-D tensors of one length, which may end in padding."""

    param: Tensor  # fp32
    ema: Tensor  # fp32, the teacher
    pieces: list[Segment]
    param_lp: Tensor | None  # copies in the precision of the forward pass; None where there is none to write
    ema_lp: Tensor | None

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
        defaults = {"lr": 0.0, "weight_decay": 0.0, "frozen": False}
        super().__init__([{"params": list(group.params.values()), "group": group} for group in groups], defaults)
        self.clip, self.clip_mode = config.clip, config.clip_mode

    def bind(self, shards: list[Shard], reduce: Callable[[Tensor], object] | None) -> None:
        """Makes the shards what the groups update, with moments of zero. ``reduce`` sums over the ranks that hold the
        other slices, in place; None when each rank holds everything."""
        names = [name for group in self.param_groups for name in group["group"].params]
        device, self.reduce, self.num_params = shards[0].param.device, reduce, len(names)
        pieces = []
        for group, shard in zip(self.param_groups, shards, strict=True):
            pieces += [names.index(p.name) for p in shard.pieces]
            lengths = [p.stop - p.start for p in shard.pieces]
            group["params"], group["shard"] = [shard.param], shard
            group["segments"] = make_segments([*lengths, shard.param.numel() - sum(lengths)], device)
            # Padding is a parameter of its own, the last, whose norm is 0.
            group["index"] = torch.tensor([*(names.index(p.name) for p in shard.pieces), len(names)], device=device)
            state: dict[str, Tensor] = {key: torch.zeros_like(shard.param) for key in self.moments}
            state["ema"] = shard.ema
            state["step"] = torch.zeros((), device=device)  # updates so far
            self.state[shard.param] = state
        self.index = torch.tensor(pieces, dtype=torch.long, device=device)
        self.counters = {
            key: torch.zeros((), dtype=torch.long, device=device) for key in ("steps", "skipped", "skipped_in_row")
        }
        self.counters["last_skipped"] = torch.full((), -1, device=device)
        self.grad_norm = torch.zeros((), device=device)  # of the newest step, over all parameters, before clipping

    @torch.no_grad()
    def prepare(self, now: Now, grads: list[Tensor], finite: Tensor) -> None:
        """Sets the schedules' values and judges the step from all gradients, before any of them is used.

        Args:
            now: what the schedules say.
            grads: the gradient of every piece of every group's shard, in order; any shape and dtype.
            finite: 0-d bool; False makes the step a no-op, on all ranks among which the shards are split.
        """
        self.now = now
        for group in self.param_groups:
            group["lr"] = now.lr
            group["weight_decay"] = now.weight_decay if group["group"].regularized else 0.0
            group["frozen"] = now.freeze_last_layer and group["group"].last_layer
        squares = torch.where(finite, self.grad_norm.new_zeros(self.num_params + 1), torch.nan)  # nan reaches all ranks
        if grads:
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
            squares.index_add_(0, self.index, norms.square())
        self._sum_over_ranks(squares)
        self.grad_norm = squares.sum().sqrt()
        self.ok = torch.isfinite(self.grad_norm)
        self.found_inf = (~self.ok).float()  # the fused kernels' word for: leave everything as it is
        # In fp64 1 - momentum keeps its digits; 1, for a skipped step, leaves the teacher bit for bit.
        self.momentum = 1 - self.ok.double() * (1 - now.momentum)
        norms = squares.sqrt() if self.clip_mode == "tensor" else self.grad_norm.expand_as(squares)
        self.scale = (self.clip / (norms + 1e-6)).clamp(max=1)
        self._count()

    def _sum_over_ranks(self, squares: Tensor) -> None:
        if self.reduce is not None:
            self.reduce(squares)

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
            param, state = shard.param.detach(), self.state[shard.param]
            if group["frozen"]:  # DINO v1 sets these gradients to None: no moment, no decay, no count either
                ema_update_(shard.ema, param, self.momentum, shard.ema_lp)
            else:
                assert shard.param.grad is not None
                state["step"].add_(self.ok)
                self.update(group, param, shard.param.grad, state)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """One group's clipped update, and its teacher's; nothing changes where ``self.ok`` is False."""
        raise NotImplementedError

    def _clip_(self, group: dict[str, Any], grad: Tensor) -> None:
        if self.clip:
            torch._foreach_mul_(group["segments"].split(grad), list(self.scale[group["index"]].unbind()))

    def _follow(self, shard: Shard, param: Tensor) -> None:
        ema_update_(shard.ema, param, self.momentum, shard.ema_lp)
        if shard.param_lp is not None:
            shard.param_lp.copy_(param)


class AdamW(Optimizer):
    """AdamW with betas 0.9, 0.999 and eps 1e-8, clipping and teacher in one pass.

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        shard: Shard = group["shard"]
        clip = {"grad_scale": self.scale[group["index"]], "segments": group["segments"]} if self.clip else {}
        adamw_ema_(
            param, grad, state["exp_avg"], state["exp_avg_sq"], shard.ema, state["step"],
            AdamWHyper(group["lr"], group["weight_decay"], self.now.momentum),
            found_inf=self.found_inf, param_lp=shard.param_lp, ema_lp=shard.ema_lp, **clip,
        )  # fmt: skip


class SGD(Optimizer):
    """SGD with momentum 0.9; weight decay is added to the gradient, as in torch.optim.SGD."""

    moments = ("momentum_buffer",)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        self._clip_(group, grad)
        torch._fused_sgd_(
            [param], [grad], [state["momentum_buffer"]],
            lr=group["lr"], momentum=SGD_MOMENTUM, weight_decay=group["weight_decay"], dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, found_inf=self.found_inf,
        )  # fmt: skip
        self._follow(group["shard"], param)


class LARS(Optimizer):
    """Layer-wise adaptive rates: momentum 0.9, trust ratio 0.001 * norm(w) / norm(grad + decay) for each tensor.

    Biases and 1-D parameters take the plain gradient. Source: You et al. 2017; DINO v1's LARS.
    """

    moments = ("momentum_buffer",)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        self._clip_(group, grad)
        if group["group"].regularized:
            grad.add_(param, alpha=group["weight_decay"])
            weights, updates = (self._norms(group, flat) for flat in (param, grad))
            ratio = torch.where((weights > 0) & (updates > 0), LARS_ETA * weights / updates, 1.0)
            torch._foreach_mul_(group["segments"].split(grad), list(ratio.unbind()))
        velocity = state["momentum_buffer"]
        velocity.copy_(torch.where(self.ok, velocity * SGD_MOMENTUM + grad, velocity))
        param.copy_(torch.where(self.ok, param - group["lr"] * velocity, param))
        self._follow(group["shard"], param)

    def _norms(self, group: dict[str, Any], flat: Tensor) -> Tensor:
        """(num_segments,) L2 norms of the whole parameters that the segments are pieces of."""
        squares = flat.new_zeros(self.num_params + 1)
        squares.index_add_(0, group["index"], segment_squares(flat, group["segments"]))
        self._sum_over_ranks(squares)
        return squares.sqrt()[group["index"]]


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "lars": LARS}
