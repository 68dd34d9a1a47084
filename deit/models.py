"""DeiT-III's vision transformers under upstream's names, registered with timm.

`timm.create_model("deit_small_patch16_LS")` works once this module is imported. Their shapes are those
of timm's `deit3_*`, with upstream's initialisation and one stochastic depth rate for every block (arXiv 2204.07118).
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.models import register, resample_positions


def create(drop_path_rate: float = 0.0, **kwargs: Any) -> VisionTransformer:
    """Create a vision transformer with LayerScale and a class token without position, as DeiT-III trains it.

    Args:
        drop_path_rate: stochastic depth rate of every block.
        kwargs: timm's, such as img_size, patch_size, embed_dim, depth, num_heads, num_classes, proj_drop_rate.
    """
    model = VisionTransformer(**{"no_embed_class": True, "init_values": 1e-4} | kwargs)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedding in (model.pos_embed, model.cls_token):
        nn.init.trunc_normal_(embedding, std=0.02)
    if drop_path_rate:
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)
    return model


SHAPES: dict[str, dict[str, Any]] = {
    # for the digits at 32 pixels; with four blocks LayerScale need not start near 0
    "deit_pico_patch8_LS": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "init_values": 0.1},
    "deit_tiny_patch16_LS": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "deit_small_patch16_LS": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "deit_medium_patch16_LS": {"patch_size": 16, "embed_dim": 512, "depth": 12, "num_heads": 8},
    "deit_base_patch16_LS": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "deit_large_patch16_LS": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "deit_huge_patch14_LS": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
for _name, _shape in SHAPES.items():
    register(__name__, _name, create, **_shape)


# timm's models of the same shape; the others are DEIT3 with the arguments in SHAPES
DEIT3 = "deit3_small_patch16_224"
DEIT3_BY_NAME = {
    "deit_small_patch16_LS": DEIT3,
    "deit_medium_patch16_LS": "deit3_medium_patch16_224",
    "deit_base_patch16_LS": "deit3_base_patch16_224",
    "deit_large_patch16_LS": "deit3_large_patch16_224",
    "deit_huge_patch14_LS": "deit3_huge_patch14_224",
}


def hub_architecture(name: str, image_size: int) -> tuple[str, dict[str, Any]] | None:
    """timm's name of a model that is registered here, and the arguments that give its shape; None for other models."""
    if name not in SHAPES:
        return None
    shape = {} if name in DEIT3_BY_NAME else SHAPES[name]
    return DEIT3_BY_NAME.get(name, DEIT3), {"img_size": image_size, **shape}


def adapt_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename upstream's weights to timm's names (`gamma_1` → `ls1.gamma`); interpolate positions to the image size."""
    names = model.state_dict().keys()
    renamed = {
        name if name in names else name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): weight
        for name, weight in state.items()
    }
    return resample_positions(renamed, model)


def train_attention_only(model: nn.Module) -> None:
    """Freeze all but the attention layers, the position embedding and the classifier (arXiv 2203.09795)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name or name.startswith(("head.", "pos_embed")))
