"""ZeRO 3: weights are cut into parts as well, parameter by parameter, and gathered while their module runs."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.distributed import Ranks
from fastdino.engine.engine import Region
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Fragment, Shard, Values, cast, fill, partitions
from fastdino.engine.zero import DeepSpeedEngine, deepspeed_config, import_deepspeed, initialize, local_rank

STAGE = 3


class PartitionedEngine(DeepSpeedEngine):
    """ZeRO 3: every rank holds its part of each parameter, of student and teacher, and of all that belongs to them.

    DeepSpeed gathers weights for each pass through a module and reduces gradients to their parts. The step is ours: its
    own waits for the gradients' norm, and steps a parameter that got no gradient with the one of the step before.
    A parameter's parts lie in flat tensors of one layout: its group's master, moments and teacher, all of this rank.
    """

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks, values: Values) -> None:
        super().__init__(config, student, teacher, ranks, values)
        deepspeed = import_deepspeed(ranks)
        # All that is read of whole parameters comes before they are cut, which leaves them without shape and elements.
        held = [partitions(group, ranks.world_size, ranks.rank) for group in self.groups]
        settings = deepspeed_config(config, STAGE, self.dtype == torch.bfloat16, **self._mark_units(deepspeed))
        for network in (student, teacher):
            self._cut(deepspeed, network, settings)
        self._deepspeed = initialize(ranks, student, settings, self.optimizer)
        self._keep_local_rank(deepspeed)
        self.student, self._zero = self._deepspeed, self._deepspeed.optimizer
        self._teacher_parts = initialize(ranks, teacher, _untrained_settings(settings)).optimizer
        self._zero.step = self._update  # DeepSpeed's engine calls it and keeps its own books
        shards = [self._shard(i, *held[i], values) for i in range(len(self.groups))]
        self.optimizer.bind(shards, self.sharded, ranks)
        self._grads = self._zero.grad_partitions_flat_buffer.split([shard.param.numel() for shard in shards])
        self.after_load()

    def backward(self, loss: Tensor) -> None:
        self._entered.clear()
        super().backward(loss)

    @torch.no_grad()
    def step(self, now: Now, loss: Tensor) -> Tensor:
        assert self._micro_batch == self.accumulate, f"{self._micro_batch} backward passes before a step"
        applied = self.optimizer.prepare(now, list(self._grads), loss)
        self._deepspeed.step()
        self._micro_batch = 0
        return applied

    def compilable(self, regions: list[Region]) -> list[Region]:
        """The blocks: within any other region hooks gather weights, where no graph may be cut."""
        return [region for region in regions if region[0] in self._units]

    @torch.no_grad()
    def _update(self, closure: None = None) -> None:
        """What DeepSpeed's step does around its optimizer, and ours on all groups at once."""
        zero = self._zero
        zero._pre_step()
        self._free()
        for group, grad in zip(self.optimizer.param_groups, self._grads, strict=True):
            group["shard"].param.grad = grad
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["shard"].param.grad = None
        zero.grad_partitions_flat_buffer.zero_()  # else who gets no gradient in the next step keeps this one
        zero._post_step(set())
        self._written()

    def _free(self) -> None:
        """Nothing stays gathered: what is there beside its parts would be computed with once they have changed."""
        self._zero._partition_all_parameters()
        self._teacher_parts.partition_all_parameters()

    def _written(self) -> None:
        """Gathers come after what this stream has written into the parts; they have streams of their own."""
        if self.ranks.device.type == "cuda":
            for parts in (self._zero.parameter_offload, self._teacher_parts):
                parts._DeepSpeedZeRoOffload__allgather_stream.wait_stream(torch.cuda.current_stream())

    def _publish_student(self) -> None:
        self._free()
        for group in self.optimizer.param_groups:
            if group["shard"].param_lp is not None:
                group["shard"].param_lp.copy_(group["shard"].param)

    def _publish_untrained(self, name: str, values: Tensor) -> None:
        for network in (self.student_network, self.teacher):
            part = network.get_parameter(name).ds_tensor  # type: ignore[attr-defined]
            mine = values[self.ranks.rank * part.numel() :][: part.numel()]
            part[: mine.numel()].copy_(mine)

    def _gather_teacher(self) -> None:
        """Nothing: its modules gather themselves."""
        self._written()

    def _cut(self, deepspeed: Any, network: nn.Module, settings: dict[str, Any]) -> None:
        """Leaves this rank its part of each parameter, one after another: no two are whole at a time."""
        with local_rank(self.ranks):
            cutter = deepspeed.zero.Init(config_dict_or_path=settings, dtype=self.dtype)
        for param in network.parameters():
            cast(param, self.dtype, self.ranks.device)
            cutter._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

    def _shard(self, index: int, fragments: list[Fragment], size: int, values: Values) -> Shard:
        """DeepSpeed's flat tensors of a group, with the exact weights in its master, and the teacher's beside them."""
        names = list(self.groups[index].params)
        params, zero = [self.student_network.get_parameter(name) for name in names], self._zero
        assert all(p is q for p, q in zip(params, zero.fp16_groups[index], strict=True)), "another order of parameters"
        master, param_lp = zero.fp32_partitioned_groups_flat[index], zero.fp16_partitioned_groups_flat[index]
        assert master.numel() == size, f"parts of {master.numel()} elements in {self.groups[index].name}, not {size}"
        fill(master.data.zero_(), fragments, values)  # DeepSpeed's is a copy of rounded weights
        ema_lp, offset = torch.zeros_like(param_lp), 0
        for name in names:
            part = self.teacher.get_parameter(name).ds_tensor  # type: ignore[attr-defined]
            part.data = ema_lp[offset : offset + part.numel()]
            offset += part.numel()
        assert offset == size, "student and teacher are cut alike"
        ema = ema_lp if self.dtype == torch.float32 else torch.empty_like(master.data)
        ema.copy_(master.data)
        same = param_lp.data_ptr() == master.data_ptr()  # in fp32 DeepSpeed means to have one, and has two
        return Shard(master, ema, fragments, None if same else param_lp, None if ema is ema_lp else ema_lp)

    def _mark_units(self, deepspeed: Any) -> dict[str, int]:
        """Has each of the networks' units gathered at once rather than layer by layer; the elements of the largest."""
        self._units, self._entered = set[nn.Module](), set[nn.Module]()
        for network in (self.student_network, self.teacher):
            for unit in _units(network, self.ranks.device):
                self._units.add(unit)
                deepspeed.utils.set_z3_leaf_module(unit, True)
                unit.register_forward_pre_hook(self._enter)
        sizes = [sum(p.numel() for p in unit.parameters()) for unit in self._units]
        return {"unit": max(sizes)} if sizes else {}

    def _enter(self, unit: nn.Module, _: Any) -> None:
        """DeepSpeed would lose gradients of a unit that runs twice."""
        if torch.is_grad_enabled():
            assert unit not in self._entered, "a block ran twice before one backward pass: it is no unit"
            self._entered.add(unit)

    def _keep_local_rank(self, deepspeed: Any) -> None:
        """DeepSpeed reads LOCAL_RANK in forward passes too; and modules that it keeps for good are let go with us."""
        kept = ExitStack()
        kept.enter_context(local_rank(self.ranks))
        kept.callback(deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.clear)
        self.ranks.leave_with(kept.close, deepspeed.comm.destroy_process_group)


def _units(network: nn.Module, device: torch.device) -> list[nn.Module]:
    """The network's own, see :meth:`fastdino.model.Network.units`; a module that names none has none."""
    named = getattr(network, "units", None)
    return [] if named is None else named(device)


def _untrained_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a network that is only called."""
    return {key: value for key, value in settings.items() if key not in ("flops_profiler", "comms_logger")}
