"""AdamW, SGD and LARS on flat fp32 shards, the teacher among their states; nothing is read back from the device.

A shard is one rank's slice of a parameter group, whose tensors lie one after another in one flat tensor. A tensor may
straddle ranks, so its norm is summed over them: one all-reduce of one number per tensor and step.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdino.config import OptimConfig
from fastdino.distributed import Ranks
from fastdino.engine.groups import Group
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Shard
from fastdino.model.network import layer_rates
from fastdino_kernels import AdamWHyper, adamw_ema_, ema_update_, make_segments, segment_squares

SGD_MOMENTUM = 0.9  # LARS too
LARS_ETA = 0.001


@dataclass(frozen=True)
class Step:
    """What is decided for a step from all gradients, before any of them is used. All tensors are on the device."""

    now: Now
    applied: Tensor
    """0-d bool; False: the step changes nothing."""
    found_inf: Tensor
    """0-d fp32; torch's convention: non-zero skips the update."""
    momentum: Tensor
    """0-d weight of the old teacher, 1 in a skipped step; fp64, in which 1 - momentum keeps its digits."""
    scale: Tensor
    """(parameters + 1,) fp32 clip coefficient of each; the last is padding's."""


class Optimizer(torch.optim.Optimizer):
    """What the three optimizers share: clipping, the skip of a non-finite step, the teacher, counters.

    A step is :meth:`prepare` with the gradients of all groups, then :meth:`step`, which may be called once for all
    groups or, as DeepSpeed does, once for each. Before the first, :meth:`bind` names the shards.
    """

    moments: tuple[str, ...]

    def __init__(self, groups: list[Group], config: OptimConfig) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0, "frozen": False}
        super().__init__([{"params": list(group.params.values()), "group": group} for group in groups], defaults)
        self.config = config

    def bind(self, shards: list[Shard], sharded: bool, ranks: Ranks) -> None:
        """Makes the shards what the groups update, with moments of zero.

        ``sharded``: the other ranks hold the other shares, so norms are sums over ranks.
        """
        names = [name for group in self.param_groups for name in group["group"].params]
        index = {name: i for i, name in enumerate(names)} | {None: len(names)}  # padding counts as one more parameter
        device, self.num_params = shards[0].param.device, len(names)
        self.sharded, self.ranks = sharded, ranks
        rates = layer_rates(names, self.config.layer_decay, self.config.patch_embed_lr)
        for group, shard in zip(self.param_groups, shards, strict=True):
            segments = list(shard.segments())
            group["params"], group["shard"] = [shard.param], shard
            group["segments"] = make_segments([length for _, length in segments], device)
            group["index"] = torch.tensor([index[name] for name, _ in segments], device=device)
            scales = [1.0 if name is None else rates[name] for name, _ in segments]
            stops = group["group"].last_layer and self.config.freeze_how == "lr"  # a rate of 0 has to leave every bit
            group["lr_scale"] = torch.tensor(scales, device=device) if stops or {*scales} - {1.0} else None
            state: dict[str, Tensor] = {key: torch.zeros_like(shard.param) for key in self.moments}
            state["ema"] = shard.ema
            state["step"] = torch.zeros((), device=device)  # updates so far
            self.state[shard.param] = state
        self.index = torch.cat([group["index"] for group in self.param_groups])
        parts = [name.split(".")[0] for name in names] + [""]  # backbone, head, patch_head; padding is for itself
        self.modules = torch.tensor([[part == module for part in parts] for module in parts], device=device)
        self.module_rows = {part: parts.index(part) for part in parts if part}
        self.counters = {
            key: torch.zeros((), dtype=torch.long, device=device) for key in ("steps", "skipped", "skipped_in_row")
        }
        self.counters["last_skipped"] = torch.full((), -1, device=device)
        self.grad_norm = torch.zeros((), device=device)  # of the newest step, over all parameters, before clipping
        self.squares = torch.zeros(len(names) + 1, device=device)  # of the same by parameter; where a graph writes too

    @torch.no_grad()
    def prepare(self, now: Now, grads: list[Tensor], loss: Tensor) -> Tensor:
        """Sets the schedules' values and judges the step from all gradients; returns ``applied``, 0-d bool.

        Args:
            now: what the schedules say.
            grads: of every group's shard, flat, zero in padding, of any dtype. Where the ranks hold the same shards,
                their gradients are summed already.
            loss: 0-d fp32 of this rank; one that is not finite on any rank makes the step a no-op on all.
        """
        for group in self.param_groups:
            frozen = now.freeze_last_layer and group["group"].last_layer
            group["lr"] = 0.0 if frozen and self.config.freeze_how == "lr" else now.lr
            group["weight_decay"] = now.weight_decay if group["group"].regularized else 0.0
            group["frozen"] = frozen and self.config.freeze_how == "skip"
        squares = self.squares.zero_()
        segments = [group["segments"] for group in self.param_groups]
        found = [segment_squares(grad, of_grad) for grad, of_grad in zip(grads, segments, strict=True)]
        squares.index_add_(0, self.index, torch.cat(found))
        squares[-1:].copy_(loss.detach() * 0)  # padding's place tells the other ranks of a loss that is not finite
        self.ranks.sum_(squares if self.sharded else squares[-1:])
        torch.sqrt(squares.sum(), out=self.grad_norm)
        applied = self.grad_norm < math.inf  # NaN is not
        self.plan = Step(
            now,
            applied,
            found_inf=(~applied).float(),
            momentum=1 - applied.double() * (1 - now.momentum),
            scale=(self.config.clip / (self._clip_norms(squares) + 1e-6)).clamp(max=1),
        )
        self._count(applied)
        return applied

    def _clip_norms(self, squares: Tensor) -> Tensor:
        """(parameters + 1,) norms of what each parameter is clipped with, from its squares."""
        match self.config.clip_mode:
            case "tensor":
                return squares.sqrt()
            case "module":
                return self._by_module(squares)
            case "global":
                return self.grad_norm.expand_as(squares)

    def _by_module(self, squares: Tensor) -> Tensor:
        """(parameters + 1,) norm of the module that each parameter is in."""
        return torch.where(self.modules, squares, 0.0).sum(dim=1).sqrt()

    def grad_norms(self) -> dict[str, Tensor]:
        """0-d norms of the newest step's gradient before clipping: of all, and of each module of the network."""
        norms = self._by_module(self.squares)
        return {"grad_norm": self.grad_norm} | {f"grad_norm_{part}": norms[i] for part, i in self.module_rows.items()}

    def _count(self, applied: Tensor) -> None:
        skipped = (~applied).long()
        count = self.counters
        count["last_skipped"].copy_(torch.where(applied, count["last_skipped"], count["steps"]))
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
                ema_update_(shard.ema, param, self.plan.momentum, shard.ema_lp)
            else:
                assert shard.param.grad is not None
                state["step"].add_(self.plan.applied)
                self.update(group, param, shard.param.grad, state)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        """One group's clipped update, and its teacher's; nothing changes in a step that is skipped."""
        raise NotImplementedError

    def _clip_(self, group: dict[str, Any], grad: Tensor) -> None:
        if self.config.clip:
            torch._foreach_mul_(group["segments"].split(grad), list(self.plan.scale[group["index"]].unbind()))

    def _follow(self, shard: Shard, param: Tensor) -> None:
        ema_update_(shard.ema, param, self.plan.momentum, shard.ema_lp)
        if shard.param_lp is not None:
            shard.param_lp.copy_(param)


