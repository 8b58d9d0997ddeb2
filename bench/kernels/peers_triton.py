"""Losses with dense targets of Liger and fla: Triton, so for a GPU, and optional (``pip install .[bench]``).

All are Kullback-Leibler divergences, mean over rows of KL(q || p): the cross-entropy without the entropy of q, which no
gradient sees. The teacher's center, which none of them knows, is subtracted before, where the logits are at hand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(log p, log q), both (M, K), to the mean over rows of KL(q || p)."""
LinearLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x (M, D), weight (K, D), both of the teacher) to the mean over rows of KL(q || p), p = softmax(x weight')."""


def row_losses() -> dict[str, RowLoss]:
    """Those that take log-probabilities, by name; empty where Liger is not installed."""
    try:
        from liger_kernel.transformers.jsd import LigerJSD
        from liger_kernel.transformers.kl_div import LigerKLDIVLoss
    except ImportError:
        return {}
    return {
        "Liger KL": LigerKLDIVLoss(reduction="batchmean", log_target=True),
        "Liger JSD": LigerJSD(beta=0.0),  # 0: the divergence from the teacher alone
    }


def linear_losses() -> dict[str, LinearLoss]:
    """Those that take the layer below too and so keep no more than a chunk of the logits, by name.

    A temperature is a factor of x, and of the teacher's: softmax((x / temp) weight'). They form logits in x's dtype: in
    bf16, and with rows of x and weight of length 1 as DINO's are, their gradients lose digits.
    """
    found: dict[str, LinearLoss] = {}
    try:
        from fla.modules.fused_kl_div import fused_kl_div_loss
    except ImportError:
        pass
    else:
        found["fla KL"] = lambda x, weight, teacher_x, teacher_weight: fused_kl_div_loss(
            x, teacher_x, weight, teacher_weight
        )
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return found
    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def compiled_chunks(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # of the hard loss, whose weight is 0
        return chunked(x, weight, teacher_x, teacher_weight, labels)

    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    return found | {"Liger linear JSD": lambda *x: fused(*x, None), "Liger linear JSD, torch.compile": compiled_chunks}


def entropy(teacher: Tensor, center: Tensor, temp: float) -> Tensor:
    """Mean entropy of softmax((teacher - center) / temp), in float64: what a divergence lacks to be a cross-entropy."""
    log_q = torch.log_softmax((teacher.double() - center.double()) / temp, dim=-1)
    return -(log_q.exp() * log_q).sum(-1).mean()
