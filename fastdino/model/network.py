"""Views become points: a backbone and its heads, called once, as a whole."""

import dataclasses
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastdino.config import Config, DataConfig, ModelConfig, ViewsConfig
from fastdino.data.batch import Masks
from fastdino.model.head import Head
from fastdino.model.initialise import Rule, Values, held, materialise, rules_of, values
from fastdino.model.timm_backbone import TimmBackbone
from fastdino.model.vit import ViT
from fastdino.model.weights import WeightsError, form_of, load_backbone, read_metadata, settled
from fastdino.model.weights.dialects import Rows, State
from fastdino.model.weights.files import backbone_state, head_state

Backbone = ViT | TimmBackbone
"""A module with ``num_features`` (D), ``channels`` (C), ``implementation`` (what runs it, for the log), ``regions()``
(what of it to compile, see :meth:`Network.regions`), ``units()`` (what of it to gather at a time, see
:meth:`Network.units`) and ``published`` (the module whose state dict has the names under which such weights are
published).

Called with (V_i, B, C, h_i, w_i) normalised views by name, and masks of patches, it gives CLS tokens (sum of V_i, B, D)
and patches (M, D); with (B, C, h, w) images (B, D).
"""


class Outputs(NamedTuple):
    """What a loss reads of a forward pass over S views of B images, in the views' order, and of M of their patches.

    The logits are ``points @ prototypes.T``. They are the loss's to make, whole or in part; the prototypes come out of
    the forward pass because a parameter is read only during a call of the module that an engine was given.
    """

    cls: Tensor
    """(S, B, D) CLS tokens after the final norm."""
    patches: Tensor
    """(M, D) patches after the final norm, those at ``masks.rows``; without masks M is 0."""
    cls_points: Tensor
    """(S, B, P) L2-normalised projections of ``cls``."""
    patch_points: Tensor
    """(M, P') the same of ``patches``, by the patches' own head if there is one."""
    prototypes: Tensor
    """(K, P) that CLS points are compared with."""
    patch_prototypes: Tensor
    """(K', P') of the patch points; the same tensor as ``prototypes`` when they share the head."""


