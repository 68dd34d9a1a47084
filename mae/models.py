"""MAE's vision transformers under upstream's names, registered with timm.

They are timm's `vit_*` in shape, pooled globally or, with `global_pool="token"`, by the class token (arXiv 2111.06377).
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.models import register, resample_positions

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
