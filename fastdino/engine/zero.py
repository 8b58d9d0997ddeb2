"""DeepSpeed: its config, its import, and its engines of ZeRO 0, 1 and 2. Stage 3 is in zero3.py."""

import importlib
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.config.deepspeed import merged
from fastdino.distributed import Ranks
from fastdino.engine import zero_stage
from fastdino.engine.engine import Engine
from fastdino.engine.optimizer import Optimizer
from fastdino.engine.schedules import Now
from fastdino.engine.shards import Values, cast, fill, fragments
from fastdino.engine.torch_engine import TorchEngine
from fastdino.launch import LaunchError

TESTED = ("0.19.8",)  # of DeepSpeed, whose internals are used here and in zero3.py; what setup.py asks for


# What is used here and in zero3.py of DeepSpeed's internals, by module and class; "" for the module's own.
INTERNALS = (
    ("runtime.engine", "DeepSpeedEngine", ("set_gradient_accumulation_boundary", "backward", "step", "destroy")),
    (
        "runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer",
        ("single_partition_of_fp32_groups", "averaged_gradients", "update_lp_params"),
    ),
    (
        "runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3",
        ("fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat", "grad_partitions_flat_buffer",
         "parameter_offload", "_partition_all_parameters", "_pre_step", "_post_step"),
    ),
    (
        "runtime.zero.parameter_offload", "DeepSpeedZeRoOffload",
        ("partition_all_parameters", "__allgather_stream"),
    ),
    ("runtime.zero.parameter_offload", "", ("FWD_MODULE_STACK",)),
    ("runtime.zero.partition_parameters", "Init", ("_convert_to_deepspeed_param",)),
    ("ops", "", ("__compatible_ops__",)),
    ("comm", "", ("destroy_process_group",)),
    ("utils", "", ("set_z3_leaf_module",)),
)  # fmt: skip


def deepspeed_config(config: Config, stage: int, bf16: bool, unit: int = 2**24) -> dict[str, Any]:
    """DeepSpeed's config of a run, with what ``engine.deepspeed`` sets beside ours. Raises ConfigError for that.

    Nothing in ours makes a step wait for the device; clipping is our optimizer's. ``unit``: elements that stage 3
    gathers at a time, those of the largest block.
    """
    # At stage 0 its bf16 starts from rounded masters and asks after every step whether one overflowed: there it gets an
    # fp32 student and fp32 gradients to reduce, and the bf16 weights are ours.
    bf16 = bf16 and stage > 0
    dtype = "bf16" if bf16 else "fp32"
    ours = {
        "train_micro_batch_size_per_gpu": config.run.local_batch,
        "gradient_accumulation_steps": config.engine.accumulate,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_allow_untested_optimizer": True,  # the optimizer is ours
        "zero_optimization": {
            "stage": stage,
            **(_sliced(stage) if stage < 3 else _partitioned(unit)),
        },
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "communication_data_type": dtype,
        # fp32 sums of bf16 micro batches cost nothing at stage 2; at stage 1 they would be whole on every rank.
        "data_types": {"grad_accum_dtype": "fp32" if stage >= 2 else dtype},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every step
    }
    return ours if config.engine.deepspeed is None else merged(ours, config.engine.deepspeed)


def _sliced(stage: int) -> dict[str, Any]:
    return {
        "compute_grad_norm": stage == 0,  # stage 0 computes none, and refuses False
        "overlap_comm": False,  # true waits for the device at the end of every backward pass
        "reduce_scatter": False,  # true sends as much, since it is an all-reduce by slices
        "reduce_bucket_size": 2**25,
    }


def _partitioned(unit: int) -> dict[str, Any]:
    return {
        "overlap_comm": True,
        "reduce_scatter": True,
        "contiguous_gradients": False,  # with reduce_scatter one more copy of each gradient
        "sub_group_size": 10**15,  # a parameter group is one shard
        "reduce_bucket_size": max(2**24, 2 * unit),
        "stage3_prefetch_bucket_size": unit,
        "stage3_max_live_parameters": 3 * unit,
        "stage3_max_reuse_distance": 0,  # weights are freed after the forward pass
        # A parameter that stays gathered hides what the average writes into its parts, and costs a gather of its own.
        "stage3_param_persistence_threshold": 0,
        "stage3_module_granularity_threshold": 0,
        "memory_efficient_linear": False,  # its bf16 products are not those of the other stages
    }


def import_deepspeed(ranks: Ranks) -> Any:
    """DeepSpeed, quiet, for the ranks' device, with nothing compiled. Raises LaunchError for one that is not tested."""
    device = ranks.device
    os.environ["DS_ACCELERATOR"] = device.type  # read when it is imported
    # Functions of its own keep the default group of their import as default argument, for good.
    world, dist.GroupMember.WORLD = dist.GroupMember.WORLD, None
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
    finally:
        dist.GroupMember.WORLD = world

    check_version(deepspeed.__version__)
    if get_accelerator().device_name() != device.type:
        raise LaunchError(
            f"DeepSpeed was imported for {get_accelerator().device_name()} before the engine asked for {device.type}: "
            f"set DS_ACCELERATOR={device.type}"
        )
    if device.type == "cuda":  # with pynvml it reads CUDA_VISIBLE_DEVICES, where it takes GPUs' UUIDs for numbers
        importlib.import_module("deepspeed.accelerator.cuda_accelerator").pynvml = None  # type: ignore[attr-defined]
    if device.type == "cpu":  # a g++ build of a minute that only inference needs; a GPU has none
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_version(version: str) -> None:
    """Raises LaunchError for a DeepSpeed that fastdino is not tested with."""
    if version.split("+")[0] not in TESTED:
        raise LaunchError(
            f"DeepSpeed {version} is installed, and fastdino, which uses its internals, is tested with "
            f"{' and '.join(TESTED)} alone: pip install deepspeed=={TESTED[-1]}, or use engine.name=torch, which "
            "shards nothing"
        )


