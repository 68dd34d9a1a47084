"""The recipe of ResNet strikes back (arXiv 2110.00476), as a delta over the common defaults, and its table's rows."""

from __future__ import annotations

import argparse
import os
from typing import Any

from common.args import PREPROCESSING
from common.flag_types import file_path, non_negative_int
from common.recipe import Recipe, Settings
from common.train_args import TrainArgs

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
    "input_size": 224,
    "eval_crop_ratio": 0.95,
    "bce_loss": True,
    "log_interval": 400,
}
VARIANTS = {name: PAPER | {"model": name} for name in ("resnet50", "resnet101", "resnet152")}

# Without mixing and flips, which change what a digit is; a block is a quarter of the image, on ImageNet a seventh.
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


DEFAULTS: dict[str, Any] = {
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
    "class_order": "natural",
}


class ResNetArgs(TrainArgs):
    data_dir: str | None
    native_amp: bool


class ResNetRSB(Recipe[ResNetArgs]):
    args_class = ResNetArgs
    name = "resnet_rsb"
    about = "ResNet strikes back: ResNets, or any timm model, plain or with AugSub."
    defaults = DEFAULTS
    variants = VARIANTS
    digits = DIGITS
    writes_summary = True
    from_pretrained_cfg = PREPROCESSING

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("ResNet strikes back").add_argument
        add(
            "data_dir",
            nargs="?",
            type=file_path,
            metavar="DATA_DIR",
            help="as --data-path; holds train/ and validation/ or val/",
        )
        add("--aug-repeats", type=non_negative_int, default=0, help="times that an epoch repeats an image; 0 for once")
        add("--sync-bn", action="store_true", help="batch norm over the images of all processes, on GPUs")
        add(
            "--dist-bn",
            choices=("reduce", "broadcast", ""),
            default="reduce",
            help="running batch statistics after each epoch: average those of all processes, take rank 0's, or neither",
        )
        add("--checkpoint-hist", type=non_negative_int, default=10, help="checkpoints of highest accuracy to keep")
        add("--native-amp", action="store_true", help="no effect: mixed precision is on if the hardware has it")

    def read_config(self, args: ResNetArgs) -> Settings:
        return {} if args.data_dir is None else {"data_path": args.data_dir}

    def fill_args(self, args: ResNetArgs) -> None:
        args.repeated_aug = args.repeated_aug or args.aug_repeats > 0

    def scale_lr(self, args: ResNetArgs, global_batch: int) -> ResNetArgs:
        return args


RECIPE = ResNetRSB()
