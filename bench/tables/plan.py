"""What ``fastdino plan`` says of large ViTs, for docs/planning.md."""

import shlex
import textwrap
from collections.abc import Iterator

from fastdino.cli import configured
from fastdino.config import ConfigError
from fastdino.planning.footprint import GB, Layout, activations, states
from fastdino.planning.plan import CHECKPOINTING, Plan, checkpointed

SEVEN_B = (
    "dinov2_vit_giant_14 --model.arch vit_7b --model.patch-size 16 --model.pos-embed rope --model.registers 4 "
    "--views.global-size 256 --views.local-size 112 --run.local-batch 8 "
    "--head.num-prototypes 262144 --head.bottleneck-dim 512 --head.hidden-dim 8192 "
    "--patch-head.num-prototypes 98304 --patch-head.bottleneck-dim 384 --patch-head.hidden-dim 4096"
)
CASES = {"ViT-L/16": "dinov2_vit_large_16", "ViT-g/14": "dinov2_vit_giant_14", "ViT-7B/16": SEVEN_B}
GPUS, MEMORY = (8, 64, 256), 80.0
STAYS = {"stays at 0": 0, "at 1 and 2": 1, "at 3": 3}
KEPT = {f"activations, {how}" if how == "none" else how: how for how in CHECKPOINTING}
HEADER = ["model", "P", "B", "GPUs", *STAYS, *KEPT, "sent at 1", "sent at 3", f"take, of {MEMORY:g} GB"]


def rows() -> Iterator[list[str]]:
    """A row for each model and number of GPUs, in GB."""
    for name, command in CASES.items():
        recipe, *flags = shlex.split(command)
        config = configured(recipe, flags)
        layout = Layout.of(config)
        kept = [f"{activations(checkpointed(config, how)) / GB:.1f}" for how in KEPT.values()]
        for gpus in GPUS:
            stays = [f"{sum(states(config, layout, stage, gpus).values()) / GB:.1f}" for stage in STAYS.values()]
            try:
                found = Plan(gpus=gpus, gpu_memory=MEMORY)(config)
            except ConfigError:
                yield [name, "", "", str(gpus), *stays, *kept, "", "", "does not fit"]
                continue
            sent = [f"{found.wire_bytes(stage) / GB:.1f}" for stage in (1, 3)]
            take = f"ZeRO {found.chosen.stage}, {found.chosen.checkpointing}: {found.chosen.bytes / GB:.1f}"
            size = [f"{layout.params / 1e6:,.0f} M", str(config.run.local_batch)]
            yield [name, *size, str(gpus), *stays, *kept, *sent, take]


def commands() -> str:
    """What the rows are of."""
    asked = [f"fastdino plan {command} --gpus N --gpu-memory {MEMORY:g}" for command in CASES.values()]
    lines = (textwrap.wrap(line, 112, subsequent_indent="    ", break_on_hyphens=False) for line in asked)
    return "\n".join("    " + " \\\n    ".join(line) for line in lines)
