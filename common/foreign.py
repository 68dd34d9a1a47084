"""Where models of transformers and torchvision keep tokens, patches and drops: tables of class names, no imports.

A class is named by its top-level package and its own name, also where the model has a subclass of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class TokenPlace(NamedTuple):
    """Where a model's tokens are a sequence of which any part may be left out.

    Args:
        module: the name, in the module of the table, of the one that gives tokens (B, prefix + N, D); "" is itself.
        prefix: number of tokens that are no patches, from the module of the table.
    """

    module: str
    prefix: Callable[[Any], int]


def _one(_: Any) -> int:
    return 1


def _two(_: Any) -> int:
    return 2


def _none(_: Any) -> int:
    return 0


# the layers behind these take a sequence of any length, and their heads pool it or read its first token
TOKENS: dict[str, TokenPlace] = {
    "transformers.ViTEmbeddings": TokenPlace("", _one),
    "transformers.ViTMSNEmbeddings": TokenPlace("", _one),
    "transformers.IJepaEmbeddings": TokenPlace("", _none),
    "transformers.DeiTEmbeddings": TokenPlace("", _two),  # class and distillation token
    "transformers.Dinov2Embeddings": TokenPlace("", _one),
    "transformers.Dinov2WithRegistersEmbeddings": TokenPlace("", lambda m: 1 + m.config.num_register_tokens),
    "transformers.BeitEmbeddings": TokenPlace("", _one),
    "transformers.Data2VecVisionEmbeddings": TokenPlace("", _one),
    "transformers.CLIPVisionEmbeddings": TokenPlace("", _one),
    "transformers.SiglipVisionEmbeddings": TokenPlace("", _none),
    "transformers.ASTEmbeddings": TokenPlace("", _two),  # class and distillation token
    "transformers.VivitEmbeddings": TokenPlace("", _one),
    "transformers.VideoMAEEmbeddings": TokenPlace("", _none),
    "torchvision.VisionTransformer": TokenPlace("encoder.dropout", _one),  # it follows the position embedding
}

# the name of the module that turns images into a grid of patches (B, H, W, C)
PATCHES = {"torchvision.SwinTransformer": "features.0"}

# embeddings with an own `mask_token` (None unless asked for), which `bool_masked_pos` (B, N) puts in place of patches
MASKED_EMBEDDINGS = {"transformers.SwinEmbeddings": True, "transformers.Swinv2Embeddings": True}

# rates that a layer holds itself, in place of an nn.Dropout behind the attention's projection
DROPOUT_RATES = {"torchvision.ShiftedWindowAttention": "dropout", "torchvision.ShiftedWindowAttention3d": "dropout"}

# attentions that have an nn.Dropout behind their projection only where they were built with a rate
DROPOUT_IF_BUILT = {"torchvision.MultiscaleAttention": "project"}

# modules that make a map of the tokens, or add a bias for each pair of patches, so that none may be missing
NEEDS_EVERY_PATCH = re.compile(
    r"transformers\.\w*(Backbone|ForMaskedImageModeling|ForPreTraining|ForMaskedLM|Segmentation|DepthEstimation|"
    r"Detection|Matting|RelativePositionBias|MultiModalProjector)\w*|timm\.Feature(Getter|Hook|List|Dict)Net"
)

# modules that have stochastic depth's layer inside an MLP, as its dropout
DROPOUTS_BY_DROP_PATH = {"transformers.PoolFormerOutput": True}

DROP_PATH = re.compile(r"\w*(DropPath|StochasticDepth)\w*")  # names of classes
DROP_PATH_NAMES = re.compile(r"(\w+_)?drop_path\d*|stochastic_(depth|dropout)")  # of attributes
DROP_PATH_RATES = ("drop_prob", "p")


def class_names(module: nn.Module) -> list[str]:
    """Return the names of a module's classes, from its own to its bases, as "transformers.ViTEmbeddings"."""
    return [f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in type(module).__mro__]


def find_place(table: dict[str, Any], module: nn.Module) -> Any:
    """Return the row of a table for a module's class, or None."""
    return next((table[name] for name in class_names(module) if name in table), None)


def needs_every_patch(module: nn.Module) -> bool:
    """Return whether a module needs every patch; transformers builds some that have no bias."""
    if getattr(module, "has_relative_position_bias", None) is False:
        return False
    return any(NEEDS_EVERY_PATCH.fullmatch(name) for name in class_names(module))


def is_timm_model(module: nn.Module) -> bool:
    """Return whether a module is a model of timm, whole."""
    whole = hasattr(module, "forward_features") or hasattr(module, "feature_info")
    return whole and any(each.__module__.startswith("timm.models.") for each in type(module).__mro__)


def lacks_dropout(module: nn.Module) -> bool:
    """Return whether a module is an attention that was built without dropout behind its projection."""
    place = find_place(DROPOUT_IF_BUILT, module)
    return place is not None and not any(isinstance(m, nn.Dropout) for m in module.get_submodule(place).modules())


def drop_path_rate(layer: Any) -> str | None:
    """Return the attribute that holds a stochastic depth layer's rate; None for any other object."""
    if not isinstance(layer, nn.Module) or not any(DROP_PATH.fullmatch(each.__name__) for each in type(layer).__mro__):
        return None
    return next((name for name in DROP_PATH_RATES if hasattr(layer, name)), None)
