"""What the sub-model learns under each criterion: a table by name, and the criterion for targets that are no labels.

docs/criteria.md shows the table. Label smoothing and target thresholds correct labels, and the main model's output is
none, so the sub-model's loss has neither. At a target that is one-hot, the sub-model's loss is the main model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

Criterion = Callable[[Tensor, Any], Tensor]
Target = str | Callable[[Tensor], Tensor]
SubCriterion = Callable[[Tensor, Tensor, Any], Tensor]  # (the sub-model's logits, its target, labels) → loss

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=1),
    "softmax of the last axis": lambda logits: logits.softmax(dim=-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "same": lambda logits: logits,
}
TARGETS = {
    "torch.CrossEntropyLoss": "softmax",
    "torch.cross_entropy": "softmax",
    "timm.LabelSmoothingCrossEntropy": "softmax of the last axis",
    "timm.SoftTargetCrossEntropy": "softmax of the last axis",
    "timm.PolyCrossEntropy": "softmax of the last axis",
    "torch.BCEWithLogitsLoss": "sigmoid",
    "torch.binary_cross_entropy_with_logits": "sigmoid",
    "torch.MultiLabelSoftMarginLoss": "sigmoid",
    "torch.multilabel_soft_margin_loss": "sigmoid",
    "timm.BinaryCrossEntropy": "sigmoid",
    "timm.AsymmetricLossMultiLabel": "sigmoid",
    "timm.PolyBinaryCrossEntropy": "sigmoid",
    "torch.MSELoss": "same",
    "torch.mse_loss": "same",
    "torch.L1Loss": "same",
    "torch.l1_loss": "same",
    "torch.SmoothL1Loss": "same",
    "torch.smooth_l1_loss": "same",
    "torch.HuberLoss": "same",
    "torch.huber_loss": "same",
}
REFUSED = {
    "timm.JsdCrossEntropy": "compares the augmentations of an image, not an output with a target",
    "torch.NLLLoss": "takes class indices, and the sub-model learns probabilities; use nn.CrossEntropyLoss on logits",
    "torch.nll_loss": "takes class indices, and the sub-model learns probabilities; use F.cross_entropy on logits",
    "timm.AsymmetricLossSingleLabel": "takes class indices, and the sub-model learns probabilities",
    "timm.TwoWayLoss": "rounds targets to 0 and 1, and the sub-model learns probabilities",
    "timm.ZlprLoss": "rounds targets to 0 and 1, and the sub-model learns probabilities",
    "torch.KLDivLoss": "takes log-probabilities, not logits",
    "torch.kl_div": "takes log-probabilities, not logits",
    "torch.BCELoss": "takes probabilities, not logits; use nn.BCEWithLogitsLoss",
    "torch.binary_cross_entropy": "takes probabilities, not logits; use F.binary_cross_entropy_with_logits",
}
FOR_LABELS = {"smoothing": 0.0, "target_threshold": None, "smooth_dense": False}  # attributes of timm's criteria
CHOICES = '"softmax", "sigmoid", "same" or a function of the logits'


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, `.logits`, "logits" of a mapping, or the one tensor in it.

    Raises:
        ValueError: there is none, or one of several without that name.
    """
    if isinstance(output, Tensor):
        return output
    mapping = isinstance(output, Mapping)
    named = output.get("logits") if mapping else getattr(output, "logits", None)
    values = output.values() if mapping else output if isinstance(output, (tuple, list)) else ()
    tensors = [named] if isinstance(named, Tensor) else [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != 1:
        parts = f"with {', '.join(output)}" if mapping else f"with {len(tensors)} tensors"
        raise ValueError(
            f"logits: the model returns a {type(output).__name__} {parts}; pass logits=, a function from it to them"
        )
    return tensors[0]


def criterion_name(criterion: Criterion) -> str:
    """Return the library and the name of a criterion, such as "torch.CrossEntropyLoss".

    The class that defines `forward` counts: a subclass with a loss of its own has its own name.
    """
    function: Any = criterion
    if isinstance(criterion, nn.Module):
        function = next(c for c in type(criterion).__mro__ if {"forward", "__call__"} & vars(c).keys())
    elif isinstance(criterion, partial) and not isinstance(criterion.func, nn.Module):
        function = criterion.func
    name = getattr(function, "__name__", type(function).__name__)
    return f"{(getattr(function, '__module__', None) or '').partition('.')[0]}.{name}"


def compute_loss(criterion: Callable[..., Tensor], logits: Tensor, *targets: Any) -> Tensor:
    """Compute the criterion outside autocast, in float32 or wider."""
    with torch.autocast(logits.device.type, enabled=False):
        return criterion(widen(logits), *targets)


def widen(logits: Tensor) -> Tensor:
    """Return logits in float32; those in float64 stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sub_criterion(criterion: Criterion, target: Target = "auto") -> tuple[SubCriterion, Callable[[Tensor], Tensor]]:
    """Return the sub-model's loss, and the function from the main model's logits to its targets.

    Args:
        criterion: of the main model.
        target: "auto" looks the criterion up in the table; "softmax" (over dim 1), "sigmoid", "same" or a function
            is taken for any criterion.

    Raises:
        ValueError: "auto", and the criterion is not in the table.
    """
    criterion = getattr(criterion, "_orig_mod", criterion)  # what torch.compile wraps
    name = criterion_name(criterion)
    if target == "auto":
        if name in REFUSED:
            raise ValueError(f"criterion: {name} {REFUSED[name]}; or pass target={CHOICES} to AugSub")
        if name not in TARGETS:
            raise ValueError(
                f"criterion: what the sub-model should learn with {name} is not known; pass target={CHOICES} to AugSub"
            )
        target = TARGETS[name]
    to_target = FUNCTIONS[target] if isinstance(target, str) else target
    if name not in TARGETS:  # another's criterion, taken as it is
        return lambda logits, soft, labels: criterion(logits, soft), to_target
    return _for_soft_targets(name, criterion), partial(_check_shape, to_target)


def _check_shape(to_target: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    target = to_target(logits)
    if target.shape != logits.shape:
        raise ValueError(
            f"target: returns {tuple(target.shape)} for logits of {tuple(logits.shape)}; return a value for each logit"
        )
    return target


def _for_soft_targets(name: str, criterion: Any) -> SubCriterion:
    """Return the criterion of a row without what it does to labels."""
    if name == "torch.CrossEntropyLoss":
        return partial(_cross_entropy, criterion.weight, criterion.ignore_index, criterion.reduction)
    if name == "torch.cross_entropy":
        settings = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
        given = criterion.keywords if isinstance(criterion, partial) else {}
        if (isinstance(criterion, partial) and criterion.args) or given.keys() - settings.keys():
            raise ValueError(f"criterion: {criterion} sets more than {', '.join(settings)}; use nn.CrossEntropyLoss")
        return partial(_cross_entropy, *[(settings | given)[key] for key in list(settings)[:3]])
    if name == "timm.LabelSmoothingCrossEntropy":
        criterion = SoftTargetCrossEntropy()
    changes = {key: value for key, value in FOR_LABELS.items() if key in getattr(criterion, "__dict__", {})}
    if changes and isinstance(criterion, nn.Module):
        criterion = copy.copy(criterion)
        for key, value in changes.items():
            setattr(criterion, key, value)
    return lambda logits, target, labels: criterion(logits, target)


def _cross_entropy(
    weight: Tensor | None, ignore_index: int, reduction: str, logits: Tensor, target: Tensor, labels: Tensor
) -> Tensor:
    """Compute cross-entropy with probabilities, under the class weights and the ignored labels of one with indices.

    With indices torch divides by the weights of the labels that count; with probabilities by the number of labels,
    whatever their weights. Where `labels` are indices, so is this: it divides by sum_k w_k q_k of those that count.

    Args:
        logits, target: (B, K) or (B, K, H, W).
        labels: of the main model, indices (B,) or (B, H, W), or probabilities.
    """
    if labels.is_floating_point():
        return F.cross_entropy(logits, target, weight, reduction=reduction)
    counts = labels != ignore_index
    target = target.masked_fill(~counts.unsqueeze(1), 0)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction)
    if reduction != "mean":
        return loss
    weights = counts if weight is None else target.movedim(1, -1) @ weight
    return loss * (counts.numel() / weights.sum())  # without weights exactly 1 where every label counts
