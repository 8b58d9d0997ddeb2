"""What test_ranks.py compares: the same global batches at this world size; writes the results to a file."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino import distributed
from fastdino.config import (
    Config,
    DataConfig,
    EngineConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.distributed import Ranks
from fastdino.method.targets import Sinkhorn
from fastdino.training.trainer import Trainer

GLOBAL_BATCH, STEPS, K = 32, 3, 48  # a local batch of 8 is a stratum of masks: the same ones arise at every world size
LOSSES = {
    "center": LossConfig(patch_weight=1.0),
    "sinkhorn": LossConfig(patch_weight=1.0, targets="sinkhorn"),
    "mixed": LossConfig(patch_weight=1.0, targets="center", patch_targets="sinkhorn"),
}


def train(ranks: Ranks, loss: LossConfig, stage: int, local_batch: int, own_head: bool) -> dict[str, Any]:
    """Per step the parts of the loss as they are logged; in the end the method's state."""
    head = HeadConfig(num_prototypes=K, hidden_dim=32, bottleneck_dim=16)
    accumulate = GLOBAL_BATCH // local_batch // ranks.world_size
    config = Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0, init="xavier"),  # its draws are each rank's own
        head=head,
        patch_head=dataclasses.replace(head, num_prototypes=40) if own_head else None,
        views=ViewsConfig(global_size=24, local_size=16, num_local=1),
        data=DataConfig(root="shapes", num_images=GLOBAL_BATCH * STEPS, image_size=24, num_workers=0),
        loss=loss,
        optim=OptimConfig(lr=0.004, warmup_epochs=0, teacher_momentum=0.9),
        engine=EngineConfig(zero_stage=stage, device="cpu", accumulate=accumulate),  # type: ignore[arg-type]
        run=RunConfig(epochs=1, local_batch=local_batch, log_every=1, knn_every=0),
    )
    trainer, lines = Trainer(config, ranks), []
    for _ in range(STEPS):
        figures = trainer.train_step([next(trainer.batches) for _ in range(accumulate)])
        packed = torch.stack([figures[name] for name in ("loss", "loss_dino", "loss_ibot")])
        ranks.mean_(packed)
        lines.append(packed)
    trainer.engine.wait_teacher()
    state = {name: x.clone() for name, x in trainer.method.state().items()}
    assert all(
        torch.equal(x, y) for other in ranks.gather(state) for x, y in zip(other.values(), state.values(), strict=True)
    )
    return {"losses": torch.stack(lines), **state}


def balance(ranks: Ranks, sizes: list[int]) -> Tensor:
    """The center of 24 given samples, of which rank r has ``sizes[r]``."""
    generator = torch.Generator().manual_seed(0)
    points, prototypes = (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator)) for n in (24, K))
    mine = points.split(sizes)[ranks.rank]
    return Sinkhorn(ranks)(mine, prototypes * 2, 0.05)


def main(out: Path) -> None:
    with distributed.init("cpu") as ranks:
        world = ranks.world_size
        results: dict[str, Any] = {"even": balance(ranks, [24 // world] * world)}
        uneven = {1: [24], 2: [24, 0], 4: [5, 0, 1, 18]}[world]
        results["uneven"] = balance(ranks, uneven)
        for name, loss in LOSSES.items():
            for stage in (1, 2) if name != "mixed" else (2,):
                results[f"{name}, ZeRO {stage}"] = train(ranks, loss, stage, GLOBAL_BATCH // world, stage == 1)
        results["center, accumulated"] = train(ranks, LOSSES["center"], 1, 8, own_head=True)
        if ranks.is_main:
            torch.save(results, out)
