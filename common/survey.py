"""Print which drops each timm architecture offers: `python -m augsub --list [pattern]`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import timm
import torch

from .drops import find_drops
from .streams import protect_output, silence_stdout


def survey(pattern: str = "*") -> Iterator[tuple[str, dict[str, str] | None]]:
    """Yield every timm architecture whose name matches, with what `find_drops` says of it; None for one that cannot
    be built here.

    Models are built on torch's meta device, without memory for their weights.
    """
    for name in timm.list_models(pattern):
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                yield name, find_drops(timm.create_model(name))
        except Exception:  # an optional package is missing, or its initialisation needs values
            yield name, None


def print_drops(parser: argparse.ArgumentParser, words: str) -> None:
    """Print a line for each architecture as soon as it is known; exit with status 2 where none matches."""
    pattern = words if any(wildcard in words for wildcard in "*?[") else f"*{words}*"
    print(f"{'architecture':<44} {'masking by':<14} dropout  droppath")
    matches = 0
    for name, offered in survey(pattern):
        matches += 1
        if offered is None:
            print(f"{name:<44} cannot be built here", flush=True)
            continue
        dropout, droppath = ("yes" if kind in offered else "-" for kind in ("dropout", "droppath"))
        print(f"{name:<44} {offered['masking']:<14} {dropout:<8} {droppath}", flush=True)
    if not matches:
        parser.exit(2, f"no timm architecture matches {words!r}\n")


def main() -> None:
    """Run the command line; a closed pipe (`| head`) exits quietly with status 141."""
    protect_output()
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("--list", nargs="?", const="*", metavar="PATTERN", required=True, help="such as 'swin*'")
    args = parser.parse_args()
    try:
        print_drops(parser, args.list)
    except BrokenPipeError:
        silence_stdout()
        parser.exit(141)
