"""The benchmark's command line: its own flags beside those of the trainer that is measured, read without PyTorch."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.args import EMBEDDED, KINDS, parse
from common.flag_types import csv, nonempty_path, positive_int, positive_ints
from common.parser import Parser, format_flag, normalize_flag
from common.recipe import Recipe, check_fast_input
from common.train_args import TrainArgs
from scripts.cli_errors import check_plot, check_writable
from scripts.launch.paper_tables import SHORT

COMMANDS = ("step", "data", "end-to-end", "save", "growth")
VARIANTS = {"deit": "small_400", "mae": "base_100", "swin": "tiny", "resnet_rsb": "resnet50"}  # measured by `data`
PIXEL_DATA_SETS = (*EMBEDDED, "CIFAR10", "CIFAR")  # without encoded files
NO_PATH = "unseen"  # stands for a --data-path that is not given
# settings where no flag says otherwise, also over a variant's. In `growth` a batch may be one image, which cannot be
# mixed with another, and a process has one core in all sweeps
DEFAULTS: dict[str, dict[str, Any]] = {command: {"augsub": "none,masking"} for command in COMMANDS}
DEFAULTS["data"] = {"augsub": "none"}
DEFAULTS["growth"] |= {"mixup": 0, "cutmix": 0, "threads": 1}
ABOUT = "Times the {recipe} trainer, plain and with each drop: --augsub takes several of {drops}, separated by commas."
ABOUT_DATA = "Times the input pipelines, for a variant of each recipe unless one is named."
ABOUT_FLAGS = """ The flags are the trainer's and, in the last group, those of `benchmark.py {command}`; benchmark.py
--help lists all commands. Flags of what is not measured, such as --epochs or --output-dir, are accepted and ignored."""


class BenchArgs(TrainArgs):
    """The settings of a benchmark: the trainer's and the flags of `add_flags`."""

    nb_classes: int
    data_path: str
    json: str | None
    rounds: int
    reference: bool
    steps: int
    warmup: int
    threads: int
    images: int
    batch_sizes: list[int] | None
    image_sizes: list[int] | None
    models: list[str] | None
    processes: list[int]
    plot: str | None


@dataclass
class Mode:
    """A way to train a model: with a drop, by this trainer or by the reference."""

    name: str
    kind: str  # of drop
    reference: bool
    args: BenchArgs


def parse_modes(
    command: str, recipe: Recipe, flags: Sequence[str], data_path: str = NO_PATH, overrides: Sequence[str] = ()
) -> list[Mode]:
    """Parse the flags of a command into the modes to compare.

    Args:
        data_path: used where the flags name a variant, a model or a data set but no path.
        overrides: flags that take precedence over all others.

    Raises:
        ValueError: bad input, as far as it shows without the model and the device.
    """
    defaults = [word for name, value in DEFAULTS[command].items() for word in (format_flag(name), str(value))]
    if command == "data":
        defaults += ["--variant", VARIANTS[recipe.name]]
    parser = Parser(add_help=False, prog="benchmark.py")
    parser.add_argument("--augsub")
    parser.add_argument("--data-set")
    known, words = parser.parse_known_args([*defaults, *flags])
    if known.data_set is not None:
        words += ["--data-set", known.data_set]
    given = flags_in(words)
    has_path = bool(given & {"--data-path", "--data-dir"}) or (known.data_set or "").startswith("hf")  # the hub's
    if given & {"--variant", "--model", "--cfg", "--data-set"} and not has_path:
        words += ["--data-path", data_path]
    drops = known.augsub.split(",")
    if command == "data" and len(drops) > 1:
        raise ValueError(f"--augsub {known.augsub}: data takes one drop; name one")
    extended = extend_recipe(recipe, command)
    modes: dict[str, Mode] = {}  # by name: a drop that is given twice is measured once
    for drop in drops:
        if drop not in KINDS:
            raise ValueError(f"--augsub {drop or repr(drop)}: unknown drop; choose from {','.join(KINDS)}")
        args = parse(extended, [*words, "--output-dir", "", "--augsub", drop, *overrides])
        modes[SHORT[drop]] = Mode(SHORT[drop], drop, False, args)
    return list(modes.values())


