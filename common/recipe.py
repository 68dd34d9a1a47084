"""What makes a recipe a recipe, as values and callables.

`common/` knows no recipe by name: everything that differs between the four stands in a `Recipe`. One is read without
PyTorch, so that `--help` and a misspelled flag answer at once: what needs it is named, and imported at its first call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Settings = Mapping[str, Any]
SetLR = Callable[[int], None]


def late(name: str, **bound: Any) -> Callable[..., Any]:
    """The function "module:function", imported at its first call; `bound` are arguments that it always gets."""
    module, _, function = name.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), function)(*args, **bound, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


def lr_per_512(args: argparse.Namespace, global_batch: int) -> argparse.Namespace:
    """The learning rate is stated for a global batch of 512 images and grows with it."""
    return argparse.Namespace(**vars(args) | {"lr": args.lr * global_batch / 512})


# what a recipe does that says nothing else
epoch_schedule = late("common.optim:epoch_schedule")
weight_decay_groups = late("common.optim:weight_decay_groups")
classification_loss = late("common.optim:classification_loss")


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
