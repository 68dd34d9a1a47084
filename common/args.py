"""One parser for all recipes: the flags they share, upstream's spellings, and who overrides whom.

Common default < recipe < variant < what the recipe reads from files < command line. `-` and `_` are alike in flags,
and a flag nobody knows is an error. A flag's help states its unit; its default is shown for the recipe at hand.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from common.errors import Leaving, is_main_before_start
from common.recipe import Recipe

# as common.augsub and common.masking have them, which import PyTorch
KINDS, BLOCK = ("none", "masking", "dropout", "droppath"), 32
DIGITS = "DIGITS"
DATA_SETS = ("IMNET", "CIFAR10", "CIFAR", "INAT", "INAT19", DIGITS)
TIMM_READERS = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")
STREAMS = ("hfids/", "tfds/")  # of these, read only from front to back
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "wsd", "rsqrt", "plateau", "none")
POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m7-mstd0.5", "3a")  # of the recipes; timm is asked of any other
INTERPOLATIONS = ("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# settings that a recipe may offer as flags, at what they are for one that does not
UNOFFERED = {"src": False, "train_mode": True, "aug_repeats": 0, "zip": False, "sync_bn": False, "dist_bn": "reduce",
             "auto_resume": True, "checkpoint_hist": 0, "log_dir": None}  # fmt: skip

# what may differ between a run and its continuation without making another run of it
MAY_CHANGE = {"output_dir", "resume", "eval", "device", "num_workers", "pin_mem", "log_interval", "data_path",
              "data_dir", "dist_eval", "start_epoch", "compile", "channels_last", "variant", "save_freq",
              "throughput", "cfg", "opts", "checkpoint_hist", "augsub_joint", "save_every", "keep_last",
              "data_timeout"}  # fmt: skip


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one sentence, and takes `-` and `_` alike in flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if is_main_before_start():
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise Leaving(message if is_main_before_start() else "", 2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        for word in unknown:
            if not word.startswith("--"):
                continue
            flag = word.partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
            self.error(f"unknown flag {flag}" + (f": did you mean {close[0]}?" if close else "; --help lists them all"))
        if unknown:
            self.error(f"what is {unknown[0]!r}? Values follow a flag, as in --epochs 300; --help lists the flags")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)


def hyphenated(word: str) -> str:
    """`--output_dir=a_b` → `--output-dir=a_b`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def flag(name: str) -> str:
    """A setting's flag: `batch_size` → `--batch-size`."""
    return hyphenated(f"--{name}")


