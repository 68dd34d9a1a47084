"""The benchmark's command line: its own flags beside those of the trainer that is measured, read without PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.args import DIGITS, KINDS, Parser, flag, hyphenated, parse
from common.recipe import Recipe
from scripts.command import check_writable, count, counts, file, names
from scripts.table import SHORT

COMMANDS = ("step", "data", "end-to-end", "save", "growth", "start")
ROWS = {"deit": "small_400", "mae": "base_100", "swin": "tiny", "resnet_rsb": "resnet50"}  # that stand for a recipe
JOINT = "-joint"
DROPS = [*KINDS, *(kind + JOINT for kind in KINDS[1:])]
UNCODED = (DIGITS, "CIFAR10", "CIFAR")  # data sets of pixels
UNSEEN = "unseen"  # a data path where there is none yet
# settings where no flag says otherwise, also over a variant's; in growth one image cannot be mixed with another, and a
# process is a core in all sweeps
SETTINGS: dict[str, dict[str, Any]] = {command: {"augsub": "none,masking"} for command in COMMANDS}
SETTINGS["data"] = SETTINGS["start"] = {"augsub": "none"}
SETTINGS["growth"] |= {"mixup": 0, "cutmix": 0, "threads": 1}
OF_SEVERAL = ("data", "start")  # these measure all recipes, where none is named
SUFFIXES = (".pdf", ".png", ".svg")
TIMES = """Times the {name} trainer, plain and with each drop. --augsub takes several with commas between them, of
{drops}."""
ABOUT = {"data": "Times how images are read, for a row of each recipe where none is named.",
         "start": "Times how the trainers start, all where none is named."}  # fmt: skip
FLAGS = """ The flags are a trainer's and, in the last group, those of `benchmark.py {command}`; benchmark.py --help
tells of all commands. What is not measured, such as --epochs or --output-dir, is taken and left aside."""


@dataclass
class Mode:
    """A way to train a model: a drop, by this trainer or by the reference.

    Args:
        kind: the drop.
        args: its settings.
    """

    name: str
    kind: str
    reference: bool
    args: argparse.Namespace


def modes_asked(
    command: str, recipe: Recipe, flags: Sequence[str], data_path: str = UNSEEN, more: Sequence[str] = ()
) -> list[Mode]:
    """What a command line asks to compare, with the settings of each.

    Args:
        command: of the benchmark.
        data_path: taken where the flags name none, but a variant, a model or a data set.
        more: flags over all others.

    Raises:
        ValueError: bad input, as far as it shows without the model and the device.
    """
    row = ["--variant", ROWS[recipe.name]] if command == "data" else []
    before = [word for name, value in SETTINGS[command].items() for word in (flag(name), str(value))]
    own = Parser(add_help=False, prog="benchmark.py")
    own.add_argument("--augsub")
    data = Parser(add_help=False, prog="benchmark.py")
    data.add_argument("--data-set", default="")
    found, words = own.parse_known_args([*before, *row, *flags])
    given = flags_in(words)
    unseen = given & {"--variant", "--model", "--cfg", "--data-set"} and not given & {"--data-path", "--data-dir"}
    if data.parse_known_args(words)[0].data_set.startswith("hf"):  # which has its own place
        unseen = set()
    fixed = [*(["--data-path", data_path] if unseen else []), "--output-dir", ""]
    drops = found.augsub.split(",")
    if command in OF_SEVERAL and len(drops) > 1:
        raise ValueError(f"--augsub {found.augsub}: {command} takes one drop")
    measured = with_flags(recipe, command)
    modes: dict[str, Mode] = {}
    for drop in drops:
        if drop not in DROPS:
            raise ValueError(f"--augsub {drop or repr(drop)}: choose from {','.join(DROPS)}")
        args = parse(measured, [*words, *fixed, *flags_of_drop(drop), *more])
        name = SHORT[args.augsub] + (" joint" if args.augsub_joint and args.augsub != "none" else "")
        modes[name] = Mode(name, args.augsub, False, args)
    return list(modes.values())


def flags_in(words: Sequence[str]) -> set[str]:
    """The flags of a command line, without their values."""
    return {hyphenated(word).partition("=")[0] for word in words}


def flags_of_drop(drop: str) -> list[str]:
    """Those of the trainer for one of `DROPS`."""
    kind = drop.removesuffix(JOINT)
    return ["--augsub", kind, *(["--augsub-joint"] if drop != kind else [])]


def check_before(command: str, args: argparse.Namespace) -> None:
    """Refuses what would be found out later, or too late.

    Raises:
        ValueError: data that cannot be made or measured, more threads than cores, a file that could not be written.
    """
    if command == "data" and args.data_set in UNCODED:
        raise ValueError(f"--data-set {args.data_set}: its images are no files to decode, which `data` measures")
    of_files = args.data_set in ("IMNET", DIGITS) or args.data_set.startswith("wds/")
    if command in ("data", "end-to-end") and args.data_path == UNSEEN and not of_files:
        raise ValueError(f"--data-set {args.data_set} needs --data-path; where there is none, photographs are made as "
                         "files (IMNET) or in a shard (wds/photographs)")  # fmt: skip
    if args.threads is not None and args.threads > cores():
        raise ValueError(f"--threads {args.threads}: this machine has {cores()} core{'s' * (cores() > 1)}")
    check_writable("--json", args.json)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if args.plot is not None and Path(args.plot).suffix not in SUFFIXES:
        raise ValueError(f"--plot {args.plot}: a name that ends in {', '.join(SUFFIXES)} is needed")
    check_writable("--plot", args.plot)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def with_flags(recipe: Recipe, command: str) -> Recipe:
    """The recipe with the flags of a benchmark's command beside its own, and defaults as --help shows them."""

    def add_all(parser: argparse.ArgumentParser) -> None:
        recipe.add_flags(parser)
        add_flags(parser, command)

    about = ABOUT.get(command, TIMES.format(name=recipe.name, drops=", ".join(DROPS))) + FLAGS.format(command=command)
    defaults = {**recipe.defaults, **SETTINGS[command]}
    return dataclasses.replace(recipe, about=about, add_flags=add_all, defaults=defaults)


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """The flags that the trainer does not have; those of other commands are settings that stay at their defaults."""
    group = parser.add_argument_group(f"benchmark.py {command}")

    def add(name: str, *commands: str, default: Any = None, **words: Any) -> None:
        if command in commands:
            group.add_argument(name, default=default, **words)
        else:
            parser.set_defaults(**{name.removeprefix("--").replace("-", "_"): default})

    steps = ("step", "save", "growth")
    modes = (*steps, "end-to-end")
    add("--json", *COMMANDS, type=file, metavar="FILE", help="write the figures here too")
    add("--rounds", *COMMANDS, type=count, default=7, help="turns that each mode takes")
    add("--reference", *modes, default=False, action="store_true",
        help="measure a stand-in for the published trainer beside ours")  # fmt: skip
    add("--steps", *steps, type=count, help="steps in a turn; 10 on a GPU, 1 on a CPU")
    add("--warmup", *steps, type=count, default=2, help="steps before the first turn")
    add("--threads", *modes, type=count, help="compute threads on a CPU; as many as PyTorch chooses")
    add("--communication", "step", default=False, action="store_true",
        help="count what two processes send, in two real ones")  # fmt: skip
    add("--profile", "step", default=False, action="store_true",
        help="count how often the host waits for the device between log lines")  # fmt: skip
    turn = "in a turn" if command == "data" else "in an epoch, which is a turn"
    add("--images", "data", "end-to-end", type=count, default=256, help=turn)
    add("--batch-sizes", "growth", type=counts, metavar="N,N", help="images of a process; 1,2,4,8,16")
    add("--image-sizes", "growth", type=counts, metavar="N,N", help="pixels a side; around --input-size")
    add("--models", "growth", type=names, metavar="NAME,NAME", help="models or variants; the recipe's own")
    add("--processes", "growth", type=counts, default=[1, 2], metavar="N,N", help="processes that train together")
    add("--plot", "growth", type=file, metavar="FILE", help="draw the figure here, as .png, .svg or .pdf")


def flags_of_trainer(command: str, flags: Sequence[str]) -> list[str]:
    """A command line as the trainer takes it: without the benchmark's own flags and without the variant."""
    own = Parser(add_help=False, prog="benchmark.py")
    add_flags(own, command)
    own.add_argument("--variant")
    own.add_argument("--augsub", default="none")
    found, rest = own.parse_known_args(list(flags))
    return [*rest, *flags_of_drop(found.augsub)]


def needs_recipe(flags: Sequence[str]) -> bool:
    """Whether flags are of one recipe."""
    return bool(flags_in(flags) & {"--variant", "--cfg"})
