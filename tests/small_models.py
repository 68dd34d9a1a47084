"""Runs an entry point that knows two more of timm's models, so small that a checkpoint has 200 kB.

python tests/small_models.py deit/main.py --model small_vit --input-size 32
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer


@register_model
def small_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A transformer of width 16, with LayerScale and a class token without position, as DeiT-III has them."""
    shape = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1, "no_embed_class": True}
    return VisionTransformer(**shape | without_cfg(kwargs))


@register_model
def small_resnet(pretrained: bool = False, img_size: int = 0, **kwargs: Any) -> ResNet:
    """A ResNet-10 of at most 16 channels; takes images of any size."""
    shape = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_type": "deep", "stem_width": 4}
    return ResNet(BasicBlock, **shape | without_cfg(kwargs))


def without_cfg(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that `timm.create_model` adds for pretrained weights."""
    added = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {name: value for name, value in kwargs.items() if name not in added}


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
