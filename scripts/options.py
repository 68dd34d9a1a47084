"""The benchmark's own flags, beside those of the trainer that is measured."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from common.recipe import Recipe


def with_flags(recipe: Recipe) -> Recipe:
    """The recipe with the benchmark's flags beside its own."""

    def add_all(parser: argparse.ArgumentParser) -> None:
        recipe.add_flags(parser)
        add_flags(parser)

    return dataclasses.replace(recipe, add_flags=add_all)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the trainer does not have."""
    add = parser.add_argument_group("benchmark").add_argument
    add("--json", type=Path, default=None, metavar="FILE", help="write the figures here too")
    add("--reference", action="store_true", help="measure a stand-in for the published trainer beside ours")
    add("--rounds", type=count, default=7, help="turns that each mode takes")
    add("--steps", type=count, default=None, help="steps in a turn: 10 on a GPU, 1 on a CPU")
    add("--warmup", type=count, default=2, help="steps before the first turn")
    add("--threads", type=count, default=None, help="compute threads on a CPU; torch's own choice")
    add("--communication", action="store_true", help="step: count what two processes send, in two real ones")
    add("--profile", action="store_true", help="step: count how often the host waits for the device between log lines")
    add("--images", type=count, default=256, help="data: images in a turn; end-to-end: in an epoch, which is a turn")
    add("--batch-sizes", type=counts, default=None, metavar="N,N", help="growth: images of a process; 1,2,4,8,16")
    add("--image-sizes", type=counts, default=None, metavar="N,N", help="growth: pixels a side; around --input-size")
    add("--models", type=names, default=None, metavar="NAME,NAME", help="growth: models or variants; the recipe's own")
    add("--processes", type=counts, default=[1, 2], metavar="N,N", help="growth: processes that train together")
    add("--plot", default=None, metavar="FILE", help="growth: draw the figure here, as .png, .svg or .pdf")


def check_writable(flag: str, path: str | Path | None) -> None:
    """Refuses a file that could not be written once all is measured.

    Raises:
        ValueError: it is a folder, or nothing can be written where it lies.
    """
    if path is None:
        return
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
        if Path(path).is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise ValueError(f"{flag} {path}: not writable ({error.strerror or error})") from error


def names(value: str) -> list[str]:
    """Names with commas between them, each once."""
    if not all(value.split(",")):
        raise argparse.ArgumentTypeError(f"{value!r}: names with commas between them are needed")
    return list(dict.fromkeys(value.split(",")))


def counts(value: str) -> list[int]:
    """Numbers of at least 1 with commas between them, in order, each once."""
    return sorted({count(number) for number in value.split(",")})


def count(value: str) -> int:
    """A number of at least 1."""
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r}: a whole number of at least 1 is needed")
    return int(value)
