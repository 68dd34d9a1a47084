"""The model in a checkpoint, with what is needed to use it: class names and preprocessing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from common.args import IMAGENET, create_parser
from common.checkpoint.class_names import saved_class_names
from common.checkpoint.io import load
from common.checkpoint.weights import find_state_dict, has_average, load_weights
from common.data.transforms import Preprocessing
from common.flag_types import MODEL_SOURCES
from common.model_card import AVERAGE, RAW, best_part, describe_run, model_card
from common.models import read_model_config
from common.recipe import Recipe
from common.run_dir import SETTINGS
from common.train_args import TrainArgs
from common.trainer import build_model
from scripts.launch.registry import RECIPES


@dataclass(frozen=True)
class Missing:
    """What a checkpoint cannot tell, or is to be told otherwise; None where it is as the checkpoint says."""

    recipe: str | None = None
    model: str | None = None
    part: str | None = None  # RAW or AVERAGE; None takes the more accurate one
    class_names: list[str] | None = None
    input_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_ratio: float | None = None
    crop_mode: str | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A model on the CPU, in evaluation mode.

    Args:
        architecture: as `Recipe.hub_architecture` returns it.
        class_names: in the order of the labels; None where nobody knows them.
        card: for timm's `generate_readme`.
    """

    model: nn.Module
    architecture: tuple[str, dict[str, Any]] | None
    class_names: list[str] | None
    classes: int
    preprocessing: Preprocessing
    card: dict[str, Any]


def read_trained_model(path: Path, missing: Missing) -> TrainedModel:
    """Build the model of a checkpoint of this trainer, of any version, or of upstream's.

    Raises:
        ValueError: the file cannot be read, or something is missing; names the flag.
    """
    content = load(path)
    recipe, args = read_settings(path, content, missing)
    log = content.get("log") or []
    entry = log[-1] if isinstance(log, list) and log and isinstance(log[-1], dict) else None
    part = missing.part or best_part(entry)
    if part == AVERAGE and not has_average(content):
        raise ValueError(f"{path}: has no average of the weights; use --weights {RAW}")
    classes = count_outputs(path, find_state_dict(content, part)[0], args.model)
    class_names = missing.class_names or saved_class_names(content, path)
    if missing.class_names is not None and len(missing.class_names) != classes:
        raise ValueError(f"--class-names: {len(missing.class_names)} names for a model of {classes} classes")
    model = build_model(recipe, args, classes)
    load_weights(model, path, recipe.adapt_weights, part=part, content=content)
    preprocessing = read_preprocessing(content, args, missing)
    run = describe_run(args, classes, asdict(preprocessing), read_metadata(path))
    card = model_card(run, part, entry, describe_position(content, args), args.model)
    return TrainedModel(model.eval(), recipe.hub_architecture(args), class_names, classes, preprocessing, card)


def read_settings(path: Path, content: dict[str, Any], missing: Missing) -> tuple[Recipe, TrainArgs]:
    """Return the recipe that trained a checkpoint, and its settings; those that an old version lacks have the recipe's
    default.

    Raises:
        ValueError: the checkpoint does not hold them; names the flag.
    """
    saved = content.get("args")
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved if isinstance(saved, dict) else {}
    name, model = missing.recipe or saved.get("recipe"), missing.model or saved.get("model")
    if name not in RECIPES:
        raise ValueError(f"{path}: does not say which recipe trained it; pass --recipe, one of {', '.join(RECIPES)}")
    if not isinstance(model, str) or not model:
        raise ValueError(f"{path}: does not say which model it is of; pass --model")
    recipe = RECIPES[name]
    parser = create_parser(recipe)
    parser.set_defaults(**recipe.defaults)
    defaults: TrainArgs = parser.parse_args([], recipe.args_class())
    known = {key: value for key, value in saved.items() if key in vars(defaults)}
    args = defaults.replace(**known | {"model": model, "recipe": name})
    if missing.input_size is not None:
        args.input_size = missing.input_size
    parser.check_values(args)
    recipe.fill_args(args)
    return recipe, args


def count_outputs(path: Path, state: Mapping[str, Tensor], model: str) -> int:
    """Return the number of classes of the classifier in a state dict.

    Raises:
        ValueError: it has none.
    """
    architecture = read_model_config(model).architecture if model.startswith(MODEL_SOURCES) else model
    cfg = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    names = (cfg.classifier if cfg is not None else None) or ("head.fc", "head")
    for name in [names] if isinstance(names, str) else names:
        if f"{name}.weight" in state:
            return len(state[f"{name}.weight"])
    raise ValueError(f"{path}: holds no classifier of {model}; only what was trained to classify can be used")


def read_preprocessing(content: dict[str, Any], args: TrainArgs, missing: Missing) -> Preprocessing:
    """Return what the model expects of its images; a version before it was saved had ImageNet's mean and std."""
    saved = content.get("preprocessing")
    values: dict[str, Any] = (
        saved
        if isinstance(saved, dict)
        else IMAGENET | {"crop_ratio": args.eval_crop_ratio, "crop_mode": args.crop_mode}
    )
    given = {name: value for name, value in asdict(missing).items() if value is not None}
    names = Preprocessing.__dataclass_fields__.keys()
    return Preprocessing(**{name: {**values, "input_size": args.input_size, **given}[name] for name in names})


def describe_position(content: dict[str, Any], args: TrainArgs) -> str:
    """Say how far training was."""
    epoch = content.get("epoch")
    if type(epoch) is not int:
        return "after an unknown number of epochs"
    position = content.get("position")
    if isinstance(position, dict):
        return f"after step {position.get('update')} in epoch {epoch + 2} of {args.epochs}"
    return f"after epoch {epoch + 1} of {args.epochs}"


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what the args.json beside a checkpoint holds, for which a copy elsewhere has nothing."""
    try:
        metadata = json.loads((path.parent / SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
