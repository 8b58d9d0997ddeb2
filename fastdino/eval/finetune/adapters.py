"""What of a classifier learns when it is fine-tuned: all of it, biases and norms, low-rank changes, or its head."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fastdino.eval.features import EvaluationError, device_and_dtype
from fastdino.model.network import layer_rates, takes_weight_decay

Mode = Literal["head", "bias", "lora", "lp-ft", "full"]
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)
ADAPTED = ("attn.qkv", "attn.proj")  # what the layers that get low-rank changes are called, in our ViT and in timm's
INIT_STD = 0.01  # of the head's weight, as in DINO's linear evaluation


class Classifier(nn.Module):
    """A backbone and a linear head, (B, C, s, s) normalised images -> (B, classes) logits.

    Args:
        backbone: gives (B, num_features).
        num_classes: of the head.
        seed: of the head's weight; its bias starts at 0.
    """

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        device, dtype = device_and_dtype(backbone)
        self.head = nn.utils.skip_init(nn.Linear, num_features, num_classes, device=device, dtype=dtype)
        weight = torch.empty(num_classes, num_features)
        self.set_head(weight.normal_(0, INIT_STD, generator=torch.Generator().manual_seed(seed)), weight.new_zeros(1))

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Copies (classes, D) and (classes,)."""
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class LowRank(nn.Module):
    """A weight, (N, K), and a change of it of low rank that learns: weight + (alpha / rank) * up @ down.

    Source: LoRA, Hu et al. 2022. It is a parametrization (torch.nn.utils.parametrize): the layer reads its weight as
    before, whatever it does with it, and once merged it is as it was.

    Args:
        weight: what it will change, for the shape, device and dtype.
        rank: of the change.
        alpha: the change is scaled by alpha / rank, so that rates suit any rank.
        generator: of ``down``; ``up`` starts at 0, so that nothing is changed.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = 1 / math.sqrt(columns)
        self.down = nn.Parameter(torch.empty(rank, columns).uniform_(-bound, bound, generator=generator).to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_low_rank(backbone: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Gives queries, keys, values and the output of each attention a low-rank change.

    Raises EvaluationError for a backbone without such layers.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for name, layer in backbone.named_modules() if name.endswith(ADAPTED) and _is_linear(layer)]
    if not layers:
        kind = getattr(backbone, "arch", type(backbone).__name__)
        raise EvaluationError(f"--mode lora changes linear layers of attention, and {kind} has none: use bias or full")
    for layer in layers:
        change = LowRank(layer.weight, rank, alpha, generator)
        parametrize.register_parametrization(layer, "weight", change)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not parametrize.is_parametrized(layer)


def merge_low_rank(backbone: nn.Module) -> None:
    """Adds the changes to the weights, which have their plain names again, and the layers their own classes."""
    for layer in [*backbone.modules()]:
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def let_learn(model: Classifier, mode: Mode, *, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> None:
    """Makes require a gradient what learns in ``mode``, and nothing else.

    head: the head. bias: biases and norms too (BitFit, Ben Zaken et al. 2022). lora: low-rank changes too, which this
    adds. full and lp-ft: everything. ``rank``, ``alpha`` and ``seed`` are those of :class:`LowRank`.
    """
    model.requires_grad_(mode in ("full", "lp-ft"))
    if mode == "bias":
        for name in biases_and_norms(model.backbone):
            model.backbone.get_parameter(name).requires_grad_()
    if mode == "lora":
        add_low_rank(model.backbone, rank, alpha, seed)
    model.head.requires_grad_()


def biases_and_norms(module: nn.Module) -> set[str]:
    """Names of the parameters that BitFit trains."""
    norms = {f"{path}.".lstrip(".") for path, part in module.named_modules() if isinstance(part, NORMS)}
    names = [name for name, _ in module.named_parameters()]
    return {name for name in names if name.endswith("bias") or name.removesuffix("weight") in norms}


def groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """What learns in ``model``, in groups for torch's optimizers: each with its lr and its weight_decay.

    Rates fall with the distance from the head, see :func:`fastdino.model.network.layer_rates`. Biases and 1-D
    parameters take no weight decay.
    """
    learning = {name: param for name, param in model.named_parameters() if param.requires_grad}
    rates = layer_rates(learning, layer_decay)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in learning.items():
        decay = weight_decay if takes_weight_decay(name, param) else 0.0
        found.setdefault((lr * rates[name], decay), []).append(param)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in found.items()]
