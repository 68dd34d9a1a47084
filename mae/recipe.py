"""The recipe of MAE finetuning (arXiv 2111.06377), as a delta over the common defaults, and the rows of its table."""

from __future__ import annotations

import argparse
from typing import Any

from common.recipe import Recipe, late

PAPER = {"mixup": 0.8, "cutmix": 1.0, "dist_eval": True}
BASE = PAPER | {"model": "vit_base_patch16", "batch_size": 128, "blr": 5e-4, "layer_decay": 0.65}
LARGE = PAPER | {"batch_size": 32, "accum_iter": 4, "drop_path": 0.2}
HUGE = PAPER | {"model": "vit_huge_patch14", "batch_size": 16, "drop_path": 0.3}

# Batches are per process: 8 processes for base and large, 64 for huge. All start from --finetune.
VARIANTS: dict[str, dict[str, Any]] = {
    "base_100": BASE | {"epochs": 100},
    "large_50": LARGE,
    "huge_50": HUGE,
}

# From scratch, so all layers learn alike; without mixing and flips, which a digit does not survive.
DIGITS = {
    "model": "vit_pico_patch8",
    "input_size": 32,
    "epochs": 100,
    "lr": 4e-3,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "smoothing": 0.0,
    "aa": None,
    "hflip": 0.0,
    "scale": (0.5, 1.0),
    "remode": "const",
    "eval_crop_ratio": 1.0,
    "nb_classes": 10,
    "amp": "off",
    "num_workers": 0,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("MAE finetuning").add_argument
    add("--blr", type=float, default=1e-3, help="learning rate for 256 images a step, used where --lr is not given")
    add("--layer-decay", type=float, default=0.75, help="factor from a layer's learning rate to the one's below it")
    add("--global-pool", action="store_true", default=True, help="classify the mean of the patch tokens")
    add("--log-dir", default=None, help="folder for TensorBoard's curves, where it is not one in the output folder")
    add("--cls-token", action="store_false", dest="global_pool", help="classify the class token instead")


def check(args: argparse.Namespace) -> None:
    if args.eval_crop_ratio is None:  # a margin up to 224 pixels, none above
        args.eval_crop_ratio = 0.875 if args.input_size <= 224 else 1.0
    if not 0 < args.layer_decay <= 1:
        raise ValueError(f"--layer-decay {args.layer_decay} is outside (0, 1]")


def scale_lr(args: argparse.Namespace, global_batch: int) -> argparse.Namespace:
    lr = args.blr * global_batch / 256 if args.lr is None else args.lr
    return argparse.Namespace(**vars(args) | {"lr": lr})


RECIPE = Recipe(
    name="mae",
    about="Finetuning of MAE-pretrained vision transformers, plain or with AugSub.",
    defaults={
        "model": "vit_large_patch16",
        "epochs": 50,
        "lr": None,
        "min_lr": 1e-6,
        "warmup_lr": 0.0,
        "nb_classes": 1000,
        "eval_crop_ratio": None,
        "output_dir": "./output_dir",
    },
    variants=VARIANTS,
    digits=DIGITS,
    create_model=late("mae.models:create_model"),
    add_flags=add_flags,
    check=check,
    adapt_weights=late("mae.models:adapt_weights"),
    new_head_std=2e-5,
    scale_lr=scale_lr,
    schedule=late("common.optim:update_schedule", prefix=True),
    param_groups=late("mae.models:param_groups"),
    curve_steps=1000,
)
