"""The DeiT-III recipe (arXiv 2204.07118), as a delta over the common defaults, and the rows of its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.recipe import Recipe
from common.train_args import TrainArgs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from common.augsub import AugSub
    from common.cosub import CoSub
    from common.optim import SetLR

# The paper's settings. A row of the table adds a model, its regularisation and its batch.
PRETRAIN = {
    "smoothing": 0.0,
    "reprob": 0.0,
    "opt": "fusedlamb",
    "unscale_lr": True,
    "bce_loss": True,
    "ThreeAugment": True,
    "eval_crop_ratio": 1.0,
    "dist_eval": True,
}
FINETUNE = {
    "epochs": 20,
    "lr": 1e-5,
    "weight_decay": 0.1,
    "reprob": 0.0,
    "unscale_lr": True,
    "repeated_aug": False,
    "eval_crop_ratio": 1.0,
    "dist_eval": True,
}
SMALL = PRETRAIN | {"model": "deit_small_patch16_LS", "batch_size": 256, "lr": 4e-3}
BASE = PRETRAIN | {"model": "deit_base_patch16_LS", "batch_size": 256, "lr": 3e-3, "input_size": 192}
LARGE = PRETRAIN | {"model": "deit_large_patch16_LS", "batch_size": 32, "lr": 3e-3, "input_size": 192}
HUGE = PRETRAIN | {"model": "deit_huge_patch14_LS", "batch_size": 32, "lr": 3e-3, "input_size": 160}
SHORT = {"epochs": 400, "weight_decay": 0.03}
LONG = {"epochs": 800}

# Batches are per process: 8 processes for small and base, 64 for large and huge.
VARIANTS = {
    "small_400": SMALL | SHORT | {"drop_path": 0.0},
    "small_800": SMALL | LONG | {"drop_path": 0.05},
    "base_400": BASE | SHORT,
    "base_800": BASE | LONG | {"drop_path": 0.2},
    "large_400": LARGE | SHORT | {"drop_path": 0.4},
    "large_800": LARGE | LONG | {"drop_path": 0.45},
    "huge_400": HUGE | SHORT | {"drop_path": 0.5},
    "huge_800": HUGE | LONG | {"drop_path": 0.6},
    "base_finetune": FINETUNE | {"model": "deit_base_patch16_LS", "drop_path": 0.2},
    "large_finetune": FINETUNE | {"model": "deit_large_patch16_LS", "batch_size": 8, "drop_path": 0.45},
    "huge_finetune": FINETUNE | {"model": "deit_huge_patch14_LS", "batch_size": 8, "drop_path": 0.55},
}

# Without mixing and flips, which change what a digit is, and without colours, which it does not have.
DIGITS = {
    "model": "deit_pico_patch8_LS",
    "input_size": 32,
    "epochs": 80,
    "opt": "fusedlamb",
    "opt_eps": 1e-6,
    "lr": 1.6e-2,
    "unscale_lr": True,
    "bce_loss": True,
    "smoothing": 0.0,
    "drop_path": 0.0,
    "color_jitter": None,
    "aa": None,
    "hflip": 0.0,
    "scale": (0.5, 1.0),
    "remode": "const",
    "mixup": 0.0,
    "cutmix": 0.0,
    "repeated_aug": False,
    "eval_crop_ratio": 1.0,
    "model_ema_decay": 0.99,
    "amp": "off",
    "num_workers": 0,  # on two cores, two workers beside two compute threads are no faster
}

DEFAULTS: dict[str, Any] = {
    "model": "deit_base_patch16_224",
    "color_jitter": 0.3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeated_aug": True,
    "model_ema": True,
    "cooldown_epochs": 10,
}


class RefuseDistillation(argparse.Action):
    """Refuses upstream's flags of distillation; the value "none" passes, as upstream's default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if values != "none":
            parser.error(f"{option}: distillation is not supported (AugSub has no teacher); remove the flag")