class AdamW(Optimizer):
    """AdamW with beta1 0.9 and eps 1e-8, clipping, each parameter's own rate and teacher in one pass.

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        shard: Shard = group["shard"]
        now, config, lr_scale = self.plan.now, self.config, group["lr_scale"]
        clip = self.plan.scale[group["index"]] if config.clip else None
        segments = None if clip is None and lr_scale is None else group["segments"]
        adamw_ema_(
            param, grad, state["exp_avg"], state["exp_avg_sq"], shard.ema, state["step"],
            AdamWHyper(group["lr"], group["weight_decay"], now.momentum, betas=(0.9, config.beta2)),
            grad_scale=clip, lr_scale=lr_scale, segments=segments,
            found_inf=self.plan.found_inf, param_lp=shard.param_lp, ema_lp=shard.ema_lp,
        )  # fmt: skip


class SGD(Optimizer):
    """SGD with momentum 0.9; weight decay is added to the gradient, as in torch.optim.SGD."""

    moments = ("momentum_buffer",)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        self._clip_(group, grad)
        torch._fused_sgd_(
            [param], [grad], [state["momentum_buffer"]],
            lr=group["lr"], momentum=SGD_MOMENTUM, weight_decay=group["weight_decay"], dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, found_inf=self.plan.found_inf,
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
        velocity.copy_(torch.where(self.plan.applied, velocity * SGD_MOMENTUM + grad, velocity))
        param.copy_(torch.where(self.plan.applied, param - group["lr"] * velocity, param))
        self._follow(group["shard"], param)

    def _norms(self, group: dict[str, Any], flat: Tensor) -> Tensor:
        """(num_segments,) L2 norms of the whole parameters that the segments are pieces of."""
        squares = flat.new_zeros(self.num_params + 1)
        squares.index_add_(0, group["index"], segment_squares(flat, group["segments"]))
        if self.sharded:
            self.ranks.sum_(squares)
        return squares.sqrt()[group["index"]]


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "lars": LARS}
