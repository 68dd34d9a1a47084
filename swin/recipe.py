"""The Swin recipe (arXiv 2103.14030), as a delta over the common defaults, and the rows of its table."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, Any

from common.flag_types import file_path, optimizer_name
from common.recipe import Recipe, Settings
from swin import config
from swin.config import SwinArgs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from common.optim import SetLR

MODEL = "swin_tiny_patch4_window7_224"


# A row of the table is its configuration file, at the paper's batch of 8 processes x 128 images.
VARIANTS = {
    name: config.read(f"configs/swin/swin_{name}_patch4_window7_224.yaml") for name in ("tiny", "small", "base")
}

# 32 pixels are 8 patches of 4 pixels, so two stages with windows of 4. A block is a quarter of the image, on ImageNet a
# seventh. Without mixing and flips, which change what a digit is.
DIGITS = {
    "model": "swin_pico_patch4_window4_32",
    "input_size": 32,
    "embed_dim": 48,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "augsub_block": 8,
    "epochs": 60,
    "warmup_epochs": 5,
    "batch_size": 64,
    "opt": "lamb",
    "opt_eps": 1e-6,
    "lr": 0.128,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "drop_path": 0.0,
    "bce_loss": True,
    "smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "color_jitter": None,
    "aa": None,
    "hflip": 0.0,
    "scale": (0.5, 1.0),
    "remode": "const",
    "eval_crop_ratio": 1.0,
    "amp": "off",
    "num_workers": 0,
}


DEFAULTS: dict[str, Any] = {
    "model": MODEL,
    "batch_size": 128,
    "warmup_epochs": 20,
    "warmup_lr": 5e-7,
    "min_lr": 5e-6,
    "clip_grad": 5.0,
    "opt_betas": [0.9, 0.999],
    "color_jitter": 0.4,
    "mixup": 0.8,
    "cutmix": 1.0,
    "num_workers": min(8, os.cpu_count() or 1),
    "output_dir": "output",
    "log_interval": 10,
}


class Swin(Recipe[SwinArgs]):
    args_class = SwinArgs
    name = "swin"
    about = "Training of Swin transformers, plain or with AugSub."
    defaults = DEFAULTS
    variants = VARIANTS
    digits = DIGITS
    model_settings = config.SHAPE

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        switch = argparse.BooleanOptionalAction
        add = parser.add_argument_group("Swin").add_argument
        add(
            "--cfg",
            type=file_path,
            default=None,
            help="configuration file, such as configs/swin/swin_tiny_patch4_window7_224.yaml",
        )
        add("--opts", nargs="+", default=None, help="keys of the configuration and their values, KEY VALUE …")
        add("--tag", default="default", help="last part of the output folder, <output>/<model name>/<tag>")
        add("--use-checkpoint", action=switch, default=False, help="recompute activations in backward to save memory")
        add("--auto-resume", action=switch, default=True, help="resume the run in the output folder")
        add("--disable-amp", action="store_true", help="as --amp off")
        add("--optim", type=optimizer_name, default=None, help="as --opt")
        add("--zip", action=switch, default=False, help="read train.zip and val.zip with train_map.txt and val_map.txt")
        add(
            "--cache-mode",
            default="part",
            choices=("no", "full", "part"),
            help="no effect: the operating system caches files",
        )
        add("--amp-opt-level", default=None, help="O0 is --amp off; no effect otherwise")
        add("--fused-window-process", action=switch, default=False, help="no effect: it needs upstream's CUDA kernels")
        add("--fused-layernorm", action=switch, default=False, help="no effect: PyTorch's layer norm is fused")
        parser.set_defaults(**config.DEFAULTS_WITHOUT_FLAG)

    def read_config(self, args: SwinArgs) -> Settings:
        """Return the settings of `--cfg` and `--opts`; only they set a Swin's shape and name."""
        if args.model != MODEL:
            raise ValueError(
                f"--model {args.model}: has no effect here; choose a Swin with --cfg or --variant, or set its shape by "
                "--opts MODEL.SWIN.DEPTHS …"
            )
        settings = config.read(args.cfg, args.opts)
        if not settings.get("test_crop", True):
            settings = {"eval_crop_ratio": 1.0, "crop_mode": "squash"} | settings
        if args.cfg and args.data_set is None and args.data_path is None and "data_path" not in settings:
            raise ValueError(f"--cfg {args.cfg}: trains on ImageNet; pass its folder as --data-path")
        return settings

    def fill_args(self, args: SwinArgs) -> None:
        if args.disable_amp or not args.amp_enable or args.amp_opt_level == "O0":
            args.amp = "off"
        if args.optim:
            args.opt = args.optim
        if args.output_dir:
            args.output_dir = os.path.join(args.output_dir, re.sub(r"[:/@]+", "-", args.model), args.tag)

    def check_args(self, args: SwinArgs) -> None:
        super().check_args(args)
        if args.model_type != "swin":
            raise ValueError(f"MODEL.TYPE {args.model_type}: not supported; use swin")
        if len(args.depths) != len(args.num_heads):
            raise ValueError(
                f"MODEL.SWIN: {len(args.depths)} DEPTHS and {len(args.num_heads)} NUM_HEADS; set one of each per stage"
            )

    def pretrained_cfg(self, args: SwinArgs) -> Settings:
        """Return none: each model is a Swin of the recipe's, whatever `--opts MODEL.NAME` calls it."""
        return {}

    def create_model(self, args: SwinArgs, classes: int) -> nn.Module:
        from swin.models import create_model

        return create_model(args, classes)

    def hub_architecture(self, args: SwinArgs) -> tuple[str, dict[str, Any]] | None:
        from swin.models import hub_architecture

        return hub_architecture(args)

    def adapt_weights(self, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        from timm.models.swin_transformer import checkpoint_filter_fn

        return checkpoint_filter_fn(state, model)

    def scale_lr(self, args: SwinArgs, global_batch: int) -> SwinArgs:
        """Return the arguments with learning rates for this batch: upstream scales all three, for 512 images a step."""
        scaled = {name: getattr(args, name) * global_batch / 512 for name in ("lr", "warmup_lr", "min_lr")}
        return args.replace(**scaled)

    def schedule(self, optimizer: torch.optim.Optimizer, args: SwinArgs, updates_per_epoch: float) -> SetLR:
        from common.optim import update_schedule

        # upstream steps its schedule after an update, with that update's number: updates 0 and 1 have the same rate
        return update_schedule(optimizer, args, updates_per_epoch, prefix=False, lag=1)


RECIPE = Swin()
