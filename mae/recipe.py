"""The recipe of MAE finetuning (arXiv 2111.06377), as a delta over the common defaults, and the rows of its table."""

from __future__ import annotations

import argparse
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from common.flag_types import above_zero_to_one, file_path, non_negative_float
from common.recipe import Recipe
from common.train_args import TrainArgs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from common.optim import SetLR

PAPER = {"mixup": 0.8, "cutmix": 1.0, "dist_eval": True}
BASE = PAPER | {"model": "vit_base_patch16", "batch_size": 128, "blr": 5e-4, "layer_decay": 0.65}
LARGE = PAPER | {"batch_size": 32, "accum_iter": 4, "drop_path": 0.2}
HUGE = PAPER | {"model": "vit_huge_patch14", "batch_size": 16, "drop_path": 0.3}
# FT-CLIP (arXiv 2212.06138), outside the paper's tables; the learning rates are 6e-4 and 4e-4 at 2,048 images a step
CLIP = {
    "finetune": "timm",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "weight_decay": 0.05,
    "min_lr": 1e-6,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "model_ema": True,
    "model_ema_decay": 0.9998,
    "global_pool": True,
    "dist_eval": True,
}
CLIP_BASE = {"model": "vit_base_patch16_clip_224.openai", "batch_size": 256, "blr": 7.5e-5, "layer_decay": 0.6}
CLIP_LARGE = {"model": "vit_large_patch14_clip_224.openai", "batch_size": 64, "blr": 5e-5, "layer_decay": 0.65}

# Batches are per process: 8 processes for base and large, 64 for huge. All start from --finetune, CLIP's from its tag.
VARIANTS: dict[str, dict[str, Any]] = {
    "base_100": BASE | {"epochs": 100},
    "large_50": LARGE,
    "huge_50": HUGE,
    "clip_base": CLIP | CLIP_BASE | {"epochs": 50, "warmup_epochs": 10},
    "clip_large": CLIP | CLIP_LARGE | {"accum_iter": 4, "epochs": 30, "warmup_epochs": 5},
}

# From scratch, so all layers have one learning rate; without mixing and flips, which change what a digit is.
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


DEFAULTS: dict[str, Any] = {
    "model": "vit_large_patch16",
    "epochs": 50,
    "lr": None,
    "min_lr": 1e-6,
    "warmup_lr": 0.0,
    "eval_crop_ratio": None,
    "output_dir": "./output_dir",
}


class MAEArgs(TrainArgs):
    blr: float
    layer_decay: float
    global_pool: bool | None  # None: as in a config.json


class MAE(Recipe[MAEArgs]):
    args_class = MAEArgs
    name = "mae"
    about = "Finetuning of MAE-pretrained vision transformers, plain or with AugSub."
    defaults = DEFAULTS
    variants = VARIANTS
    digits = DIGITS
    settings_of_config = MappingProxyType({"global_pool": None})
    classes = 1000
    new_head_std = 2e-5
    curve_steps = 1000

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("MAE finetuning").add_argument
        add(
            "--blr",
            type=non_negative_float,
            default=1e-3,
            help="learning rate for 256 images a step, used without --lr",
        )
        add(
            "--layer-decay",
            type=above_zero_to_one,
            default=0.75,
            help="factor from a layer's learning rate to that of the layer below",
        )
        add("--global-pool", action="store_true", default=True, help="classify the mean of the patch tokens")
        add(
            "--log-dir",
            type=file_path,
            default=None,
            help="folder for TensorBoard's files; by default one in the output folder",
        )
        add("--cls-token", action="store_false", dest="global_pool", help="classify the class token instead")

    def fill_args(self, args: MAEArgs) -> None:
        if args.eval_crop_ratio is None:  # a margin up to 224 pixels, none above
            args.eval_crop_ratio = 0.875 if args.input_size <= 224 else 1.0

    def create_model(self, args: MAEArgs, classes: int) -> nn.Module:
        from mae.models import create_model

        return create_model(args, classes, global_pool=args.global_pool)

    def hub_architecture(self, args: MAEArgs) -> tuple[str, dict[str, Any]] | None:
        from mae.models import hub_architecture

        return hub_architecture(args.model, args.input_size, args.global_pool)

    def adapt_weights(self, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        from mae.models import adapt_weights

        return adapt_weights(state, model)

    def scale_lr(self, args: MAEArgs, global_batch: int) -> MAEArgs:
        return args.replace(lr=args.blr * global_batch / 256 if args.lr is None else args.lr)

    def param_groups(self, model: nn.Module, args: MAEArgs) -> list[dict[str, Any]]:
        from mae.models import param_groups

        return param_groups(model, args.weight_decay, args.layer_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, args: MAEArgs, updates_per_epoch: float) -> SetLR:
        from common.optim import update_schedule

        return update_schedule(optimizer, args, updates_per_epoch, prefix=True)


RECIPE = MAE()
