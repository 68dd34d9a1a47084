"""The command line of all recipes: shared flags by group, and which source of a setting overrides which."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from common.flag_types import (
    DATA_SETS,
    DIGITS,
    EMBEDDED,
    MODEL_SOURCES,
    above_zero_to_one,
    augmentation_policy,
    below_one,
    data_set_name,
    device_name,
    file_path,
    finite_float,
    non_negative_float,
    non_negative_int,
    optimizer_name,
    positive_float,
    positive_int,
    probability,
    schedule_name,
    seed,
    weights_source,
)
from common.parser import Parser
from common.recipe import Args, Recipe
from common.train_args import TrainArgs

KINDS, BLOCK = ("none", "masking", "dropout", "droppath"), 32  # as in common.augsub and common.masking, without PyTorch
STREAMS = ("hfids/", "tfds/")  # of timm's data sets, those that can only be read from front to back
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "wsd", "rsqrt", "plateau", "none")
INTERPOLATIONS = ("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")

# settings that say how images are prepared for the model; the numbers are timm's, of ImageNet
PREPROCESSING: tuple[str, ...] = ("input_size", "mean", "std", "interpolation", "eval_crop_ratio", "crop_mode")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}

# settings of a run from before they were saved
SETTINGS_OF_OLD_RUNS = IMAGENET | {"class_order": "string", "model_ema_warmup": False, "cosub": False}
SETTINGS_OF_OLD_RUNS |= dict.fromkeys(("input_key", "target_key"))

# settings that all code reads, for recipes without a flag for them
DEFAULTS_OF_MISSING_FLAGS = {
    "src": False,
    "train_mode": True,
    "aug_repeats": 0,
    "zip": False,
    "sync_bn": False,
    "dist_bn": "reduce",
    "auto_resume": True,
    "checkpoint_hist": 0,
    "log_dir": None,
    "class_order": "string",  # of folders: 1, 10, 2; "natural": 1, 2, 10
}

# settings that may differ from a checkpoint's while the run still counts as the same
RESUME_MAY_CHANGE = set(
    "output_dir resume eval device num_workers pin_mem log_interval data_path data_dir dist_eval start_epoch compile "
    "channels_last variant save_freq throughput cfg opts checkpoint_hist save_every keep_last data_timeout".split()
)

SWITCH = argparse.BooleanOptionalAction


def parse(recipe: Recipe[Args], argv: Sequence[str] | None = None) -> Args:
    """Read the settings of a run. Each source overrides those before it: common defaults, the recipe's, a variant's,
    configuration files, the command line.

    Without `--data-path` and `--data-set` the data set is the embedded digits. On those and on MNIST5K, without a
    variant, the recipe's settings for the digits take the variant's place, and the output folder is named after the
    settings.

    Exits with status 2 and one sentence on bad input.
    """
    parser = create_parser(recipe)
    parser.set_defaults(**recipe.defaults)
    try:
        given, _ = parser.parse_known_args(argv, recipe.args_class())  # for the variant, the files and the data
        variant = recipe.variants[given.variant] if given.variant is not None else {}
        config = recipe.read_config(given)
        data = choose_data(given, config)
        model = choose_model(parser, recipe, argv, given, config)
        if data["data_set"] in EMBEDDED:
            digits = {name: value for name, value in recipe.digits.items() if not model or name not in PREPROCESSING}
            variant = {**(digits if given.variant is None else variant), "output_dir": None}
        # a row of the tables has the recipe's size and crop
        from_model = PREPROCESSING if given.variant is None else tuple(IMAGENET)
        fallback = {name: parser.get_default(name) for name in from_model} | IMAGENET
        for settings in (dict.fromkeys(from_model), variant, config, data, model):
            parser.set_defaults(**settings)
        args: Args = parser.parse_args(argv, recipe.args_class())
        left_to_model = [name for name in from_model if getattr(args, name) is None]
        for name in left_to_model:
            parser.set_defaults(**{name: fallback[name]})
            setattr(args, name, fallback[name])
        args.recipe = recipe.name
        if args.output_dir is None:
            args.output_dir = name_digits_folder(parser, args)
        args.left_to_model = left_to_model
        parser.check_values(args)
        recipe.finalize_args(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def choose_data(args: TrainArgs, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data_set` and `data_path`; without a path the data set is the digits, with one it is ImageNet.

    Args:
        config: the recipe's, which may hold a `data_path`.

    Raises:
        ValueError: the path is empty, or a variant needs one.
    """
    paths = (args.data_path, config.get("data_path"))
    if "" in paths:
        raise ValueError("--data-path is empty (unset variable in a script?)")
    data_path = paths[0] or paths[1]
    if args.data_set is not None:
        return {"data_set": args.data_set, "data_path": data_path}
    if args.variant is not None and data_path is None:
        raise ValueError(f"--variant {args.variant}: trains on ImageNet; pass its folder as --data-path")
    return {"data_set": DIGITS if data_path is None else "IMNET", "data_path": data_path}


