"""Parameter groups, learning rates over time, the main model's loss and the optimizer: timm's, by a run's arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import Tensor, nn

from common.recipe import Recipe, SetLR


def without_weight_decay(model: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone besides biases and norms: what the model exempts, and
    AugSub's mask token."""
    return {"mask_token"} | set(getattr(model, "no_weight_decay", set)())


def weight_decay_groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay."""
    return param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=without_weight_decay(model))


def epoch_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, updates_per_epoch: float, lag: int = 0
) -> SetLR:
    """timm's schedules, one rate an epoch: epoch e trains at the schedule's rate for epoch max(e - lag, 0)."""
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args))

    def set_lr(update: int) -> None:
        if scheduler is not None:
            scheduler.step(max(update // math.ceil(updates_per_epoch) - lag, 0))

    return set_lr


def update_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, updates_per_epoch: float, prefix: bool
) -> SetLR:
    """timm's schedules, one rate an update, by the share of the epoch's batches that it comes after.

    Args:
        prefix: whether the schedule proper begins after the warm-up and fills what is left of the epochs, or has begun
            behind it.
    """
    lasting = args.epochs - args.warmup_epochs if prefix else args.epochs
    kwargs = scheduler_kwargs(args) | {"num_epochs": max(lasting, 1), "warmup_prefix": prefix, "cooldown_epochs": 0}
    scheduler, _ = create_scheduler_v2(
        optimizer, **kwargs | {"step_on_epochs": False, "updates_per_epoch": updates_per_epoch}
    )

    def set_lr(update: int) -> None:
        if scheduler is not None:
            epoch, done = divmod(update, math.ceil(updates_per_epoch))
            scheduler.step_update(epoch * updates_per_epoch + done)

    return set_lr


def classification_loss(args: argparse.Namespace, mixed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of the main model, mean over the batch.

    Args:
        args: `bce_loss` with `bce_target_thresh` and `smoothing`, or cross-entropy with `smoothing`.
        mixed: whether labels come as probabilities, smoothed already, from mixup or CutMix.
    """
    if args.bce_loss:
        return BinaryCrossEntropy(0.0 if mixed else args.smoothing, target_threshold=args.bce_target_thresh)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def create_optimizer(recipe: Recipe, model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer `args.opt` by timm's name; "fusedlamb" is apex's where it is installed, else timm's foreach LAMB.

    Raises:
        ValueError: timm has no such optimizer.
    """
    kwargs = optimizer_kwargs(args)
    if args.opt == "fusedlamb":
        try:
            import apex.optimizers  # noqa: F401
        except ImportError:
            kwargs["opt"] = "lamb"
    if args.opt == "adamw":  # a quarter of the time that torch's default takes for 28M parameters on a CPU
        kwargs["fused"] = True
    try:
        return create_optimizer_v2(recipe.param_groups(model, args), **kwargs)
    except (AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--opt {args.opt}: timm could not make this optimizer ({error})") from error
