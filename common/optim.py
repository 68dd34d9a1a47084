"""Parameter groups, learning rate schedules, the main model's loss and the optimizer: timm's, from a run's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import Tensor, nn

from common.train_args import TrainArgs

SCHEDULES_TO_MIN_LR = ("cosine", "tanh", "poly", "wsd", "rsqrt")  # timm's others do not read it
SetLR = Callable[[int], None]  # sets the learning rates for an update, counted from 0 over the whole run


def no_weight_decay_names(model: nn.Module) -> set[str]:
    """Names of parameters without weight decay, besides biases and norms: those the model lists, and AugSub's mask
    token."""
    return {"mask_token"} | set(getattr(model, "no_weight_decay", set)())


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay."""
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_weight_decay_names(model))


def epoch_schedule(optimizer: torch.optim.Optimizer, args: TrainArgs, updates_per_epoch: float, lag: int = 0) -> SetLR:
    """timm's schedules, stepped by epoch: epoch e trains at the schedule's rate for epoch max(e - lag, 0)."""
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args))

    def set_lr(update: int) -> None:
        if scheduler is not None:
            scheduler.step(max(update // math.ceil(updates_per_epoch) - lag, 0))

    return set_lr


def update_schedule(
    optimizer: torch.optim.Optimizer, args: TrainArgs, updates_per_epoch: float, prefix: bool, lag: int = 0
) -> SetLR:
    """timm's schedules, stepped by update: the rate follows the share of the epoch's batches that are done.

    Args:
        prefix: the schedule starts after the warm-up and lasts for the remaining epochs, as timm's `warmup_prefix`;
            else the warm-up replaces its first epochs.
        lag: update k runs at the schedule's rate for update max(k - lag, 0).
    """
    num_epochs = max(args.epochs - args.warmup_epochs if prefix else args.epochs, 1)
    kwargs = scheduler_kwargs(args) | {"num_epochs": num_epochs, "warmup_prefix": prefix, "cooldown_epochs": 0}
    scheduler, _ = create_scheduler_v2(
        optimizer, **kwargs | {"step_on_epochs": False, "updates_per_epoch": updates_per_epoch}
    )

    def set_lr(update: int) -> None:
        if scheduler is not None:
            # an epoch ends with a partial update if batches and micro-batches do not divide
            epoch, epoch_updates = divmod(max(update - lag, 0), math.ceil(updates_per_epoch))
            scheduler.step_update(epoch * updates_per_epoch + epoch_updates)

    return set_lr


def check_learning_rates(args: TrainArgs, in_force: TrainArgs, global_batch: int) -> list[str]:
    """Return the lines to print about rates that are in an unusual order.

    Args:
        args: as given.
        in_force: with the learning rates scaled for `global_batch`, the images of an optimizer step.

    Raises:
        ValueError: the learning rate is below the lowest as given, not only as scaled for a small batch.
    """
    notes, lr, min_lr, warmup_lr = [], in_force.lr, in_force.min_lr, in_force.warmup_lr
    assert lr is not None
    if args.sched in SCHEDULES_TO_MIN_LR and lr < min_lr:
        below = f"--lr: {lr:.3g} in force at {global_batch} images a step, below the {min_lr:.3g} of --min-lr"
        if args.lr is not None and args.lr < args.min_lr:
            raise ValueError(f"{below}; raise --lr or lower --min-lr")
        notes.append(f"{below}; the schedule rises")
    if args.warmup_is_all:
        notes.append(
            f"--warmup-epochs {args.warmup_epochs}: not below --epochs {args.epochs}, --lr is never reached; use fewer"
        )
    if args.sched != "none" and args.warmup_epochs and warmup_lr > lr:
        notes.append(f"--warmup-lr: {warmup_lr:.3g} in force, above the {lr:.3g} of --lr; the warm-up falls")
    return notes


def classification_loss(
    mixed: bool, smoothing: float, bce: bool = False, bce_target_thresh: float | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of the main model, mean over the batch: binary cross-entropy or cross-entropy.

    Args:
        mixed: labels come from mixup or CutMix as probabilities, already smoothed.
        bce_target_thresh: targets above it become 1, the others 0.
    """
    if bce:
        return BinaryCrossEntropy(0.0 if mixed else smoothing, target_threshold=bce_target_thresh)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def create_optimizer(groups: list[dict[str, Any]], args: TrainArgs) -> torch.optim.Optimizer:
    """timm's optimizer `args.opt` for these parameter groups; "fusedlamb" is apex's if installed, else timm's LAMB.

    Raises:
        ValueError: timm cannot build the optimizer.
    """
    kwargs = optimizer_kwargs(args)
    if args.opt == "fusedlamb":
        try:
            import apex.optimizers  # noqa: F401
        except ImportError:
            kwargs["opt"] = "lamb"
    if args.opt == "adamw":  # on a CPU, a quarter of the time of torch's default for 28M parameters
        kwargs["fused"] = True
    try:
        return create_optimizer_v2(groups, **kwargs)
    except (AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--opt {args.opt}: timm cannot build this optimizer ({error})") from error


def explain_initial_weights(decay: float, updates: int, limit: float) -> list[str]:
    """Return a line where the average of the weights would keep more than `limit` of the initial ones.

    Args:
        decay: of the average.
        updates: optimizer steps of the run.
    """
    share = decay**updates
    if share <= limit:
        return []
    rest = 1 - limit ** (1 / updates)  # the largest decay that would do is 1 - rest
    unit = 10.0 ** math.floor(math.log10(rest))
    enough = 1 - math.ceil(rest / unit) * unit
    return [
        f"--model-ema-decay {decay:g}: {100 * share:.1f} % of the initial weights would be left in the average after "
        f"{updates} steps; use --model-ema-warmup, or --model-ema-decay {max(enough, 0.0):.10g}"
    ]
