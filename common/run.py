"""What an entry point calls: the command line is read first, and PyTorch only if there is something to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.args import parse
from common.errors import Leaving
from common.recipe import Recipe
from common.signals import stop_printing


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> str | None:
    """Trains, or evaluates with `--eval`, as the command line says → None, or the signal that asked it to stop before
    the end.

    Exits with status 2 and one sentence on bad input, and where training cannot go on.
    """
    try:
        try:
            args = parse(recipe, argv)
        finally:
            sys.stdout.flush()  # else a reader's leaving would be noticed when it is too late to be quiet
    except BrokenPipeError:
        stop_printing()
        raise Leaving("", 141) from None
    from common import train

    return train.run(recipe, args)