def parse(recipe: Recipe, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run: command line over variant over recipe over common defaults.

    Without `--data-path` and `--data-set` the data set is the embedded digits; on the digits and without a variant,
    the recipe's settings for them take the variant's place and they are kept in a folder of their own.

    Exits with status 2 and one sentence on bad input.
    """
    parser = create_parser(recipe)
    parser.set_defaults(**recipe.defaults)
    first, _ = parser.parse_known_args(argv)
    if first.variant is not None:
        parser.set_defaults(**recipe.variants[first.variant])
    try:
        from_files = recipe.from_files(first)
    except ValueError as error:
        parser.error(str(error))
    data_path = first.data_path or getattr(first, "data_dir", None) or from_files.get("data_path")
    data_set = first.data_set
    if "" in (first.data_path, getattr(first, "data_dir", None), from_files.get("data_path")):
        parser.error('the data path is "": a folder is missing, as where a script names one that is not set')
    if data_set is None:
        data_set = "IMNET" if data_path else DIGITS
    if data_set == DIGITS:
        named = f"--variant {first.variant}" if first.variant is not None else f"--cfg {getattr(first, 'cfg', None)}"
        if first.data_set is None and (first.variant is not None or getattr(first, "cfg", None)):
            parser.error(f"{named} trains on ImageNet: --data-path says where it is")
        if first.variant is None:
            parser.set_defaults(**recipe.digits)
        parser.set_defaults(output_dir=None)
    parser.set_defaults(**{**from_files, "data_set": data_set, "data_path": data_path})
    try:
        args = parser.parse_args(argv)
        args.recipe = recipe.name
        if args.output_dir is None:
            args.output_dir = digits_folder(parser, args)
        check_choices(parser, args)
        recipe.check(args)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_choices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Holds what a recipe's files set to the choices of the flags, which argparse does not do for defaults.

    Raises:
        ValueError: naming the flag, and what there is to choose from.
    """
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.choices is not None and value is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise ValueError(f"{action.option_strings[0]} {value!r}: choose one of {known}")


def digits_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Where a run on the digits goes that names no folder: output/, by recipe, drop, and what it sets differently."""
    parts = [f"{args.recipe}_digits_{args.augsub}"]
    for name, value in vars(args).items():
        default = parser.get_default(name)
        if name not in MAY_CHANGE | {"augsub", "recipe"} and value != default and default != []:
            parts.append(f"{name}-{value}")
    name = "_".join(parts).replace("/", "-").replace(" ", "")
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:180]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return os.path.join("output", name)


def check(args: argparse.Namespace) -> None:
    """Refuses values that no recipe can use, before anything is loaded.

    Raises:
        ValueError: saying which flag, why, and what would do.
    """
    if args.data_set not in DATA_SETS and not args.data_set.lower().startswith(TIMM_READERS):
        close = difflib.get_close_matches(args.data_set.upper(), DATA_SETS, n=1)
        raise ValueError(
            f"unknown data set {args.data_set!r}"
            + (f": did you mean {close[0]}?" if close else f": use {', '.join(DATA_SETS)} or a timm name such as wds/…")
        )
    if args.data_set != DIGITS and not args.data_path and not args.data_set.startswith("hf"):
        raise ValueError(f"--data-set {args.data_set} needs --data-path, the folder that holds it")
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: unknown, use cuda or cpu")
    at_least = {"seed": 0, "batch_size": 1, "epochs": 1, "accum_iter": 1, "log_interval": 1, "input_size": 1,
                "num_workers": 0, "augsub_block": 1, "save_freq": 1, "start_epoch": 0, "warmup_epochs": 0,
                "cooldown_epochs": 0, "recount": 1, "lr": 0, "min_lr": 0, "warmup_lr": 0, "weight_decay": 0,
                "mixup": 0, "cutmix": 0, "bce_target_thresh": 0, "clip_grad": 0,
                "checkpoint_hist": 0, "patience_epochs": 0, "save_every": 0, "keep_last": 1,
                "data_timeout": 0}  # fmt: skip
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"{flag(name)} {value}: at least {least} is needed")
    for name, value in vars(args).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in values):
            raise ValueError(f"{flag(name)} {value}: a finite number is needed")
    if args.opt_eps is not None and not args.opt_eps > 0:
        raise ValueError(f"--opt-eps {args.opt_eps}: more than 0 is needed")
    if args.seed >= 2**32:
        raise ValueError(f"--seed {args.seed}: less than 2**32 is needed")
    if "adahessian" in args.opt:
        raise ValueError(f"--opt {args.opt} needs second derivatives, which a step here does not keep")
    if args.scale[1] > 1:
        raise ValueError(f"--scale {args.scale[0]} {args.scale[1]}: at most the whole image, 1")
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        raise ValueError("--lr-noise: where it starts, and where it ends, are at most two numbers")
    if not args.decay_epochs > 0:
        raise ValueError(f"--decay-epochs {args.decay_epochs}: more than 0 is needed")
    for name in ("augsub_ratio", "drop", "drop_path", "momentum", "model_ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} {getattr(args, name)} is outside [0, 1)")
    for name in ("smoothing", "reprob", "mixup_prob", "mixup_switch_prob", "hflip", "vflip"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{flag(name)} {getattr(args, name)} is outside [0, 1]")
    betas = args.opt_betas or ()
    if betas and (len(betas) != (3 if "adan" in args.opt else 2) or not all(0 <= beta < 1 for beta in betas)):
        raise ValueError(
            f"--opt-betas {' '.join(map(str, betas))}: two numbers in [0, 1) are needed, such as 0.9 0.999"
        )
    for name in ("scale", "ratio"):
        least, most = getattr(args, name)
        if not 0 < least <= most:
            raise ValueError(f"{flag(name)} {least} {most}: the lesser of two positive numbers comes first")
    if args.cutmix_minmax is not None:
        least, most = args.cutmix_minmax
        if not (least >= 0 and most <= 1 and int(least * args.input_size) < int(most * args.input_size)):
            raise ValueError(f"--cutmix-minmax {least} {most}: sides of the least and the greatest box are needed, as "
                             "shares of the image and a pixel apart, such as 0.2 0.8")  # fmt: skip
    if mixup_active(args) and args.batch_size % 2:
        raise ValueError(f"--batch-size {args.batch_size}: mixup pairs images, so it must be even")
    if not 0 < args.eval_crop_ratio <= 1:
        raise ValueError(f"--eval-crop-ratio {args.eval_crop_ratio} is outside (0, 1]")
    if args.sched == "plateau":
        raise ValueError("--sched plateau depends on past results, not on the epoch alone: choose another schedule")


def mixup_active(args: argparse.Namespace) -> bool:
    """Whether images are mixed, by mixup or CutMix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_parser(recipe: Recipe) -> Parser:
    """The parser with the flags of all recipes, and the recipe's own."""
    parser = Parser(description=recipe.about)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--variant", choices=recipe.variants, help="a row of the paper's tables; other flags override its settings")
    add("--batch-size", type=int, default=64, help="images per process and micro-batch")
    add("--epochs", type=int, default=300)
    add("--accum-iter", "--accumulation-steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--output-dir", "--output", default="", help="folder for checkpoints and logs; empty saves nothing; not given, "
        "runs on the digits have one each in output/")  # fmt: skip
    add("--resume", default="", help="checkpoint to continue from; by default the one in the output folder")
    add("--start-epoch", type=int, default=0, help="epoch to start at, where --resume does not say")
    add("--eval", action="store_true", help="evaluate and leave")
    add("--throughput", action="store_true", help="measure images/s of the model in evaluation and leave")
    add("--save-freq", type=int, default=1, help="epochs between checkpoints; the last and the best are always kept")
    add("--dist-eval", action=switch, default=False, help="kept for upstream's sake: evaluation is always shared out "
        "over the processes, each image counted once")  # fmt: skip
    add("--save-every", type=int, default=0, help="optimizer steps between checkpoints in the middle of an epoch; "
        "0 for none")  # fmt: skip
    add("--keep-last", type=int, default=2, help="how many of the last checkpoints are kept, for where the newest is "
        "damaged")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--deterministic", action=switch, default=False, help="only kernels that give the same bits each time, also on "
        "a GPU")  # fmt: skip
    add("--device", default=None, help="cuda or cpu; the GPU where there is one")
    add("--amp", choices=("bf16", "fp16", "off"), default=None, help="autocast; bf16 where the hardware is fast in it")
    add("--compile", action=switch, default=False, help="torch.compile the model")
    add("--channels-last", action=switch, default=False, help="memory format of images and convolutions")
    add("--log-interval", type=int, default=50, help="optimizer steps between log lines")

    group = parser.add_argument_group("AugSub")
    add = group.add_argument
    add("--augsub", choices=KINDS, default="none", help="drop technique of the sub-model; none is the plain recipe")
    add("--augsub-ratio", type=float, default=0.5, help="drop probability of the sub-model, in [0, 1)")
    add("--augsub-block", type=int, default=BLOCK, help="side of a hidden block in pixels, for models that keep their "
        "grid")  # fmt: skip
    add("--augsub-bn", choices=("shared", "main"), default="shared", help="whether the sub-model's pass counts in the "
        "running batch statistics, as upstream's does, or the main model's alone")  # fmt: skip
    add("--augsub-joint", action=switch, default=False, help="both passes as one larger batch, or at least with one "
        "backward; holds the graphs of both, and pays where a pass alone is too small for the device")  # fmt: skip

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="", help="a timm model name")
    add("--input-size", "--img-size", type=int, default=224, help="side of the images, in pixels")
    add("--drop", type=float, default=0.0, help="dropout rate")
    add("--drop-path", type=float, default=0.1, help="stochastic depth rate")
    add("--finetune", "--pretrained", default="", help="checkpoint whose weights to start from")
    add("--model-ema", action=switch, default=False, help="keep an average of the weights and evaluate it too")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-force-cpu", action=switch, default=False, help="keep the average in host memory, unevaluated")

    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--opt", default="adamw", help="a timm optimizer; fusedlamb is apex's if installed, else timm's LAMB")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+", default=None)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, default=None, help="global gradient norm to clip at; 0 does not clip")

    group = parser.add_argument_group("schedule")
    add = group.add_argument
    add("--lr", type=float, default=5e-4, help="learning rate")
    add("--sched", choices=SCHEDULES, default="cosine", help="a timm schedule")
    add("--warmup-lr", type=float, default=1e-6)
    add("--min-lr", type=float, default=1e-5)
    add("--warmup-epochs", type=int, default=5)
    add("--cooldown-epochs", type=int, default=0)
    add("--decay-epochs", type=float, default=30)
    add("--decay-rate", type=float, default=0.1)
    add("--patience-epochs", type=int, default=10)
    add(
        "--lr-noise", type=float, nargs="+", default=None, help="share of the schedule at which noise starts (and ends)"
    )
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)

    group = parser.add_argument_group("loss")
    add = group.add_argument
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--bce-loss", action=switch, default=False, help="binary cross-entropy, mean over classes")
    add("--bce-target-thresh", type=float, default=None, help="targets above it become 1, in the main model's loss")

    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), help="area of the random crop, as shares of the image")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of the random crop")
    add("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    add("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    add("--color-jitter", type=float, default=None)
    add("--aa", type=augmentation_policy, default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy, or none")
    add("--train-interpolation", choices=INTERPOLATIONS, default="bicubic")
    add("--repeated-aug", action=switch, default=False, help="each image three times an epoch, a third of them")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="random erasing puts in 0, a random "
        "colour, or one for each pixel")  # fmt: skip
    add("--recount", type=int, default=1, help="random erasing: most regions an image")
    add("--resplit", action=switch, default=False, help="upstream's flag: no erasing in a first, clean split, of which "
        "there is none here")  # fmt: skip
    add("--mixup", type=float, default=0.0, help="mixup alpha")
    add("--cutmix", type=float, default=0.0, help="CutMix alpha")
    add("--cutmix-minmax", type=float, nargs=2, default=None, help="CutMix box side, least and most")
    add("--mixup-prob", type=float, default=1.0, help="share of batches that are mixed")
    add(
        "--mixup-switch-prob", type=float, default=0.5, help="share of mixed batches that get CutMix, where both are on"
    )
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-path", "--data-dir", default=None, help="folder with train/ and val/, or the data set's own layout")
    add("--data-set", default=None, help=f"{', '.join(DATA_SETS)}, or a timm name: wds/…, hfds/…, tfds/…")
    add("--nb-classes", "--num-classes", type=int, default=None, help="classes, where the data set does not say")
    add("--train-split", default="train", help="split of a timm data set to train on")
    add("--val-split", default="validation", help="split of a timm data set to evaluate on")
    add("--inat-category", default="name", help="level of iNaturalist's taxonomy",
        choices=("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"))  # fmt: skip
    add("--crop-mode", choices=("center", "squash", "border"), default="center", help="evaluation: crop the centre, "
        "squash to a square, or pad")  # fmt: skip
    add("--eval-crop-ratio", "--crop-pct", type=float, default=0.875, help="share of the resized image that is kept")
    add("--input", choices=("pil", "fast"), default="pil", help="pil augments training images one by one on the host; "
        "fast decodes and crops them there with SIMD, and does the rest on the device, in batches")  # fmt: skip
    add("--num-workers", "--workers", type=int, default=min(10, os.cpu_count() or 1),
        help="data-loading processes of each process; 10, or as many as there are cores")  # fmt: skip
    add("--data-timeout", type=int, default=600, help="seconds without a batch after which a data-loading process "
        "counts as hung; 0 waits for ever")  # fmt: skip
    add("--pin-mem", action=switch, default=True, help="page-locked host memory for transfers to the GPU")

    parser.set_defaults(**UNOFFERED)
    recipe.add_flags(parser)
    return parser


def augmentation_policy(value: str) -> str | None:
    """A policy that timm can make, such as rand-m9-mstd0.5-inc1; None for "none" and for the empty string."""
    if value.lower() in ("", "none"):
        return None
    if value in POLICIES:
        return value
    from timm.data import create_transform

    try:
        create_transform(32, is_training=True, auto_augment=value)
    except (AssertionError, LookupError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"timm makes no policy of {value!r} ({error or type(error).__name__}), but of rand-m9-mstd0.5-inc1, "
            "original, v0, augmix-m3 or 3a"
        ) from error
    return value
