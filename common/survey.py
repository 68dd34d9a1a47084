"""Which timm architecture offers which drops: `python -m common.augsub --list [pattern]`."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import timm
import torch

from common.augsub import drops
from common.signals import stop_printing

COLUMNS = ("masking", "dropout", "droppath")


def survey(pattern: str = "*") -> Iterator[tuple[str, dict[str, str] | None]]:
    """Every timm architecture whose name matches → what `drops` says of it; None for one that cannot be built here.

    Models are built without memory for their weights, on torch's meta device.
    """
    for name in timm.list_models(pattern):
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                yield name, drops(timm.create_model(name))
        except Exception:  # an optional package is missing, or its initialisation needs values
            yield name, None


def main() -> None:
    """Prints the table, a line each as it is known."""
    parser = argparse.ArgumentParser(prog="python -m common.augsub", description=__doc__)
    parser.add_argument("--list", nargs="?", const="*", metavar="PATTERN", required=True, help="such as 'swin*'")
    args = parser.parse_args()
    try:
        print_list(parser, args.list)
    except BrokenPipeError:
        stop_printing()
        parser.exit(141)


def print_list(parser: argparse.ArgumentParser, asked: str) -> None:
    """A line for each architecture, as it is known."""
    pattern = asked if any(sign in asked for sign in "*?[") else f"*{asked}*"
    print(f"{'architecture':<44} {'masking by':<14} dropout  droppath")
    found = False
    for name, offered in survey(pattern):
        found = True
        if offered is None:
            print(f"{name:<44} cannot be built here", flush=True)
            continue
        dropout, droppath = ("yes" if kind in offered else "-" for kind in COLUMNS[1:])
        print(f"{name:<44} {offered['masking']:<14} {dropout:<8} {droppath}", flush=True)
    if not found:
        parser.exit(2, f"no timm architecture matches {asked!r}\n")
