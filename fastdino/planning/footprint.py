"""What a step takes of each GPU, as pure functions of the settings: bytes that stay, bytes at its peak, bytes it sends.

What stays is exact: tests compare it with the storages of engines. What a backward pass adds is estimated.
P parameters, W ranks, B images of a micro batch, D width, H hidden width of a block's MLP, K prototypes.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastdino.config import Config
from fastdino.data.masks import num_hidden
from fastdino.data.views import groups
from fastdino.engine.groups import parameter_groups
from fastdino.engine.optimizer import OPTIMIZERS
from fastdino.engine.zero import deepspeed_config
from fastdino.method.targets import Sinkhorn
from fastdino.model import outline
from fastdino.model.block import Shape
from fastdino.model.vit import SIZES
from fastdino_kernels.losses.linear_ibot_loss import chunk_rows

FP32, GB = 4, 1e9
ALIGNED = 2  # elements per rank to which DeepSpeed pads a group at stages 1 and 2
STAGE_0_BUCKET = 500_000_000  # elements; DeepSpeed's own
ALLOCATOR, CONTEXT = 0.06, 1.5e9  # share that its blocks waste; CUDA, NCCL and cuBLAS


@dataclass(frozen=True)
class Layout:
    """What there is to share: elements of each parameter, from a network without values."""

    trained: list[list[int]]
    """By group, in the engine's order."""
    frozen: list[int]
    units: list[int]
    """Elements of each module that stage 3 gathers at once."""
    leaves: int
    """Modules that have parameters, within units and outside."""
    outside: int
    """Elements outside of units."""
    largest: int
    """Of the parameters outside of units."""
    width: int

    @classmethod
    def of(cls, config: Config) -> "Layout":
        """Raises ConfigError for a backbone that does not exist or cannot take the views or the checkpointing."""
        network = without_values(config)
        units = network.units(torch.device("cpu"))
        inside = {id(p) for unit in units for p in unit.parameters()}
        others = [p.numel() for p in network.parameters() if id(p) not in inside]
        return cls(
            trained=[[p.numel() for p in group.params.values()] for group in parameter_groups(network)],
            frozen=[p.numel() for p in network.parameters() if not p.requires_grad],
            units=[sum(p.numel() for p in unit.parameters()) for unit in units],
            leaves=sum(any(True for _ in module.parameters(recurse=False)) for module in network.modules()),
            outside=sum(others),
            largest=max(others, default=0),
            width=network.backbone.num_features,
        )

    @property
    def params(self) -> int:
        """P, of one network, frozen ones included."""
        return sum(map(sum, self.trained)) + sum(self.frozen)


def without_values(config: Config) -> Any:
    """The student, on the meta device."""
    with torch.device("meta"):
        return outline(config)


def bytes_of_weights(config: Config) -> int:
    """Of an element in the forward and backward passes on a GPU."""
    return 2 if config.engine.uses_bf16("cuda") else FP32


# ------------------------------------------------------------------------------------------------------ what stays


def states(config: Config, layout: Layout, stage: int, ranks: int) -> dict[str, int]:
    """Bytes of a rank that stay from step to step, by what they are; of engine.name=torch those of stage 0."""
    low = bytes_of_weights(config)
    trained = sum(map(sum, layout.trained))
    whole, mine, frozen = trained, trained, sum(layout.frozen)
    if stage in (1, 2):
        whole = sum(_padded(sum(group), ALIGNED * ranks) for group in layout.trained)
        mine = whole // ranks
    elif stage == 3:
        whole = mine = sum(_part(n, ranks) for group in layout.trained for n in group)
        frozen = sum(_part(n, ranks) for n in layout.frozen)
    rounded = low < FP32
    gradients = {0: FP32 * trained, 3: FP32 * mine}.get(stage, 0)
    if stage == 0 and rounded and config.engine.accumulate > 1:
        gradients += low * trained  # of one micro batch, made flat
    return {
        "masters": FP32 * (mine + sum(layout.frozen)),
        "moments": FP32 * mine * len(OPTIMIZERS[config.optim.name].moments),
        "teacher": FP32 * mine * rounded + low * (whole + frozen),  # its average, which in fp32 is the weights
        "weights": low * (whole * (rounded or stage > 0) + frozen),  # the student's; the masters at stage 0 in fp32
        "gradients": gradients,
    }


