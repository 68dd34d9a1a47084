"""MAE's vision transformers under upstream's names, registered with timm.

They are timm's `vit_*` in shape, pooled globally or, with `global_pool="token"`, by the class token (arXiv 2111.06377).
"""

from __future__ import annotations

import argparse
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from common.models import create_timm_model, register, resample_positions
from common.optim import without_weight_decay

HUGE = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "vit_pico_patch8": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},  # for the digits at 32 pixels
    "vit_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge_patch14": HUGE,
    "vit_huge_patch16": HUGE,  # what upstream's page calls it
}
for _name, _shape in SHAPES.items():
    register(__name__, _name, VisionTransformer, **{"global_pool": "avg"} | _shape)


def create_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model `args.model`, one of the above or any of timm's that can be pooled."""
    pool = "avg" if args.global_pool else "token"
    return create_timm_model(args, classes, img_size=args.input_size, global_pool=pool)


def adapt_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A pretrained MAE's encoder, or a finetuned model, as the model's state dict.

    The decoder is left out. With global pooling the encoder's last `norm` is, too, and the pooling's own `fc_norm` is
    new where the file has none. Position embeddings of another grid are interpolated.
    """
    own = model.state_dict()
    unused = ("decoder", "mask_token") if "norm.weight" in own else ("decoder", "mask_token", "norm.")
    adapted = {name: weight for name, weight in state.items() if not name.startswith(unused)}
    fresh = {name: weight for name, weight in own.items() if name.startswith("fc_norm.")}
    return resample_positions(fresh | adapted, model)


def param_groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """timm's layer decay: each block learns slower than the one above it by `layer_decay`."""
    return param_groups_layer_decay(
        model, args.weight_decay, no_weight_decay_list=without_weight_decay(model), layer_decay=args.layer_decay
    )
