"""CoSub: two sub-models of one network learn the labels and each other; the baseline that AugSub is compared with.

Touvron, Cord, Oquab, Bojanowski, Verbeek and Jégou, "Co-training 2^L Submodels for Visual Recognition", arXiv
2212.04884. A batch (x, y) goes through the model twice in one forward pass of twice the images; the outputs o and o'
differ by what each drops at random. With l the binary cross-entropy it costs

    1/4 [ l(o, y) + l(o', y) + l(o, stop_gradient(sigmoid(o'))) + l(o', stop_gradient(sigmoid(o))) ]

which is twice the work of plain training, where AugMask on a vision transformer is one and a half times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from common.criteria import Criterion


class CoSub:
    """The loss of a CoSub step, in place of `AugSub` in a trainer.

    Raises:
        ValueError: the model has no stochastic depth at a rate above 0.
    """

    kind, weight = "none", 1.0  # as AugSub's: to a trainer it is a single pass with one loss

    def __init__(self, model: nn.Module):
        if not any(isinstance(module, DropPath) and module.drop_prob for module in model.modules()):
            raise ValueError("--cosub: the model has no stochastic depth, by which alone its sub-models differ")

    def __repr__(self) -> str:
        return "CoSub"

    def losses(
        self, model: nn.Module, x: Tensor, y: Tensor, criterion: Criterion, sync: bool = True
    ) -> Iterator[Tensor]:
        """Yield the loss of a step, a scalar in float32.

        Args:
            x, y: images (B, C, H, W), and labels (B,), or (B, K) where they are mixed.
            criterion: binary cross-entropy of logits (B, K) and labels.
            sync: False on all but the last micro-batch of an accumulated step, as in `AugSub.losses`.
        """
        with nullcontext() if sync else getattr(model, "no_sync", nullcontext)():
            outputs = model(torch.cat((x, x)))
            with torch.autocast(outputs.device.type, enabled=False):
                one, other = outputs.float().chunk(2)
                loss = criterion(one, y) + criterion(other, y) + _learn_from(one, other) + _learn_from(other, one)
            yield 0.25 * loss


def _learn_from(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, teacher.detach().sigmoid())