class Network(nn.Module):
    """Student or teacher: ``backbone`` gives features, heads the points that are compared with prototypes.

    Args:
        backbone: see :data:`Backbone`.
        head: of CLS tokens.
        patch_head: of patches; None: they share ``head``.
    """

    def __init__(self, backbone: Backbone, head: Head, patch_head: Head | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.patch_head = backbone, head, patch_head

    def forward(self, views: dict[str, Tensor], masks: Masks | None = None) -> Outputs:
        """(V_i, B, C, h_i, w_i) normalised views by name, the only way in. ``masks`` are of the first of them.

        A shared head runs once on both kinds of tokens, so its BatchNorm averages over all of them.
        """
        cls, patches = self.backbone(views, masks)
        prototypes = self.head.prototypes()
        if self.patch_head is None and len(patches):
            points = self.head.points(torch.cat([cls.flatten(0, 1), patches]))
            cls_points, patch_points = points.split([len(points) - len(patches), len(patches)])
            cls_points, patch_prototypes = cls_points.unflatten(0, cls.shape[:2]), prototypes
        else:
            head = self.patch_head or self.head
            cls_points, patch_points = self.head.points(cls), head.points(patches)
            patch_prototypes = prototypes if head is self.head else head.prototypes()
        return Outputs(cls, patches, cls_points, patch_points, prototypes, patch_prototypes)

    def regions(self) -> list[tuple[nn.Module, str]]:
        """The parts worth compiling, as a module and its method, that hold no branch on a value and no collective.

        Batch statistics over several ranks are one, so that a head with them is left out.
        """
        heads = [head for head in (self.head, self.patch_head) if head is not None]
        alone = [head for head in heads if not any(isinstance(m, nn.SyncBatchNorm) for m in head.modules())]
        return [*self.backbone.regions(), *((head, "project") for head in alone)]

    def units(self, device: torch.device) -> list[nn.Module]:
        """Modules of many parameters that a forward pass on ``device`` calls once, so that an engine which keeps
        weights in parts may gather theirs at a time."""
        return self.backbone.units(device)


def build_network(config: Config, teacher: bool = False, load: bool = True) -> Network:
    """The network of ``config``, whole, in fp32 on the CPU, started by run.seed and from files of weights.

    Args:
        config: see :func:`outline`, and :func:`fastdino.model.weights.settled`.
        teacher: see :func:`outline`; it starts as the student does.
        load: False leaves files of weights unread.

    Raises what :func:`outline` raises, and WeightsError.
    """
    config = settled(config) if load else config
    network = outline(config, teacher)
    materialise(network, start_of(config, network, load))
    return network


def outline(config: Config, teacher: bool = False) -> Network:
    """The network of ``config`` on the meta device: names and shapes of parameters that no memory is taken for.

    Buffers are there. A backbone of timm, whose code knows alone how it starts, is built whole, in fp32 on the CPU; so
    it is on the meta device where that is torch's default.

    Args:
        config: model, heads, view sizes, whether patches are predicted, engine.fp8 and run.seed are read.
        teacher: without drop path, stretched coordinates and gradients. BatchNorm layers of a teacher stay in training
            mode, as in DINO v1: their running statistics are the teacher's own, no average of the student's.

    Raises ConfigError for a backbone that does not exist or cannot take the views' sizes.
    """
    model = dataclasses.replace(config.model, drop_path=0.0, rope_scale=1.0) if teacher else config.model
    views = config.views
    given = {"global": (views.global_size, 2 * config.run.local_batch)}
    if views.num_local:
        given["local"] = views.local_size, views.num_local * config.run.local_batch
    mask_token, channels = config.loss.patch_weight > 0, config.data.channels
    with torch.device("meta") if model.is_vit else nullcontext():
        backbone = build_backbone(
            model, views.global_size, given, mask_token=mask_token, channels=channels, seed=config.run.seed
        )
    if not teacher:
        backbone.set_checkpointing(config.engine.checkpointing)
    if config.engine.fp8:
        assert isinstance(backbone, ViT)
        backbone.use_fp8()
    settings = [head for head in (config.head, config.patch_head) if head is not None]
    with torch.device("meta"):
        heads = [Head(backbone.num_features, head, model.init) for head in settings]
    for module in (module for head in heads for module in head.modules()):
        if isinstance(module, nn.BatchNorm1d):
            for name, buffer in module.named_buffers():
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
            module.reset_running_stats()
    network = Network(backbone, *heads)
    return network.requires_grad_(False) if teacher else network


def start_of(config: Config, network: Network, load: bool = True) -> Values:
    """What the parameters of a network of ``config`` start from: noise by run.seed, or what is in files of weights.

    Of a file the elements that are asked for are read. A backbone of timm is given what is in its file at once, and so
    are buffers.

    Args:
        network: by :func:`outline`; of the other weights' grid of positions, if it is one, from here on.
        load: False leaves files of weights unread.

    Raises WeightsError.
    """
    files = _files(config, network) if load else {}
    rules = rules_of(network) | files
    return lambda name, start, stop: values(config.run.seed, name, start, stop, rules[name])


def _files(config: Config, network: Network) -> dict[str, Rule]:
    """Rules of the parameters that start from files."""
    parts: dict[str, State] = {}
    if config.model.weights is not None:
        if isinstance(network.backbone, ViT):
            parts["backbone"] = backbone_state(network.backbone, config.model.weights, whole=False)
        else:
            load_backbone(network.backbone, config.model.weights)
    for name, head in (("head", config.head), ("patch_head", config.patch_head)):
        if head is not None and head.weights is not None:
            parts[name] = head_state(network.get_submodule(name), head.weights, patches=name == "patch_head")
    state = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    for name, buffer in network.named_buffers():
        if name in state:
            buffer.copy_(state.pop(name))
    return {name: held(tensor if isinstance(tensor, Rows) else [tensor]) for name, tensor in state.items()}


def build_backbone(
    model: ModelConfig,
    image_size: int | tuple[int, int],
    views: dict[str, tuple[int, int]] | None = None,
    mask_token: bool = False,
    channels: int = 3,
    seed: int = 0,
) -> Backbone:
    """A backbone in fp32 on the CPU; its module maps (B, C, h, w) to (B, D).

    Args:
        model: arch and its options; ``weights`` is not read here.
        image_size: side in pixels, for our ViT also (height, width), for which position embeddings are made where
            model.image_size does not say.
        views: by name, side and number of the views of a size that it has to take at a time, by default images of
            ``image_size``; checked for timm's backbones.
        mask_token: our ViT has one.
        channels: C, of the images.
        seed: of its first values.
    """
    with torch.random.fork_rng(devices=[]):  # torch's layers make noise of their own first, which is the caller's
        if not model.is_vit:
            assert isinstance(image_size, int), "a backbone of timm is made for squares"
            torch.manual_seed(seed)
            return TimmBackbone(model, image_size, views or {"global": (image_size, 2)}, channels)
        options = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        options["image_size"] = model.image_size or image_size
        return ViT(model.arch.removeprefix("vit_"), mask_token=mask_token, channels=channels, seed=seed, **options)


def takes_weight_decay(name: str, param: Tensor) -> bool:
    """All but biases and 1-D parameters do, tokens and position embeddings included. Source: DINO v1."""
    return not (name.endswith(".bias") or param.ndim == 1)


def layer_rates(names: Iterable[str], decay: float, patch_embed: float = 1.0) -> dict[str, float]:
    """What multiplies the learning rate of each parameter of a network: by its depth in the ViT ``backbone``.

    ``decay ** (depth + 1 - layer)``. Layer 0 holds the tokens, the positions and the patch embedding, the last of which
    is multiplied by ``patch_embed`` besides; block i is layer i + 1; the final norm and what is no part of the backbone
    have 1. timm's ViTs have the same names. Source: DINOv2's param_groups; Clark et al. 2020, layer-wise decay.
    """
    below_norm = re.compile(r"backbone\.(?!(?:model\.)?(?:fc_)?norm\.)(?:model\.)?(?:blocks\.(\d+)\.)?")
    rates = dict.fromkeys(names, 1.0)
    inside = {name: int(match[1] or -1) for name in rates if (match := below_norm.match(name))}
    depth = 1 + max(inside.values(), default=-1)
    for name, block in inside.items():
        rates[name] = decay ** (depth - block)
        if name.startswith("backbone.patch_embed."):
            rates[name] *= patch_embed
    return rates


def restore_backbone(path: Path, arch: str = "", image_size: int | None = None) -> tuple[Backbone, Config]:
    """The backbone that a file holds, and the config that it was trained with as far as it is known.

    Args:
        path: written by :func:`export_backbone` with metadata["config"] = Config.to_json(), or published weights, see
            :func:`fastdino.model.weights.load_backbone`.
        arch: model.arch of published weights; without it, one of our ViTs is told by its names and shapes.
        image_size: side in pixels that a published backbone of timm is made for; 224 by default.

    It needs neither DeepSpeed nor the run it came from. Raises WeightsError and ConfigError.
    """
    metadata = read_metadata(path)
    if "config" in metadata:
        config = Config.from_json(metadata["config"])
        model = config.model
        if model.is_vit:  # its own interpolation; the rest the file says, which an export may have changed
            model = dataclasses.replace(form_of(path).of(model), interpolation=model.interpolation)
    elif arch.startswith("timm:"):
        model = ModelConfig(arch=arch)
        config = _published(model, image_size or SIDE)
    else:
        form = form_of(path)
        model = form.of(ModelConfig())
        config = _published(
            model, min(form.image_size or SIDE, SIDE // form.patch_size * form.patch_size), form.channels
        )
    check_arch(path, config, arch)
    model = dataclasses.replace(model, drop_path=0.0, attention="auto", weights=None)
    with torch.device("meta") if model.is_vit else nullcontext():
        backbone = build_backbone(model, config.views.global_size, channels=config.data.channels)
    if model.is_vit:
        backbone.to_empty(device="cpu")
    load_backbone(backbone, path)
    return backbone, config


SIDE = 224
"""Of the images in pixels by which the authors of DINO and DINOv2 evaluate their weights, whatever the files' grid."""


def check_arch(path: Path, config: Config, arch: str) -> None:
    """Raises WeightsError when the weights at ``path`` are of another architecture than the one asked for, if any."""
    if arch not in ("", config.model.arch):
        raise WeightsError(f"{path} holds a {config.model.arch}, not the {arch} that was asked for: leave out --arch")


def _published(model: ModelConfig, image_size: int, channels: int = 3) -> Config:
    model = dataclasses.replace(model, drop_path=0.0)
    views = ViewsConfig(
        global_size=image_size, num_local=0, jitter=0.0, grayscale=0.0
    )  # evaluations have no colour steps
    normalize: Literal["imagenet", "image"] = "imagenet" if channels == 3 else "image"
    return Config(model=model, views=views, data=DataConfig(channels=channels, normalize=normalize))
