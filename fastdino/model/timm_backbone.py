"""Any backbone of timm, under the interface of our own."""

import copy
import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdino.config import ConfigError, ModelConfig
from fastdino.data.batch import Masks


class TimmBackbone(nn.Module):
    """``model``, a backbone of timm without its classifier; views of one size run together, one size after another.

    Args:
        config: ``arch`` names it, as timm:NAME; ``drop_path`` is handed on.
        image_size: side in pixels that it is made for, where it has to know.
        views: by name, side and number of the views of a size that it will be given at a time; each size is tried,
            with nothing computed.
        channels: C, of the images.

    Raises ConfigError when timm has no such model, or it cannot take a size.
    """

    implementation = "the backbone's own code"

    def __init__(
        self, config: ModelConfig, image_size: int, views: dict[str, tuple[int, int]], channels: int = 3
    ) -> None:
        super().__init__()
        self.arch, self.channels = config.arch, channels
        self.model = _create(config, image_size, channels)
        for name, (size, images) in views.items():
            self.num_features = self._probe(name, size)
            if images == 1:
                self._probe_single(name, size)

    @property
    def published(self) -> nn.Module:
        """timm's own module."""
        return self.model

    @property
    def classifier(self) -> str:
        """What timm calls the layer that it lacks. Raises ConfigError for a model with several."""
        name = self.model.pretrained_cfg["classifier"]  # type: ignore[index]
        if not isinstance(name, str):
            raise ConfigError(f"model.arch='{self.arch}' has several classifiers, {', '.join(name)}: use another")
        return name

    def regions(self) -> list[tuple[nn.Module, str]]:
        """All of it, since what it consists of is not known here."""
        return [] if any(isinstance(m, nn.SyncBatchNorm) for m in self.modules()) else [(self.model, "forward")]

    def units(self, device: torch.device) -> list[nn.Module]:
        """None: views of another size are another call."""
        return []

    def set_checkpointing(self, how: str) -> None:
        """See :meth:`fastdino.model.ViT.set_checkpointing`; "full" or "none"."""
        if how == "none":
            return
        if any(isinstance(m, _BatchNorm) for m in self.modules()):
            raise ConfigError(
                f"engine.checkpointing={how} would move the running averages of batch normalisation twice a step in "
                f"model.arch='{self.arch}': use none"
            )
        try:
            self.model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"engine.checkpointing={how}: timm has no checkpointing for model.arch='{self.arch}': use none"
            ) from error

    def forward(self, x: Tensor | dict[str, Tensor], masks: Masks | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(V_i, B, C, h_i, w_i) views by name -> (sum of V_i, B, D) and no patches, (0, D); (B, C, h, w) -> (B, D)."""
        assert masks is None, "a backbone of timm hides and gives no patches"
        dtype = next(self.model.parameters()).dtype
        if isinstance(x, Tensor):
            return self.model(x.to(dtype))
        cls = torch.cat([self.model(v.flatten(0, 1).to(dtype)).unflatten(0, v.shape[:2]) for v in x.values()])
        return cls, cls.new_empty(0, cls.shape[-1])

    def _probe(self, view: str, size: int) -> int:
        """D, the width of the features of a view, from shapes alone."""
        try:
            features = _on_meta(self.model, (2, self.channels, size, size), training=False)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"model.arch='{self.arch}' cannot take {view} views of {size} px (views.{view}_size): {error}. "
                "Use a size it can take or a backbone without a fixed size"
            ) from error
        if features.ndim != 2:
            shape = tuple(features.shape)
            raise ConfigError(f"model.arch='{self.arch}' gives features of shape {shape}, not (images, width)")
        return features.shape[1]

    def _probe_single(self, view: str, size: int) -> None:
        """Raises ConfigError when one view of ``size`` leaves batch normalisation one value per channel."""
        try:
            _on_meta(self.model, (1, self.channels, size, size), training=True)
        except ValueError as error:
            raise ConfigError(
                f"model.arch='{self.arch}' normalises over the batch, and one {view} view of {size} px of one image is "
                f"one value per channel: raise run.local_batch, views.num_{view} or views.{view}_size"
            ) from error


def _on_meta(model: nn.Module, shape: tuple[int, ...], training: bool) -> Tensor:
    """Output for images of ``shape``, shapes alone; of a copy, because a forward pass may leave caches behind."""
    return copy.deepcopy(model).train(training).to("meta")(torch.empty(shape, device="meta"))


def _create(model: ModelConfig, image_size: int, channels: int) -> nn.Module:
    import timm  # here, because it takes seconds to import and our own ViT does without

    name = model.arch.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or ["any of timm.list_models()"]
        raise ConfigError(f"model.arch='{model.arch}': timm has no such model; did you mean {', '.join(near)}?")
    if "." in name:
        known, tag = name.split(".", 1)
        raise ConfigError(
            f"model.arch='{model.arch}': {tag!r} names weights, which are never downloaded: use timm:{known}, and "
            "model.weights=FILE to start from weights"
        )
    options: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True}
    if channels != 3:
        options["in_chans"] = channels
    if model.drop_path:
        options["drop_path_rate"] = model.drop_path
    while True:
        try:
            return timm.create_model(name, num_classes=0, **options)
        except TypeError as error:  # each family of models knows some of the options
            unknown = next((option for option in options if f"'{option}'" in str(error)), None)
            if unknown is None:
                raise
            if unknown == "drop_path_rate":
                raise ConfigError(f"model.drop_path={model.drop_path}: {name} has no drop path, set it to 0") from error
            del options[unknown]
