"""Models by timm's names, and what the recipes' own names for them have in common."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.layers import resample_abs_pos_embed
from timm.models import register_model
from torch import Tensor, nn

HUB = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register(module: str, name: str, build: Callable[..., nn.Module], **shape: Any) -> None:
    """Makes `timm.create_model(name)` call `build(**shape)`, once `module` is imported.

    Args:
        module: `__name__` of the module that holds the model.
        name: the model's name.
        build: makes the model from timm's keyword arguments.
        shape: arguments that the name stands for; the caller of `create_model` may override them.
    """

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} comes without weights: --finetune loads them from a file")
        return build(**shape | {key: value for key, value in kwargs.items() if key not in HUB})

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    setattr(sys.modules[module], name, register_model(entry))


def create_timm_model(args: argparse.Namespace, classes: int, **kwargs: Any) -> nn.Module:
    """The timm model `args.model`. A model that is built for one image size gets `input_size`, and its `drop` in the
    projections and MLPs of its blocks; any other has it before the classifier. Rates of 0 are left to timm, since not
    every model has a place for each. `kwargs` are timm's.

    Raises:
        ValueError: timm knows no such model. TypeError: it has no place for one of the rates.
    """
    if not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        near = f": did you mean {' or '.join(close)}?" if close else ": timm.list_models() lists them"
        raise ValueError(f"unknown model {args.model!r}{near}")
    cfg = timm.get_pretrained_cfg(args.model)
    fixed = cfg is None or cfg.fixed_input_size  # ours come without a cfg
    rates = {"proj_drop_rate" if fixed else "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    own = {name: rate for name, rate in rates.items() if rate} | ({"img_size": args.input_size} if fixed else {})
    return timm.create_model(args.model, num_classes=classes, **own | kwargs)


def resample_positions(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The state dict with position embeddings of another image size interpolated, bicubic without antialiasing."""
    weight, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if weight is None or own is None or weight.shape == own.shape or not hasattr(model, "no_embed_class"):
        return state
    if weight.shape[::2] == own.shape[::2]:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        if math.isqrt(weight.shape[1] - prefix) ** 2 != weight.shape[1] - prefix:
            return state  # no square grid, so of a model with other prefix tokens
        weight = resample_abs_pos_embed(
            weight, model.patch_embed.grid_size, num_prefix_tokens=prefix, antialias=False, align_corners=False
        )
        return state | {"pos_embed": weight}
    return state
