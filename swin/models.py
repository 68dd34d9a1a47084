"""Swin transformers (arXiv 2103.14030), timm's, in the shape that a configuration gives them."""

from __future__ import annotations

import argparse

from timm.models.swin_transformer import SwinTransformer
from torch import nn


def create_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """A Swin transformer; its shape stands in the arguments that a configuration sets."""
    model = SwinTransformer(
        img_size=args.input_size,
        patch_size=args.patch_size,
        in_chans=args.in_chans,
        num_classes=classes,
        embed_dim=args.embed_dim,
        depths=tuple(args.depths),
        num_heads=tuple(args.num_heads),
        window_size=args.window_size,
        mlp_ratio=args.mlp_ratio,
        qkv_bias=args.qkv_bias,
        proj_drop_rate=args.drop,
        drop_path_rate=args.drop_path,
    )
    model.set_grad_checkpointing(args.use_checkpoint)
    return model
