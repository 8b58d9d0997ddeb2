"""A careful DINO trainer from public parts: lightly's head, loss and momentum update on a timm ViT.

What a user who knows what they do would write today: one batched forward per view size, fused or foreach AdamW,
foreach clipping and momentum update, autocast in bf16, no host sync in the step. It has the weights, the views and the
schedules of ours, so the losses must agree.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastdino.config import Config
from fastdino.data import Batch
from fastdino.engine.schedules import Schedules
from fastdino.model.vit import SIZES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PeerNetwork(nn.Module):
    """timm's ViT and lightly's DINO head."""

    def __init__(self, config: Config, drop_path: float) -> None:
        super().__init__()
        shape = SIZES[config.model.arch.removeprefix("vit_")]
        self.backbone = VisionTransformer(
            img_size=config.views.global_size, patch_size=config.model.patch_size, embed_dim=shape.width,
            depth=shape.depth, num_heads=shape.num_heads, mlp_ratio=shape.hidden / shape.width, num_classes=0,
            drop_path_rate=drop_path, dynamic_img_size=True,
        )  # fmt: skip
        head = config.head
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it uses the old weight_norm
            self.head = DINOProjectionHead(
                shape.width, head.hidden_dim, head.bottleneck_dim, head.num_prototypes,
                norm_last_layer=head.freeze_prototype_norm,
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(R, 3, h, w) -> (R, K) logits."""
        return self.head(self.backbone(x))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes the weights of :class:`fastdino.model.Network`, under lightly's names for the head."""
        names = {"head.mlp.": "head.layers.", "head.last_layer.v": "head.last_layer.weight_v",
                 "head.last_layer.g": "head.last_layer.weight_g"}  # fmt: skip
        renamed = {}
        for name, value in weights.items():
            old = next((old for old in names if name.startswith(old)), "")
            renamed[names[old] + name.removeprefix(old) if old else name] = value
        self.load_state_dict(renamed)


class Peer:
    """Student, teacher, loss and optimizer; :meth:`train_step` is the counterpart of Trainer.train_step."""

    def __init__(self, config: Config, weights: dict[str, Tensor], device: torch.device, compiled: bool) -> None:
        self.config, self.device, self.step = config, device, 0
        self.schedules = Schedules(config, config.data.num_images // config.run.local_batch, config.run.local_batch)
        self.student = PeerNetwork(config, config.model.drop_path).to(device)
        self.teacher = PeerNetwork(config, 0.0).to(device).requires_grad_(False)
        for network in (self.student, self.teacher):
            network.load(weights)
        self.loss = DINOLoss(config.head.num_prototypes, student_temp=config.loss.student_temp).to(device)
        self.loss._center_fn = lambda x, dim: x.mean(dim, keepdim=True)  # theirs all-reduces even alone
        decay = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in self.student.parameters() if p.requires_grad and p.ndim <= 1]
        self.optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest}], lr=0.0, fused=True)
        self.parameters = decay + rest
        self.bf16 = config.engine.precision == "bf16"
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        wrap: Callable[..., Any] = torch.compile if compiled else lambda f, **options: f
        # Sizes are few and fixed, so each is compiled for itself.
        self._student, self._teacher = (wrap(n, dynamic=False) for n in (self.student, self.teacher))
        self._loss = wrap(self._loss_of, dynamic=False)

    def train_step(self, batch: Batch) -> Tensor:
        """One update; the loss it returns stays on the device."""
        now = self.schedules(self.step)
        self.step += 1
        for group, decay in zip(self.optimizer.param_groups, (now.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = now.lr, decay
        loss = self.forward(batch, now.teacher_temp)
        loss.backward()
        if self.config.optim.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_momentum(self.student, self.teacher, now.momentum)
        return loss.detach()

    def forward(self, batch: Batch, teacher_temp: float) -> Tensor:
        """Forward passes and the loss, which moves the center."""
        groups = list(batch.views.values())
        views = [((x.flatten(0, 1).float() / 255) - self.mean) / self.std for x in groups]
        size = groups[0].shape[1]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                teacher = self._teacher(views[0])
            student = [self._student(x) for x in views]
            return self._loss([teacher], student, size, teacher_temp)

    def _loss_of(self, teacher: list[Tensor], student: list[Tensor], size: int, teacher_temp: float) -> Tensor:
        split = [[view for logits in group for view in logits.split(size)] for group in (teacher, student)]
        return self.loss(*split, teacher_temp=teacher_temp)
