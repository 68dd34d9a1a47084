"""The Swin recipe (arXiv 2103.14030), as a delta over the common defaults, and the rows of its table."""

from __future__ import annotations

import argparse
import os
from typing import Any

from common.recipe import Recipe, late
from swin import config

MODEL = "swin_tiny_patch4_window7_224"


def row(name: str) -> dict[str, Any]:
    """A row of the table is its configuration file, at the paper's batch of 8 processes x 128 images."""
    return config.read(argparse.Namespace(cfg=f"configs/swin/swin_{name}_patch4_window7_224.yaml", opts=None))


VARIANTS = {name: row(name) for name in ("tiny", "small", "base")}

# Patches of 4 pixels and windows of 4 tokens give 32 pixels two stages; blocks are a quarter of the image, as on
# ImageNet a seventh. Without mixing and flips, which a digit does not survive.
DIGITS = {
    "model": "swin_pico_patch4_window4_32",
    "input_size": 32,
    "patch_size": 4,
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


def add_flags(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("Swin").add_argument
    add("--cfg", default=None, help="configuration file, such as configs/swin/swin_tiny_patch4_window7_224.yaml")
    add("--opts", nargs="+", default=None, help="keys of the configuration and their values, KEY VALUE …")
    add("--tag", default="default", help="last part of the output folder, <output>/<model name>/<tag>")
    add("--use-checkpoint", action=switch, default=False, help="recompute activations in backward to save memory")
    add("--auto-resume", action=switch, default=True, help="continue the run in the output folder")
    add("--disable-amp", action="store_true", help="as --amp off")
    add("--optim", default=None, help="as --opt")
    add("--zip", action=switch, default=False, help="read train.zip and val.zip with train_map.txt and val_map.txt")
    add("--cache-mode", default="part", choices=("no", "full", "part"), help="kept for upstream's sake: the operating "
        "system caches files")  # fmt: skip
    add("--amp-opt-level", default=None, help="kept for upstream's sake: O0 is --amp off")
    add("--fused-window-process", action=switch, default=False, help="kept for upstream's sake: it needs its kernels")
    add("--fused-layernorm", action=switch, default=False, help="kept for upstream's sake: PyTorch's is fused")
    # what only a configuration sets
    parser.set_defaults(patch_size=4, in_chans=3, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
                        window_size=7, mlp_ratio=4.0, qkv_bias=True, model_type="swin", test_crop=True,
                        amp_enable=True)  # fmt: skip


def check(args: argparse.Namespace) -> None:
    if args.model_type != "swin":
        raise ValueError(f"MODEL.TYPE {args.model_type}: this trainer has swin")
    if len(args.depths) != len(args.num_heads):
        raise ValueError(f"MODEL.SWIN: {len(args.depths)} DEPTHS for {len(args.num_heads)} NUM_HEADS")
    if args.augsub_joint and args.use_checkpoint and args.augsub in ("dropout", "droppath"):
        raise ValueError(
            f"--augsub-joint with --use-checkpoint and --augsub {args.augsub}: backward would recompute the sub-model "
            "at the main model's rates; leave out one of the two flags"
        )
    if args.disable_amp or not args.amp_enable or args.amp_opt_level == "O0":
        args.amp = "off"
    if args.optim:
        args.opt = args.optim
    if not args.test_crop:
        args.eval_crop_ratio, args.crop_mode = 1.0, "squash"
    if args.output_dir:
        args.output_dir = os.path.join(args.output_dir, args.model, args.tag)


def from_files(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `--cfg` and `--opts`, which alone give a Swin its shape and name."""
    if args.model != MODEL:
        raise ValueError(
            f"--model {args.model}: --cfg or --variant says which Swin, --opts MODEL.SWIN.DEPTHS … its shape"
        )
    return config.read(args)


def scale_lr(args: argparse.Namespace, global_batch: int) -> argparse.Namespace:
    """All three rates are stated for 512 images a step."""
    scaled = {name: getattr(args, name) * global_batch / 512 for name in ("lr", "warmup_lr", "min_lr")}
    return argparse.Namespace(**vars(args) | scaled)


RECIPE = Recipe(
    name="swin",
    about="Training of Swin transformers, plain or with AugSub.",
    defaults={
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
    },
    variants=VARIANTS,
    digits=DIGITS,
    create_model=late("swin.models:create_model"),
    add_flags=add_flags,
    check=check,
    from_files=from_files,
    adapt_weights=late("timm.models.swin_transformer:checkpoint_filter_fn"),
    scale_lr=scale_lr,
    schedule=late("common.optim:update_schedule", prefix=False),
)
