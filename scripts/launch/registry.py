"""The four recipes and their entry points; no other module names them all."""

from __future__ import annotations

from pathlib import Path

import deit.recipe
import mae.recipe
import resnet_rsb.recipe
import swin.recipe
from common.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]  # of the repository, to which entry points are relative
ENTRY_POINTS = {
    "deit": "deit/main.py",
    "mae": "mae/main_finetune.py",
    "swin": "swin/main.py",
    "resnet_rsb": "resnet_rsb/train.py",
}
RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (deit.recipe, mae.recipe, swin.recipe, resnet_rsb.recipe)
}


def recipe_of(entry_point: str) -> Recipe:
    """The recipe of an entry point, such as "deit/main.py"."""
    return RECIPES[Path(entry_point).parent.name]
