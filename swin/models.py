"""Swin transformers (arXiv 2103.14030): timm's, with the shape that a configuration file gives."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import nn

from common.flag_types import MODEL_SOURCES
from common.models import create_timm_model
from swin.config import SwinArgs

TIMM_NAMES = ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224")


def shape(args: SwinArgs) -> dict[str, Any]:
    """timm's arguments that give a Swin transformer its shape."""
    return {
        "img_size": args.input_size,
        "patch_size": args.patch_size,
        "in_chans": args.in_chans,
        "embed_dim": args.embed_dim,
        "depths": tuple(args.depths),
        "num_heads": tuple(args.num_heads),
        "window_size": args.window_size,
        "mlp_ratio": args.mlp_ratio,
        "qkv_bias": args.qkv_bias,
    }


def create_model(args: SwinArgs, classes: int) -> nn.Module:
    """Create a Swin transformer with the shape in the arguments, or the one that a config.json describes.

    Raises:
        ValueError: the config.json is of another architecture.
    """
    model: Any
    if args.model.startswith(MODEL_SOURCES):
        model = create_timm_model(args, classes)
        if not isinstance(model, SwinTransformer):
            raise ValueError(
                f"{args.model}: its model is a {type(model).__name__}; this recipe trains a SwinTransformer"
            )
    else:
        model = create_swin(args, classes)
    model.set_grad_checkpointing(args.use_checkpoint)
    return model


def create_swin(args: SwinArgs, classes: int) -> SwinTransformer:
    """Create a Swin transformer with the shape in the arguments."""
    rates = {"proj_drop_rate": args.drop, "drop_path_rate": args.drop_path}
    return SwinTransformer(num_classes=classes, **shape(args), **rates)


def hub_architecture(args: SwinArgs) -> tuple[str, dict[str, Any]] | None:
    """The name of a Swin transformer in timm, and the arguments that give its shape; None for one of a config.json."""
    if args.model.startswith(MODEL_SOURCES):
        return None
    return args.model if args.model in TIMM_NAMES else TIMM_NAMES[0], shape(args)