class DeiTArgs(TrainArgs):
    ThreeAugment: bool
    unscale_lr: bool
    attn_only: bool
    cosub: bool


class DeiT(Recipe[DeiTArgs]):
    args_class = DeiTArgs
    name = "deit"
    about = "DeiT-III pretraining and finetuning, plain or with AugSub."
    defaults = DEFAULTS
    variants = VARIANTS
    digits = DIGITS

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        switch = argparse.BooleanOptionalAction
        add = parser.add_argument_group("DeiT").add_argument
        add("--ThreeAugment", action=switch, default=False, help="greyscale, solarize or blur, with --color-jitter")
        add("--src", action=switch, default=False, help="simple random crop: resize, pad by 4 pixels, crop")
        add("--unscale-lr", action=switch, default=False, help="use --lr as it is; else it is for 512 images a step")
        add("--train-mode", action=switch, default=True, help="train with drops and in training mode")
        add("--attn-only", action=switch, default=False, help="train attention, position embedding and head only")
        add("--cosub", action=switch, default=False, help="train two sub-models with each other, at twice the cost")
        for name in ("teacher-model", "teacher-path", "distillation-type", "distillation-alpha", "distillation-tau"):
            parser.add_argument(
                f"--{name}", action=RefuseDistillation, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )

    def fill_args(self, args: DeiTArgs) -> None:
        if args.ThreeAugment:
            args.aa = "3a"
        if args.bce_loss and args.bce_target_thresh is None:
            args.bce_target_thresh = 0.0  # mixed labels become 1 wherever they are above 0

    def check_args(self, args: DeiTArgs) -> None:
        super().check_args(args)
        if args.augsub != "none" and not args.train_mode:
            raise ValueError(f"--augsub {args.augsub}: needs --train-mode, since drops act in training mode only")
        if not args.cosub:
            return
        if args.augsub != "none":
            raise ValueError("--cosub: trains sub-models of its own; leave --augsub out")
        if not args.drop_path or not args.train_mode:
            flag = "--drop-path above 0" if args.train_mode else "--train-mode"
            raise ValueError(f"--cosub: its sub-models differ by their stochastic depth alone; pass {flag}")

    def create_model(self, args: DeiTArgs, classes: int) -> nn.Module:
        from deit.models import train_attention_only

        model = super().create_model(args, classes)
        if args.attn_only:
            train_attention_only(model)
        return model

    def create_augsub(self, model: nn.Module, args: DeiTArgs) -> AugSub | CoSub:
        from common.cosub import CoSub

        return CoSub(model) if args.cosub else super().create_augsub(model, args)

    def loss(self, args: DeiTArgs, mixed: bool) -> Callable[[Tensor, Tensor], Tensor]:
        if args.cosub and not args.bce_loss:  # binary cross-entropy all the same, of labels as they are
            args = args.replace(bce_loss=True, bce_target_thresh=None)
        return super().loss(args, mixed)

    def hub_architecture(self, args: DeiTArgs) -> tuple[str, dict[str, Any]] | None:
        from deit.models import hub_architecture

        return hub_architecture(args.model, args.input_size)

    def adapt_weights(self, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        from deit.models import adapt_weights

        return adapt_weights(state, model)

    def initial_weights_limit(self, args: DeiTArgs) -> float:
        published = args.variant is not None and args.variant.endswith("_finetune")
        return 0.136 if published else super().initial_weights_limit(args)  # 0.99996 ** (20 epochs of 2,502 updates)

    def scale_lr(self, args: DeiTArgs, global_batch: int) -> DeiTArgs:
        return args if args.unscale_lr else super().scale_lr(args, global_batch)

    def schedule(self, optimizer: torch.optim.Optimizer, args: DeiTArgs, updates_per_epoch: float) -> SetLR:
        from common.optim import epoch_schedule

        # upstream steps its schedule after an epoch, with that epoch's number: epochs 0 and 1 have the same rate
        return epoch_schedule(optimizer, args, updates_per_epoch, lag=1)


RECIPE = DeiT()
