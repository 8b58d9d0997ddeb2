"""Sizes to measure kernels over, one axis each: from a small head or network to the largest published ones."""

from dataclasses import dataclass

import torch

_PROTOTYPES = [2**power for power in range(12, 19)]  # 4 k to 262 k
_PARAMETERS = [22_000_000, 86_000_000, 304_000_000, 1_136_000_000]  # ViT-S, ViT-B, ViT-L, ViT-g


@dataclass(frozen=True)
class Sweep:
    """``shape`` of an operation, by device, with {} where each of ``sizes`` goes."""

    axis: str
    shape: dict[str, str]
    sizes: dict[str, list[int]]

    def shapes(self, device: torch.device) -> list[str]:
        return [self.shape[device.type].format(size) for size in self.sizes[device.type]]

    def size(self, shape: str) -> int:
        """Which of the sizes ``shape`` has."""
        return int(shape.split(",")[self.shape["cuda"].split(",").index("{}")])


def _prototypes(cuda: str, cpu: str) -> Sweep:
    return Sweep("prototypes", {"cuda": cuda, "cpu": cpu}, {"cuda": _PROTOTYPES, "cpu": [512, 1024, 2048]})


def _parameters(cuda: str, cpu: str) -> Sweep:
    return Sweep("parameters", {"cuda": cuda, "cpu": cpu}, {"cuda": _PARAMETERS, "cpu": [22_000, 86_000, 304_000]})


SWEEPS = {
    "dino_loss": _prototypes("10,2,64,{},bf16", "10,2,2,{}"),
    "center_mean": _prototypes("2,64,{},bf16", "2,8,{}"),
    "sinkhorn": _prototypes("3764,{},bf16", "16,{}"),
    "prototype_weight": _prototypes("{},256,bf16", "{},256"),
    "ibot_loss": Sweep(
        "masked patches",
        {"cuda": "{},65536,bf16", "cpu": "{},1024"},
        {"cuda": [1024, 2048, 4096, 8192, 16384], "cpu": [8, 16, 32]},
    ),
    "ema_update_": _parameters("294,{}", "20,{}"),
    "adamw_ema_": _parameters("294,{}", "20,{}"),
}