def checkpoint_bytes(config: Config) -> int:
    """Of a checkpoint of all ranks: fp32 weights, their average and the optimizer's moments; little else is in it."""
    layout, moments = Layout.of(config), len(OPTIMIZERS[config.optim.name].moments)
    return FP32 * (sum(map(sum, layout.trained)) * (2 + moments) + 2 * sum(layout.frozen))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _part(size: int, ranks: int) -> int:
    return -(-size // ranks)


# --------------------------------------------------------------------------------------- what the peak has besides


def peak(config: Config, layout: Layout, stage: int, ranks: int) -> dict[str, int]:
    """Bytes of a rank at the peak of a step under the config's checkpointing, by what they are; an estimate.

    As if the backward pass had all gradients before it gives up any activation.
    """
    stays, low = states(config, layout, stage, ranks), bytes_of_weights(config)
    trained = sum(map(sum, layout.trained))
    zero = deepspeed_settings(config, layout, stage)
    bucket, sent = zero.get("reduce_bucket_size", 0), _bytes_sent(config, layout, stage)
    gathered = buffers = 0
    if stage < 2:
        gradients = low * trained
    else:
        gradients = low * min(bucket, trained)  # of which no reduction has begun
    if stage == 2:
        gradients += FP32 * trained // ranks
    if stage in (1, 2):
        buffers = sent * bucket * (2 if zero["overlap_comm"] else 1)
        gradients += FP32 * max(map(sum, layout.trained)) // ranks  # of the group that is updated
    elif stage == 3:
        buffers = sent * min(bucket, trained)
        alive = min(layout.params, zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"])
        gathered = low * (alive + layout.largest) * (2 if config.engine.teacher_stream else 1)
    found = {
        **stays,
        "gradients": stays["gradients"] + gradients,
        "buffers": buffers,
        "gathered": gathered,
        "activations": activations(config),
        "logits": logits(config, layout.width),
    }
    return {**found, "allocator": round(ALLOCATOR * sum(found.values()) + CONTEXT)}


def activations(config: Config) -> int:
    """Bytes of what the student's backbone keeps for its backward pass, and of the block that is made again in it."""
    return kept(config) + remade(config)


def kept(config: Config) -> int:
    """Bytes that the student's backbone keeps of a forward pass; eagerly, of which torch.compile keeps less."""
    if not config.model.is_vit:
        return _timm_kept(config)
    block, last = _vit_blocks(config)[config.engine.checkpointing]
    size, tokens, read = _vit_size(config), num_tokens(config), _num_read(config)
    pixels = sum(count * side**2 for count, side in groups(config.views).values()) * config.data.channels
    ends = config.run.local_batch * pixels + read * size.width
    return round((size.depth - 1) * tokens * block + last + bytes_of_weights(config) * ends)


def remade(config: Config) -> int:
    """Bytes that checkpointing makes again of one block at a time, beside what it keeps; of our ViT's."""
    if not config.model.is_vit:
        return 0
    blocks = _vit_blocks(config)
    return round(num_tokens(config) * (blocks["none"][0] - blocks[config.engine.checkpointing][0]))


def _vit_blocks(config: Config) -> dict[str, tuple[float, float]]:
    """By checkpointing, bytes that a block keeps of each token, and all that the last block keeps."""
    model, low, size = config.model, bytes_of_weights(config), _vit_size(config)
    width, hidden = size.width, size.hidden * (4 if size.swiglu else 2)
    tokens, read = num_tokens(config), _num_read(config)
    share = num_tokens(config, branch=True) / tokens
    inputs = 2 * width  # of the branches, whole; "full" keeps the first
    made = 4 * width  # queries, keys, values, and what attention makes of them
    made += 2 * width if model.layer_scale else 0  # both branches, for the gradient of their factors
    made += 2 * width if model.pos_embed == "rope" else 0  # queries and keys before they are turned
    made += width if model.attention == "sdpa" and config.views.num_local else 0  # a call for each size of views
    normed = 2 * width + hidden  # what selective checkpointing makes again
    statistics = 2 * 2 * FP32 + FP32 * size.num_heads  # of two norms and of attention
    last = made - 2 * width + width + hidden  # of a row that is read: all but keys and values
    return {
        "none": (low * (inputs + share * (made + normed)) + share * statistics,
                 low * (tokens * 4 * width + read * (last + width)) + read * statistics),
        "selective": (low * (inputs + share * made) + share * statistics,
                      low * (tokens * 3 * width + read * (last - hidden)) + read * statistics),
        "full": (low * width, low * tokens * width),
    }  # fmt: skip


def _vit_size(config: Config) -> Shape:
    return SIZES[config.model.arch.removeprefix("vit_")]


def num_tokens(config: Config, branch: bool = False) -> int:
    """Tokens of a micro batch that the student's blocks are given; ``branch``: of the views that one branch runs on."""
    model, found = config.model, 0
    for count, side in groups(config.views).values():
        sequences = count * config.run.local_batch
        if branch and model.drop_path_rule == "uniform" and model.drop_path:
            sequences = max(1, int(sequences * (1 - model.drop_path)))
        found += sequences * ((side // model.patch_size) ** 2 + 1 + (model.registers or 0))
    return found


def _num_read(config: Config) -> int:
    """Rows that the heads read: the CLS token of each view, and hidden patches."""
    return config.views.num_views * config.run.local_batch + num_masked(config)


def num_masked(config: Config) -> int:
    """M, the patches of a micro batch that are hidden and predicted."""
    if not config.loss.patch_weight:
        return 0
    side = config.views.global_size // config.model.patch_size
    return num_hidden(config.run.local_batch, config.views, (side, side))


def _timm_kept(config: Config) -> int:
    """Of any backbone without checkpointing, from what autograd keeps of a pass over two images without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = torch.bfloat16 if bytes_of_weights(config) < FP32 else torch.float32
    plain = dataclasses.replace(config, engine=dataclasses.replace(config.engine, checkpointing="none"))
    model, total = without_values(plain).backbone.model, 0.0
    with FakeTensorMode():
        values = {n: torch.empty(p.shape, dtype=dtype, requires_grad=True) for n, p in model.named_parameters()}
        values |= {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers()}
        known = {x.untyped_storage()._cdata for x in values.values()}
        for count, side in groups(config.views).values():
            found: dict[int, int] = {}

            def keep(x: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
                found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
                return x

            pair = torch.empty(2, config.data.channels, side, side, dtype=dtype)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                features = torch.func.functional_call(model, values, (pair,))
            assert features.requires_grad
            total += sum(size for key, size in found.items() if key not in known) / 2 * count * config.run.local_batch
    return round(total)


def logits(config: Config, width: int) -> int:
    """Bytes of heads and losses: hidden layers, prototypes, logits of views, and those of a chunk of patches."""
    low, batch, patches = bytes_of_weights(config), config.run.local_batch, num_masked(config)
    heads = [(config.views.num_views * batch, config.head)]
    if patches:
        heads.append((patches, config.patch_head or config.head))
    total = low * (config.views.num_views + 2) * batch * config.head.num_prototypes
    for rows, head in heads:
        total += rows * (low * (width + 2 * head.hidden_dim * (head.num_layers - 1)) + 3 * FP32 * head.bottleneck_dim)
        total += 3 * low * head.num_prototypes * head.bottleneck_dim  # the student's, the teacher's, their gradient
    if patches:
        head = config.patch_head or config.head
        total += 2 * low * chunk_rows(patches) * head.num_prototypes
        total += FP32 * head.num_prototypes * head.bottleneck_dim  # their gradient's sum
    return total


# -------------------------------------------------------------------------------------------------- what is sent


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind in a step of a rank."""

    what: str
    kind: str
    """all-reduce, all-gather or reduce-scatter."""
    calls: int
    elements: int
    """Of what is reduced or gathered, as a whole."""
    size: int
    """Bytes of an element."""

    def per_gpu(self, ranks: int) -> float:
        """Bytes that a GPU sends, by rings."""
        return (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks * self.elements * self.size


def traffic(config: Config, layout: Layout, stage: int, ranks: int) -> list[Sent]:
    """The collectives of a step, exact but for stage 3's gathers, which DeepSpeed makes as its prefetch goes.

    Those within batch normalisation over GPUs are left out.
    """
    if ranks == 1:
        return []
    low, times = bytes_of_weights(config), config.engine.accumulate
    zero, size = deepspeed_settings(config, layout, stage), _bytes_sent(config, layout, stage)
    sizes = [n for group in layout.trained for n in group]
    if config.engine.name == "torch":
        calls, elements, micro = len(layout.trained), sum(sizes), 1
        stage = 0
    elif stage == 0:
        calls, elements, micro = _buckets(map(sum, layout.trained), STAGE_0_BUCKET), sum(sizes), 1
    elif stage < 3:
        calls, elements = _buckets(reversed(sizes), zero["reduce_bucket_size"]), sum(sizes)
        micro = times if stage == 2 else 1
    else:
        padded = [_padded(n, ranks) for n in sizes]
        calls, elements, micro = _buckets(reversed(padded), zero["reduce_bucket_size"]), sum(padded), times
    found = [Sent("gradients", "reduce-scatter" if stage == 3 else "all-reduce", calls * micro, elements * micro, size)]
    if stage in (1, 2):
        whole = sum(_padded(sum(group), ALIGNED * ranks) for group in layout.trained)
        found += [Sent(of, "all-gather", len(layout.trained), whole, low) for of in ("student", "teacher")]
    elif stage == 3:
        whole = sum(_padded(n, ranks) for n in [*sizes, *layout.frozen])
        alive = zero["stage3_max_live_parameters"] - zero["stage3_prefetch_bucket_size"]  # after the forward pass
        alive = max(0, min(whole, alive))
        passes = len(layout.units) or layout.leaves
        found += [
            Sent("student", "all-gather", (2 * passes + 1) * times, (2 * whole - alive) * times, low),
            Sent("teacher", "all-gather", (passes + 1) * times, whole * times, low),
        ]
    found.append(Sent("norms", "all-reduce", 1, (len(sizes) if stage else 0) + 1, FP32))
    return [*found, *_targets(config)]


def _targets(config: Config) -> list[Sent]:
    """The means of centering, once a step, or Sinkhorn's sums, of each micro batch."""
    heads = [(config.loss.targets, config.head)]
    if config.loss.patch_weight:
        heads.append((config.loss.patch_targets or config.loss.targets, config.patch_head or config.head))
    found = []
    for how, head in heads:
        calls, each, size = 1, head.bottleneck_dim, FP32
        if how == "sinkhorn":
            calls, each, size = Sinkhorn.ITERATIONS * config.engine.accumulate, head.num_prototypes, 8
        found.append(Sent("targets", "all-reduce", calls, calls * each, size))
    return found


def _buckets(sizes: Iterable[int], most: int) -> int:
    """Buckets of up to ``most`` elements that tensors fill in turn."""
    count, filled = 0, math.inf
    for size in sizes:
        if filled + size > most:
            count, filled = count + 1, 0
        filled += size
    return count


def deepspeed_settings(config: Config, layout: Layout, stage: int) -> dict[str, Any]:
    """``zero_optimization`` of DeepSpeed's config, engine.deepspeed's file included. Raises ConfigError for that."""
    return _deepspeed(config, layout, stage)["zero_optimization"]


def _bytes_sent(config: Config, layout: Layout, stage: int) -> int:
    """Of an element of the gradients."""
    return 2 if _deepspeed(config, layout, stage)["communication_data_type"] == "bf16" else FP32


def _deepspeed(config: Config, layout: Layout, stage: int) -> dict[str, Any]:
    unit = {"unit": max(layout.units)} if layout.units else {}
    return deepspeed_config(config, stage, bytes_of_weights(config) < FP32, **unit)
