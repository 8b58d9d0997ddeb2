"""Parameter groups: which parameters share weight decay and freezing."""

from dataclasses import dataclass

from torch import nn

from fastdino.model.network import takes_weight_decay


@dataclass(frozen=True)
class Group:
    """Trainable parameters that share weight decay and freezing, by name."""

    name: str
    regularized: bool  # gets weight decay, and under LARS the trust ratio
    last_layer: bool
    params: dict[str, nn.Parameter]

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(p.numel() for p in self.params.values())


def parameter_groups(network: nn.Module) -> list[Group]:
    """The trainable parameters of ``network`` in groups: decay, no_decay, last_layer; empty ones left out.

    The prototypes (names with ``last_layer``) are apart so that they can be frozen.
    Source: DINO v1's get_params_groups.
    """
    groups: dict[str, Group] = {}
    for name, param in network.named_parameters():
        if param.requires_grad:
            regularized = takes_weight_decay(name, param)
            last_layer = "last_layer" in name
            key = ("last_layer_" if last_layer else "") + ("decay" if regularized else "no_decay")
            groups.setdefault(key, Group(key, regularized, last_layer, {})).params[name] = param
    return [groups[key] for key in ("decay", "no_decay", "last_layer_decay", "last_layer_no_decay") if key in groups]
