"""The recipe of ResNet strikes back (arXiv 2110.00476), as a delta over the common defaults, and its table's rows."""

from __future__ import annotations

import argparse
import os

from common.recipe import Recipe, late

PAPER = {
    "batch_size": 256,  # of each of 8 processes
    "opt": "lamb",
    "lr": 5e-3,
    "weight_decay": 0.02,
    "warmup_epochs": 5,
    "cooldown_epochs": 0,
    "smoothing": 0.0,
    "drop_path": 0.05,
    "aug_repeats": 3,
    "aa": "rand-m7-mstd0.5",
    "mixup": 0.1,
    "cutmix": 1.0,
    "color_jitter": 0.0,
    "eval_crop_ratio": 0.95,
    "bce_loss": True,
    "log_interval": 400,
}
VARIANTS = {name: PAPER | {"model": name} for name in ("resnet50", "resnet101", "resnet152")}

# Without mixing and flips, which a digit does not survive; blocks are a quarter of the image, as on ImageNet a seventh.
DIGITS = {
    "model": "resnet10t",
    "input_size": 32,
    "augsub_block": 8,
    "epochs": 15,
    "batch_size": 64,
    "opt": "lamb",
    "lr": 8e-3,
    "weight_decay": 0.02,
    "warmup_epochs": 2,
    "smoothing": 0.0,
    "bce_loss": True,
    "color_jitter": 0.0,
    "hflip": 0.0,
    "scale": (0.5, 1.0),
    "reprob": 0.25,
    "eval_crop_ratio": 1.0,
    "amp": "off",
    "num_workers": 0,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("ResNet strikes back").add_argument
    add("data_dir", nargs="?", metavar="DATA_DIR", help="folder with train/ and validation/ or val/; as --data-path")
    add("--aug-repeats", type=int, default=0, help="times each image comes in an epoch, of a share of the images")
    add("--sync-bn", action="store_true", help="batch statistics of all processes together, on GPUs")
    add("--dist-bn", choices=("reduce", "broadcast", ""), default="reduce", help="what the processes do with their "
        "running batch statistics after each epoch: average them, take the first one's, or nothing")  # fmt: skip
    add("--checkpoint-hist", type=int, default=10, help="most checkpoints to keep, those of highest accuracy")
    add("--native-amp", action="store_true", help="mixed precision, which is on where the hardware has it")


def check(args: argparse.Namespace) -> None:
    if args.aug_repeats < 0:
        raise ValueError(f"--aug-repeats {args.aug_repeats}: 0 turns it off, 3 is the paper's")
    args.repeated_aug = args.repeated_aug or args.aug_repeats > 0


RECIPE = Recipe(
    name="resnet_rsb",
    about="ResNet strikes back: ResNets, or any timm model, plain or with AugSub.",
    defaults={
        "model": "resnet50",
        "batch_size": 128,
        "opt": "sgd",
        "opt_eps": None,  # the optimizer's own
        "weight_decay": 2e-5,
        "lr": 5e-2,
        "warmup_lr": 1e-4,
        "min_lr": 1e-6,
        "warmup_epochs": 3,
        "cooldown_epochs": 10,
        "decay_epochs": 100,
        "model_ema_decay": 0.9998,
        "reprob": 0.0,
        "drop_path": 0.0,
        "aa": None,
        "train_interpolation": "random",
        "color_jitter": 0.4,
        "num_workers": min(4, os.cpu_count() or 1),
        "channels_last": True,  # a tenth faster in float32 on a CPU, with the same arithmetic in another order
        "seed": 42,
    },
    variants=VARIANTS,
    digits=DIGITS,
    create_model=late("common.models:create_timm_model"),
    add_flags=add_flags,
    check=check,
    scale_lr=lambda args, batch: args,
    summary=True,
)
