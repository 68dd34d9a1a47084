"""What makes a recipe a recipe, as values and callables.

`common/` knows no recipe by name: everything that differs between the four stands in a `Recipe`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import Tensor, nn

Settings = Mapping[str, Any]
SetLR = Callable[[int], None]


def without_weight_decay(model: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone besides biases and norms: what the model exempts, and
    AugSub's mask token."""
    return {"mask_token"} | set(getattr(model, "no_weight_decay", set)())


def weight_decay_groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay."""
    return param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=without_weight_decay(model))


def lr_per_512(args: argparse.Namespace, global_batch: int) -> argparse.Namespace:
    """The learning rate is stated for a global batch of 512 images and grows with it."""
    return argparse.Namespace(**vars(args) | {"lr": args.lr * global_batch / 512})


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


def no_flags(parser: argparse.ArgumentParser) -> None:
    """A recipe without flags of its own."""


@dataclass(frozen=True)
class Recipe:
    """One published training recipe: a delta over the defaults in `common.args`, and what it does its own way.

    Args:
        name: folder of the recipe.
        about: one line for `--help`.
        defaults: settings that differ from the common defaults.
        variants: rows of the paper's tables, as settings over `defaults`.
        digits: settings for the embedded digits, used without a data path and a variant.
        create_model: (args, classes) → the bare model.
        add_flags: adds the flags that only this recipe has.
        from_files: (first look at the arguments) → settings in the files that they name.
        check: looks over the parsed arguments, fills in what follows from others; raises ValueError.
        new_head_std: standard deviation of a classifier that `--finetune` leaves new; None keeps the model's own.
        adapt_weights: (state dict in upstream's names, model) → state dict in the model's names.
        scale_lr: (args, global batch) → the arguments with the learning rates in force.
        schedule: (optimizer, args, updates per epoch: batches / micro-batches, which may not divide) → function that
            sets the rates for an update, counted from 0.
        param_groups: (model, args) → the optimizer's parameter groups.
        loss: (args, mixed) → the main model's loss.
        summary: whether summary.csv is kept too.
        curve_steps: points of an epoch on TensorBoard's axis; None counts optimizer steps.
    """

    name: str
    about: str
    create_model: Callable[[argparse.Namespace, int], nn.Module]
    defaults: Settings = field(default_factory=dict)
    variants: Mapping[str, Settings] = field(default_factory=dict)
    digits: Settings = field(default_factory=dict)
    add_flags: Callable[[argparse.ArgumentParser], None] = no_flags
    from_files: Callable[[argparse.Namespace], Settings] = lambda args: {}
    check: Callable[[argparse.Namespace], None] = lambda args: None
    new_head_std: float | None = None
    adapt_weights: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda weights, model: weights
    scale_lr: Callable[[argparse.Namespace, int], argparse.Namespace] = lr_per_512
    schedule: Callable[[torch.optim.Optimizer, argparse.Namespace, float], SetLR] = epoch_schedule
    param_groups: Callable[[nn.Module, argparse.Namespace], list[dict[str, Any]]] = weight_decay_groups
    loss: Callable[[argparse.Namespace, bool], Callable[[Tensor, Tensor], Tensor]] = classification_loss
    curve_steps: int | None = None
    summary: bool = False


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
