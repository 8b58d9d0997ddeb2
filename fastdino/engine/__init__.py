"""A gradient becomes a better student and teacher."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.config import Config, ConfigError
from fastdino.distributed import Ranks
from fastdino.engine.engine import BatchNorm, Engine
from fastdino.engine.shards import Values
from fastdino.engine.torch_engine import TorchEngine


def build_engine(
    config: Config, student: nn.Module, teacher: nn.Module, ranks: Ranks, values: Values | None = None
) -> Engine:
    """The engine of ``config.engine``.

    Args:
        student, teacher: fp32 networks of equal names and shapes. Both are moved to the device, cast, and start alike,
            buffers included: as rank 0's student where that has values, by ``values`` where it is on the meta device.
            Their parameters become views of flat buffers, at ZeRO 3 without elements but in a forward pass: make no
            optimizer of them.
        values: of the parameters on the meta device. A rank asks for what it holds, and no rank need ever hold the
            whole. Without it they are NaN until fragments are loaded, see :meth:`Engine.fragments`.

    Raises ConfigError for batch normalisation over several processes without GPUs, and for fp8 on a device without it.
    """
    if config.engine.fp8:
        _check_fp8(ranks.device)
    student, teacher = (_prepare(network, ranks) for network in (student, teacher))
    teacher.requires_grad_(False)
    given = {name: x for name, x in student.state_dict().items() if not x.is_meta}
    for name, tensor in given.items():
        if ranks.world_size > 1:
            dist.broadcast(tensor, 0)
        if name not in dict(teacher.named_parameters()):
            teacher.get_buffer(name).copy_(tensor)
    start = _start(given, values)
    if config.engine.name == "torch":
        return TorchEngine(config, student, teacher, ranks, start)
    from fastdino.engine.zero import ReplicatedEngine, ShardedEngine  # DeepSpeed takes seconds to import
    from fastdino.engine.zero3 import PartitionedEngine

    engines: list[type[Engine]] = [ReplicatedEngine, ShardedEngine, ShardedEngine, PartitionedEngine]
    return engines[zero_stage(config, ranks)](config, student, teacher, ranks, start)


def zero_stage(config: Config, ranks: Ranks) -> int:
    """What ``engine.zero_stage`` comes to."""
    if config.engine.zero_stage == "auto":
        return int(ranks.world_size > 1)
    return config.engine.zero_stage


def cuts_weights(config: Config, ranks: Ranks) -> bool:
    """Whether weights are in parts, which a forward pass gathers from all ranks."""
    return config.engine.name == "deepspeed" and zero_stage(config, ranks) == 3


def _check_fp8(device: torch.device) -> None:
    """Raises ConfigError where torch has no products in fp8 with a scale per row."""
    found = str(device)
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 9):
            return
        found = f"{torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
    raise ConfigError(
        "engine.fp8=True needs an NVIDIA GPU of compute capability 8.9 or more, and this rank computes on "
        f"{found}: leave it out"
    )


def _prepare(network: nn.Module, ranks: Ranks) -> nn.Module:
    """On the device, with batch statistics over all ranks where there are any, as in DINO v1."""
    if ranks.world_size > 1 and any(isinstance(m, BatchNorm) for m in network.modules()):
        if ranks.device.type == "cpu":
            raise ConfigError(
                f"batch normalisation over {ranks.world_size} processes needs GPUs, because torch's SyncBatchNorm has "
                "no CPU path: use one process, head.batch_norm=False or a backbone without it"
            )
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(ranks.device))


def _start(given: dict[str, Tensor], values: Values | None) -> Values:
    """The elements of ``given`` parameters, else ``values``, else NaN."""

    def start(name: str, start: int, stop: int) -> Tensor:
        if name in given:
            return given[name].flatten()[start:stop]
        return torch.full((stop - start,), torch.nan) if values is None else values(name, start, stop)

    return start
