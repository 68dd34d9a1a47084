"""The settings of a run → the values that `common.data` takes, which knows nothing of flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.data import Mixup, resolve_data_config

from common.args import CROP_MODES, INTERPOLATIONS, PREPROCESSING
from common.data.datasets import DatasetConfig
from common.data.loader import LoaderConfig
from common.data.transforms import AugmentConfig, Preprocessing
from common.flag_types import MODEL_SOURCES
from common.parser import format_flag
from common.recipe import Args, Recipe
from common.train_args import TrainArgs

NORMALIZATION: tuple[str, ...] = ("mean", "std")  # what weights know of their images, whatever the size
DEFAULT_REPEATS = 3  # of an image in an epoch of repeated augmentation, as published


def resolve_preprocessing(
    recipe: Recipe[Args],
    args: Args,
    saved: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    finetunes: bool = False,
) -> Args:
    """Fill in how images are prepared, where no flag, file or variant says.

    The first of these that there is decides: the run whose checkpoint is loaded; `pretrained_cfg`; timm's own for
    `args.model`, of which a recipe takes what its published trainer takes. Else the recipe's default stands. Weights
    that start a training of another `--model` bring mean and std alone, as size and crop are the new run's.

    Args:
        saved: settings of the run whose checkpoint is loaded; also its order of class folders is kept.
        pretrained_cfg: timm's, of a folder's or hub's config.json.
        finetunes: the weights start a training.

    Raises:
        ValueError: images cannot be prepared in this way; names the flag.
    """
    changes: dict[str, Any] = {}
    sources: list[tuple[str, tuple[str, ...], Mapping[str, Any]]] = []  # a later one overrides
    if saved is None or finetunes:
        named = args.model.startswith(MODEL_SOURCES)
        if not named:
            of_model = read_pretrained_cfg(recipe.pretrained_cfg(args))
            sources.append((f"--model {args.model}", tuple(recipe.from_pretrained_cfg), of_model))
        if pretrained_cfg is not None:
            of_file = read_pretrained_cfg(pretrained_cfg)
            sources.append(("config.json", NORMALIZATION if finetunes and not named else PREPROCESSING, of_file))
    if saved is not None:
        sources.append(("the checkpoint", NORMALIZATION if finetunes else PREPROCESSING, saved))
        if "class_order" in saved:
            changes["class_order"] = saved["class_order"]
    for origin, names, source in sources:
        for name in names:
            if name in args.left_to_model and name in source:
                value = source[name]
                if not IS_VALID[name](value):
                    raise ValueError(f"{origin}: {name} {value!r:.60} is not supported; pass {format_flag(name)}")
                changes[name] = list(value) if name in ("mean", "std") else value
    settings = {name: value for name, value in vars(args).items() if name != "left_to_model"}
    resolved = type(args)(**settings | changes)
    recipe.check_args(resolved)
    return resolved


def read_pretrained_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg as settings; the sizes of training, not those of timm's tests, as published."""
    if not cfg:
        return {}
    config = resolve_data_config(pretrained_cfg=dict(cfg))
    size = config["input_size"]
    square = isinstance(size, tuple | list) and len(size) == 3 and size[1] == size[2]
    return {
        "input_size": size[1] if square else size,
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "eval_crop_ratio": config["crop_pct"],
        "crop_mode": config["crop_mode"],
    }


def are_three(values: Any, least: float, most: float) -> bool:
    """Whether a value is three numbers in [least, most]."""
    return (
        isinstance(values, tuple | list)
        and len(values) == 3
        and all(type(value) in (int, float) and least <= value <= most for value in values)
    )


IS_VALID: dict[str, Callable[[Any], bool]] = {
    "input_size": lambda value: type(value) is int and value > 0,
    "mean": lambda values: are_three(values, 0, 1),
    "std": lambda values: are_three(values, 1e-6, 1e6),
    "interpolation": lambda value: value in INTERPOLATIONS[1:],
    "eval_crop_ratio": lambda value: type(value) in (int, float) and 0 < value < 10,  # of some models above 1
    "crop_mode": lambda value: value in CROP_MODES,
}


def dataset_config(args: TrainArgs) -> DatasetConfig:
    return DatasetConfig(
        name=args.data_set,
        root=args.data_path,
        zipped=args.zip,
        train_split=args.train_split,
        val_split=args.val_split,
        input_key=args.input_key,
        target_key=args.target_key,
        classes=args.nb_classes,
        inat_category=args.inat_category,
        batch_size=args.batch_size,
        seed=args.seed,
        index_folder=Path(args.output_dir) if args.output_dir else None,
        natural_order=args.class_order == "natural",
    )


def loader_config(args: TrainArgs) -> LoaderConfig:
    return LoaderConfig(
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        timeout_s=args.data_timeout,
        pin_memory=args.pin_mem,
        seed=args.seed,
        repeats=(args.aug_repeats or DEFAULT_REPEATS) if args.repeated_aug else 0,
    )


def preprocessing_config(args: TrainArgs) -> Preprocessing:
    return Preprocessing(
        input_size=args.input_size,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
        crop_ratio=args.eval_crop_ratio,
        crop_mode=args.crop_mode,
    )


def augment_config(args: TrainArgs) -> AugmentConfig:
    return AugmentConfig(
        input_size=args.input_size,
        mean=args.mean,
        std=args.std,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        simple_crop=args.src,
        erase_prob=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        fast=args.input == "fast",
    )


def create_mixup(args: TrainArgs, classes: int) -> Mixup | None:
    """timm's mixup and CutMix, or None where both are off."""
    if not args.mixup_active:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )
