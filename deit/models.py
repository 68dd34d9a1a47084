"""DeiT-III's vision transformers under upstream's names, registered with timm.

`timm.create_model("deit_small_patch16_LS")` works once this module is imported. They are timm's `deit3_*` in shape,
with upstream's initialisation and a stochastic depth rate that is the same in every block (arXiv 2204.07118).
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def create(pretrained: bool = False, drop_path_rate: float = 0.0, **kwargs: Any) -> VisionTransformer:
    """A vision transformer with LayerScale and a class token without position, as DeiT-III trains it.

    Args:
        pretrained: must be False; weights come through `--finetune`.
        drop_path_rate: stochastic depth rate of every block.
        kwargs: timm's, such as img_size, patch_size, embed_dim, depth, num_heads, num_classes, proj_drop_rate.
    """
    if pretrained:
        raise ValueError("these models come without weights: --finetune loads them from a file")
    for hub in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(hub, None)
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


def _register(name: str, **shape: Any) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return create(pretrained, **shape | kwargs)

    entry.__name__ = entry.__qualname__ = name
    globals()[name] = register_model(entry)


# for the digits at 32 pixels; with four blocks LayerScale need not start near 0
_register("deit_pico_patch8_LS", patch_size=8, embed_dim=64, depth=4, num_heads=2, init_values=0.1)
_register("deit_tiny_patch16_LS", patch_size=16, embed_dim=192, depth=12, num_heads=3)
_register("deit_small_patch16_LS", patch_size=16, embed_dim=384, depth=12, num_heads=6)
_register("deit_medium_patch16_LS", patch_size=16, embed_dim=512, depth=12, num_heads=8)
_register("deit_base_patch16_LS", patch_size=16, embed_dim=768, depth=12, num_heads=12)
_register("deit_large_patch16_LS", patch_size=16, embed_dim=1024, depth=24, num_heads=16)
_register("deit_huge_patch14_LS", patch_size=14, embed_dim=1280, depth=32, num_heads=16)


def adapt_weights(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Upstream's names → timm's (`gamma_1` → `ls1.gamma`), and position embeddings of another image size
    interpolated, bicubic without antialiasing."""
    adapted = {}
    for name, weight in state.items():
        name = name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")
        if name == "pos_embed" and weight.shape[::2] == model.pos_embed.shape[::2]:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            weight = resample_abs_pos_embed(
                weight, model.patch_embed.grid_size, num_prefix_tokens=prefix, antialias=False, align_corners=False
            )
        adapted[name] = weight
    return adapted


def train_attention_only(model: nn.Module) -> None:
    """Freezes all but the attention blocks, the position embedding and the classifier (arXiv 2203.09795)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name or name.startswith(("head.", "pos_embed")))