def missing_internals() -> list[str]:
    """Those of INTERNALS that the installed DeepSpeed lacks; it is imported already."""
    missing = []
    for module, kind, names in INTERNALS:
        owner: Any = importlib.import_module(f"deepspeed.{module}")
        owner = getattr(owner, kind, None) if kind else owner
        made = inspect.getsource(owner) if kind and owner else ""  # what a class's methods make has no other place
        known = [name for name in names if hasattr(owner, name) or re.search(rf"self\.{name}\b.*=", made)]
        missing += [f"{module}.{kind or 'module'}.{name}" for name in names if name not in known]
    return missing


def initialize(ranks: Ranks, network: nn.Module, settings: dict[str, Any], optimizer: Optimizer | None = None) -> Any:
    """DeepSpeed's own engine around a network and our optimizer, or around a network that is not trained."""
    deepspeed = import_deepspeed(ranks)
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.ERROR)  # it would warn that our optimizer is not tested by them
    try:
        with local_rank(ranks):
            wrapped, _, _, _ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=settings, dist_init_required=False
            )
    finally:
        log.setLevel(logging.WARNING)
    # Its hooks hold the group and each other through C++, unseen by a collection; and it has groups of its own.
    ranks.leave_with(wrapped.destroy, deepspeed.comm.destroy_process_group)
    return wrapped


@contextmanager
def local_rank(ranks: Ranks) -> Iterator[None]:
    """LOCAL_RANK in the environment, which DeepSpeed insists on, whoever launched, and takes for the GPU's index."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


class ReplicatedEngine(TorchEngine):
    """ZeRO 0: every rank holds everything, flat as in the torch engine, and DeepSpeed reduces and steps."""

    def _wrap(self, config: Config, student: nn.Module) -> nn.Module:
        settings = deepspeed_config(config, 0, self.dtype == torch.bfloat16)
        self._deepspeed: Any = initialize(self.ranks, student, settings, self.optimizer)
        # By this hook DeepSpeed's own bf16 optimizer hands over its flat gradients.
        self.optimizer.get_grads_for_reduction = self._flat_gradients  # type: ignore[attr-defined]
        return self._deepspeed

    def backward(self, loss: Tensor) -> None:
        last = self._micro_batch == self.accumulate - 1
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)
        if not last:
            self._take_gradients()

    def _flat_gradients(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What DeepSpeed reduces at the end of the last backward pass, nothing on one rank; no experts."""
        self._take_gradients()
        return [] if self.ranks.world_size == 1 else self._grads, {}

    def _reduce(self) -> None:
        """Nothing: DeepSpeed has, at the end of the last backward pass."""

    def _update(self) -> None:
        self._deepspeed.step()


class DeepSpeedEngine(Engine):
    """What ZeRO 1, 2 and 3 share: DeepSpeed's backward pass, which is told whether it is a step's last."""

    sharded = True
    _deepspeed: Any
    _micro_batch = 0  # backward passes since the last step

    def backward(self, loss: Tensor) -> None:
        self._micro_batch += 1
        self._deepspeed.set_gradient_accumulation_boundary(self._micro_batch == self.accumulate)
        self._deepspeed.backward(loss)


class ShardedEngine(DeepSpeedEngine):
    """ZeRO 1 or 2: masters, moments and teacher in equal slices over the ranks, at stage 2 the gradients too."""

    def __init__(self, config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks, values: Values) -> None:
        super().__init__(config, student, teacher, ranks, values)
        for param in student.parameters():
            cast(param, self.dtype, ranks.device)  # their values come with the masters'
        settings = deepspeed_config(config, zero_stage(config, ranks), self.dtype == torch.bfloat16)
        self._deepspeed = initialize(ranks, student, settings, self.optimizer)
        self.student, self._zero = self._deepspeed, self._deepspeed.optimizer
        masters = [master.detach() for master in self._zero.single_partition_of_fp32_groups]
        for group, master in zip(self.groups, masters, strict=True):  # DeepSpeed's are copies of rounded weights
            start = ranks.rank * master.numel()
            fill(master, fragments(group, start, start + master.numel()), values)
        weights: list[Tensor | None] = [None] * len(masters)  # DeepSpeed writes the student's itself
        self._adopt(self._zero.single_partition_of_fp32_groups, weights, ranks.world_size, ranks.rank)
        self.after_load()

    @torch.no_grad()
    def step(self, now: Now, loss: Tensor) -> Tensor:
        assert self._micro_batch == self.accumulate, f"{self._micro_batch} backward passes before a step"
        self.wait_teacher()
        grads = []
        for index in range(len(self.optimizer.param_groups)):
            # Made flat here rather than by DeepSpeed a moment later, which finds one tensor that is flat already.
            flat = torch.cat([piece.flatten() for piece in self._zero.averaged_gradients[index]])
            self._zero.averaged_gradients[index] = [flat]
            grads.append(flat)
        applied = self.optimizer.prepare(now, grads, loss)
        self._deepspeed.step()
        self._micro_batch = 0
        self._gather_teacher()
        return applied

    def _publish_student(self) -> None:
        self._zero.update_lp_params()
