"""MAE's vision transformers under upstream's names, registered with timm.

Their shapes are those of timm's `vit_*`; they classify the mean of the patch tokens, or with `global_pool="token"` the
class token (arXiv 2111.06377).
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from common.models import create_timm_model, register, resample_positions
from common.optim import no_weight_decay_names
from common.train_args import TrainArgs

HUGE = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "vit_pico_patch8": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},  # for the digits at 32 pixels
    "vit_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge_patch14": HUGE,
    "vit_huge_patch16": HUGE,  # what upstream's page calls it
}
# timm's models of the same shape; vit_pico_patch8 is the first with the arguments in SHAPES
TIMM_NAMES = {
    "vit_base_patch16": "vit_base_patch16_224",
    "vit_large_patch16": "vit_large_patch16_224",
    "vit_huge_patch14": "vit_huge_patch14_224",
    "vit_huge_patch16": "vit_huge_patch14_224",
}
for _name, _shape in SHAPES.items():
    register(__name__, _name, VisionTransformer, **{"global_pool": "avg"} | _shape)


def pooling(global_pool: bool) -> str:
    """timm's name of what the classifier sees: the mean of the patch tokens, or the class token."""
    return "avg" if global_pool else "token"


def create_model(args: TrainArgs, classes: int, global_pool: bool | None) -> nn.Module:
    """Create the model `args.model`, one of the above or any of timm's that takes `global_pool`.

    Args:
        global_pool: classify the mean of the patch tokens, or the class token; None as the model's config.json has it.
    """
    pool = {} if global_pool is None else {"global_pool": pooling(global_pool)}
    return create_timm_model(args, classes, img_size=args.input_size, **pool)


def hub_architecture(name: str, image_size: int, global_pool: bool | None) -> tuple[str, dict[str, Any]] | None:
    """timm's name of a model that is registered here, and the arguments that give its shape; None for other models."""
    if name not in SHAPES:
        return None
    shape = {} if name in TIMM_NAMES else SHAPES[name]
    timm_name = TIMM_NAMES.get(name, "vit_base_patch16_224")
    return timm_name, {"img_size": image_size, "global_pool": pooling(global_pool is not False), **shape}


def adapt_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn a pretrained MAE's encoder, or a finetuned model, into the model's state dict.

    The decoder is dropped; with global pooling the encoder's last `norm` is too, and `fc_norm` keeps its initial values
    if the file has none. Position embeddings of another grid are interpolated.
    """
    initial = model.state_dict()
    unused = ("decoder", "mask_token") if "norm.weight" in initial else ("decoder", "mask_token", "norm.")
    encoder = {name: weight for name, weight in state.items() if not name.startswith(unused)}
    fc_norm = {name: weight for name, weight in initial.items() if name.startswith("fc_norm.")}
    return resample_positions(fc_norm | encoder, model)


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """timm's parameter groups: a block's learning rate is `layer_decay` times that of the block above."""
    return param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=no_weight_decay_names(model), layer_decay=layer_decay
    )