def flags_in(words: Sequence[str]) -> set[str]:
    """Return the flags of a command line, without their values."""
    return {normalize_flag(word).partition("=")[0] for word in words}


def check_args(command: str, args: BenchArgs) -> None:
    """Refuse settings that would fail only after PyTorch is imported, or after the measurement.

    Raises:
        ValueError: data that cannot be made or measured, more threads than cores, a file that cannot be written.
    """
    if command == "data" and args.data_set in PIXEL_DATA_SETS:
        raise ValueError(f"--data-set {args.data_set}: holds no files to decode; choose IMNET or wds/photographs")
    made = args.data_set in ("IMNET", *EMBEDDED) or args.data_set.startswith("wds/")
    if command in ("data", "end-to-end") and args.data_path == NO_PATH and not made:
        raise ValueError(
            f"--data-set {args.data_set}: needs --data-path; photographs are made only for IMNET and wds/photographs"
        )
    if command == "data":
        check_fast_input()
    if args.threads is not None and args.threads > count_cores():
        raise ValueError(f"--threads {args.threads}: this machine has fewer cores; choose at most {count_cores()}")
    check_writable("--json", args.json)
    check_plot(args.plot)


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def extend_recipe(recipe: Recipe, command: str) -> Recipe:
    """Add the flags and defaults of a benchmark's command to a recipe's."""

    def add_all(parser: argparse.ArgumentParser) -> None:
        recipe.add_flags(parser)
        add_flags(parser, command)

    about = ABOUT_DATA if command == "data" else ABOUT.format(recipe=recipe.name, drops=", ".join(KINDS))
    about += ABOUT_FLAGS.format(command=command)
    extended = copy.copy(recipe)
    extended.about, extended.defaults = about, {**recipe.defaults, **DEFAULTS[command]}
    extended.add_flags = add_all  # type: ignore[method-assign]
    return extended


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the flags that the trainer does not have; those of other commands become settings at their defaults."""
    group = parser.add_argument_group(f"benchmark.py {command}")

    def add(name: str, *commands: str, default: Any = None, **kwargs: Any) -> None:
        if command in commands:
            group.add_argument(name, default=default, **kwargs)
        else:
            parser.set_defaults(**{name.removeprefix("--").replace("-", "_"): default})

    steps = ("step", "save", "growth")
    modes = (*steps, "end-to-end")
    images = "images per round" if command == "data" else "images per epoch; a round is an epoch"
    add("--json", *COMMANDS, type=nonempty_path, metavar="FILE", help="also write the results to this file")
    add("--rounds", *COMMANDS, type=positive_int, default=7, help="rounds, in each of which every mode is timed once")
    add(
        "--reference", *modes, default=False, action="store_true", help="also time a stand-in for the published trainer"
    )
    add("--steps", *steps, type=positive_int, help="optimizer steps per round; 10 on a GPU, 1 on a CPU")
    add("--warmup", *steps, type=positive_int, default=2, help="optimizer steps before the first round")
    add("--threads", *modes, type=positive_int, help="compute threads on a CPU; PyTorch's default")
    add("--images", "data", "end-to-end", type=positive_int, default=256, help=images)
    add("--batch-sizes", "growth", type=positive_ints, metavar="N,N", help="images per process; 1,2,4,8,16")
    add("--image-sizes", "growth", type=positive_ints, metavar="N,N", help="side in pixels; sizes around --input-size")
    add("--models", "growth", type=csv, metavar="NAME,NAME", help="models or variants; the recipe's own")
    add(
        "--processes", "growth", type=positive_ints, default=[1, 2], metavar="N,N", help="processes that train together"
    )
    add("--plot", "growth", type=nonempty_path, metavar="FILE", help="draw the results as a .png, .svg or .pdf file")