def choose_model(
    parser: Parser, recipe: Recipe, argv: Sequence[str] | None, given: TrainArgs, config: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return what leaves the model to the config.json of `--finetune` or `--resume`, where neither a flag nor a variant
    nor a configuration file, whose settings are in `config`, names one."""
    weights = given.finetune or config.get("finetune") or given.resume or config.get("resume") or ""
    named, _ = parser.parse_known_args(argv, recipe.args_class(model=None))
    named_elsewhere = named.model is not None or given.variant is not None
    named_elsewhere |= not config.keys().isdisjoint({"model", *recipe.model_settings})
    if weights.startswith(MODEL_SOURCES) and not named_elsewhere:
        return {**recipe.settings_of_config, "model": weights}
    return {}


def name_digits_folder(parser: argparse.ArgumentParser, args: TrainArgs) -> str:
    """Return the output folder of a run on an embedded data set: output/, named by recipe, data, drop and settings that
    differ from the defaults."""
    parts = [f"{args.recipe}_{args.data_set.lower()}_{args.augsub}"]
    for name, value in vars(args).items():
        default = parser.get_default(name)
        if name not in RESUME_MAY_CHANGE | {"augsub", "recipe"} and value != default and default != []:
            parts.append(f"{name}-{value}")
    name = "_".join(parts).replace("/", "-").replace(" ", "")
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:180]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return os.path.join("output", name)


def create_parser(recipe: Recipe) -> Parser:
    """Return the parser with the flags of all recipes, then the recipe's."""
    parser = Parser(description=recipe.about)
    add_run_flags(parser, recipe.variants)
    add_augsub_flags(parser)
    add_model_flags(parser)
    add_optimizer_flags(parser)
    add_schedule_flags(parser)
    add_loss_flags(parser)
    add_augmentation_flags(parser)
    add_data_flags(parser)
    parser.set_defaults(**DEFAULTS_OF_MISSING_FLAGS)
    recipe.add_flags(parser)
    return parser


def add_run_flags(parser: argparse.ArgumentParser, variants: Mapping[str, Any]) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--variant", choices=variants, help="row of the paper's tables; other flags override its settings")
    add("--batch-size", type=positive_int, default=64, help="images per process and micro-batch")
    add("--epochs", type=positive_int, default=300)
    add("--accum-iter", "--accumulation-steps", type=positive_int, default=1, help="micro-batches per optimizer step")
    add(
        "--output-dir",
        "--output",
        type=file_path,
        default="",
        help="folder for checkpoints and logs; empty saves nothing; by default a run on the digits has one in output/",
    )
    add(
        "--resume",
        type=weights_source,
        default="",
        help="checkpoint to resume from, also hf-hub:… or local-dir:…; by default the one in the output folder",
    )
    add("--start-epoch", type=non_negative_int, default=0, help="first epoch, if the checkpoint does not hold it")
    add("--eval", action="store_true", help="evaluate and exit")
    add("--throughput", action="store_true", help="measure images/s of the model in evaluation and exit")
    add("--save-freq", type=positive_int, default=1, help="epochs between checkpoints; last and best are always kept")
    add("--dist-eval", action=SWITCH, default=False, help="no effect: evaluation is always divided over the processes")
    add(
        "--save-every",
        type=non_negative_int,
        default=0,
        help="optimizer steps between checkpoints within an epoch; 0 saves at its end only",
    )
    add(
        "--keep-last", type=positive_int, default=2, help="last checkpoints to keep, in case that the newest is damaged"
    )
    add("--seed", type=seed, default=0)
    add("--deterministic", action=SWITCH, default=False, help="use deterministic kernels only, also on a GPU")
    add("--device", type=device_name, default=None, help="cuda or cpu; by default the GPU if there is one")
    add("--amp", choices=("bf16", "fp16", "off"), default=None, help="autocast; by default bf16 if the hardware has it")
    add("--compile", action=SWITCH, default=False, help="torch.compile the model")
    add("--channels-last", action=SWITCH, default=False, help="memory format of images and convolutions")
    add("--log-interval", type=positive_int, default=50, help="optimizer steps between log lines")


def add_augsub_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("AugSub").add_argument
    add("--augsub", choices=KINDS, default="none", help="drop technique of the sub-model; none is the plain recipe")
    add("--augsub-ratio", type=below_one, default=0.5, help="drop probability of the sub-model, in [0, 1)")
    add(
        "--augsub-block",
        type=positive_int,
        default=BLOCK,
        help="side of a masked block in pixels, for models that cannot drop tokens",
    )
    add(
        "--augsub-bn",
        choices=("shared", "main"),
        default="shared",
        help="passes that update batch norm's running statistics: both, as upstream, or the main model's only",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default="",
        help="a timm model name; by default of the config.json where --finetune is hf-hub:… or local-dir:…",
    )
    add("--input-size", "--img-size", type=positive_int, default=224, help="side of the images, in pixels")
    add("--drop", type=below_one, default=0.0, help="dropout rate")
    add("--drop-path", type=below_one, default=0.1, help="stochastic depth rate")
    add(
        "--finetune",
        "--pretrained",
        type=weights_source,
        default="",
        help="initial weights: a file, https://…, hf-hub:…, local-dir:…, or timm for those of the tag in --model",
    )
    add("--model-ema", action=SWITCH, default=False, help="keep an average of the weights and evaluate it too")
    add("--model-ema-decay", type=below_one, default=0.99996)
    add(
        "--model-ema-warmup",
        action=SWITCH,
        default=False,
        help="let the decay rise from 0, so that the average does not begin with the initial weights",
    )
    add("--model-ema-force-cpu", action=SWITCH, default=False, help="keep the average in host memory, unevaluated")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add(
        "--opt",
        type=optimizer_name,
        default="adamw",
        help="timm's name; fusedlamb is apex's if installed, else timm's LAMB",
    )
    add("--opt-eps", type=positive_float, default=1e-8)
    add("--opt-betas", type=below_one, nargs="+", default=None)
    add("--momentum", type=below_one, default=0.9)
    add("--weight-decay", type=non_negative_float, default=0.05)
    add("--clip-grad", type=non_negative_float, default=None, help="maximum norm of all gradients; 0 does not clip")


def add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("schedule").add_argument
    add("--lr", type=non_negative_float, default=5e-4, help="learning rate")
    add("--sched", type=schedule_name, choices=SCHEDULES, default="cosine", help="a timm schedule")
    add("--warmup-lr", type=non_negative_float, default=1e-6)
    add("--min-lr", type=non_negative_float, default=1e-5)
    add("--warmup-epochs", type=non_negative_int, default=5)
    add("--cooldown-epochs", type=non_negative_int, default=0)
    add("--decay-epochs", type=positive_float, default=30)
    add("--decay-rate", type=finite_float, default=0.1)
    add("--patience-epochs", type=non_negative_int, default=10)
    add("--lr-noise", type=finite_float, nargs="+", default=None, help="share of the epochs before noise: start [end]")
    add("--lr-noise-pct", type=finite_float, default=0.67)
    add("--lr-noise-std", type=finite_float, default=1.0)


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss").add_argument
    add("--smoothing", type=probability, default=0.1, help="label smoothing")
    add("--bce-loss", action=SWITCH, default=False, help="binary cross-entropy, mean over classes")
    add(
        "--bce-target-thresh", type=non_negative_float, default=None, help="targets above it become 1, in the main loss"
    )


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--scale", type=above_zero_to_one, nargs=2, default=(0.08, 1.0), help="area of the random crop: min max")
    add(
        "--ratio", type=positive_float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of the random crop: min max"
    )
    add("--hflip", type=probability, default=0.5, help="probability of a horizontal flip")
    add("--vflip", type=probability, default=0.0, help="probability of a vertical flip")
    add("--color-jitter", type=finite_float, default=None)
    add("--aa", type=augmentation_policy, default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy, or none")
    add("--train-interpolation", choices=INTERPOLATIONS, default="bicubic")
    add("--repeated-aug", action=SWITCH, default=False, help="each image three times an epoch, a third of them")
    add("--reprob", type=probability, default=0.25, help="probability of random erasing")
    add(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="random erasing fills with 0, one random colour, or a random colour for each pixel",
    )
    add("--recount", type=positive_int, default=1, help="random erasing: maximum regions per image")
    add("--resplit", action=SWITCH, default=False, help="no effect: upstream's, for augmentation splits")
    add("--mixup", type=non_negative_float, default=0.0, help="mixup alpha")
    add("--cutmix", type=non_negative_float, default=0.0, help="CutMix alpha")
    add("--cutmix-minmax", type=probability, nargs=2, default=None, help="side of CutMix's box, in images: min max")
    add("--mixup-prob", type=probability, default=1.0, help="share of batches that are mixed")
    add("--mixup-switch-prob", type=probability, default=0.5, help="share of CutMix among them, if both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-path",
        "--data-dir",
        type=file_path,
        default=None,
        help="folder with train/ and val/, or the data set's own layout",
    )
    add(
        "--data-set",
        type=data_set_name,
        default=None,
        help=f"{', '.join(DATA_SETS)}, or a timm name: wds/…, hfds/…, tfds/…",
    )
    add("--nb-classes", "--num-classes", type=int, default=None, help="number of classes, if the data does not hold it")
    add("--train-split", default="train", help="split of a timm data set to train on")
    add("--val-split", default="validation", help="split of a timm data set to evaluate on")
    add("--input-key", default=None, help="hfds/, hfids/, tfds/: column of the image; wds/: suffixes of its file, a;b")
    add("--target-key", default=None, help="hfds/, hfids/, tfds/: column of the label; wds/: field of a .json file")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="level of iNaturalist's taxonomy")
    add("--mean", type=probability, nargs=3, default=None, help="of the channels, in [0, 1]; by default the model's")
    add("--std", type=positive_float, nargs=3, default=None, help="of the channels; by default the model's")
    add(
        "--interpolation",
        choices=INTERPOLATIONS[1:],
        help="of evaluation's resize; by default the model's",
    )
    add(
        "--crop-mode",
        choices=CROP_MODES,
        default="center",
        help="evaluation: crop the centre, squash to a square, or pad",
    )
    add(
        "--eval-crop-ratio",
        "--crop-pct",
        type=above_zero_to_one,
        default=0.875,
        help="share of the resized image's side that evaluation crops",
    )
    add(
        "--input",
        choices=("pil", "fast"),
        default="pil",
        help="pil augments each training image on the host; fast decodes and crops there with SIMD, and augments "
        "batches on the device",
    )
    add(
        "--num-workers",
        "--workers",
        type=non_negative_int,
        default=min(10, os.cpu_count() or 1),
        help="DataLoader workers per process; 10, or the number of cores if lower",
    )
    add(
        "--data-timeout",
        type=non_negative_int,
        default=600,
        help="seconds to wait for a batch before the workers count as hung; 0 waits without a limit",
    )
    add("--pin-mem", action=SWITCH, default=True, help="page-locked host memory for transfers to the GPU")
