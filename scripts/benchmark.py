"""Measures how fast training is, plain and with each drop, side by side in one run.

    python scripts/benchmark.py step deit --variant small_400 --augsub none,masking --batch-size 64
    python scripts/benchmark.py step --model swin_tiny_patch4_window7_224 --augsub none,masking --reference
    python scripts/benchmark.py data
    python scripts/benchmark.py end-to-end resnet_rsb --variant resnet50 --data-path /data/imagenet
    python scripts/benchmark.py growth deit --variant small_400 --plot growth.png

step        a training step: images/s, where its time goes, memory, arithmetic, what is sent between processes
data        images/s that a core makes of JPEGs, for the recipes' augmentations; with --data-set wds/photographs, of
            JPEGs in a shard
end-to-end  a short real training with loader processes: images/s, and the share of time spent waiting for data
save        a checkpoint written while training goes on: for how long a step waits, beside what a step takes
start       seconds until --help is there, and until the first training step is done, of each recipe
growth      time per image over batch size, image size, model size and number of processes, beside what the arithmetic
            alone would take; with one thread, and no images mixed, unless flags say otherwise

The first word after the command is a recipe (deit; all for data and start). Flags are those of its trainer, --variant
and --model among them, and without either its small model for the digits is measured; --augsub takes several drops,
with commas between them: none, masking, dropout, droppath, and each of the drops with -joint behind it, which stands
for --augsub-joint. What is compared takes turns, so that a machine that is slow for a while is so for all; a figure is
the median of the turns, and ± half the distance of their quartiles; a ratio is the median of each turn's ratio.
--reference puts a stand-in for the published trainers beside: eager, float32 on a CPU and float16 autocast on a GPU,
attention that is not fused, an all-reduce for each pass, the loss read and the device waited for in every step.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the imports without a traceback

from common.args import Parser  # noqa: E402
from common.recipe import Recipe  # noqa: E402
from common.signals import listening  # noqa: E402
from scripts.command import complaining  # noqa: E402
from scripts.options import COMMANDS, OF_SEVERAL, check_before, modes_asked, needs_recipe  # noqa: E402
from scripts.table import RECIPES  # noqa: E402


def main() -> None:
    """Measures what is asked for. Bad input ends it with status 2 and one sentence, Ctrl-C with 130, SIGTERM with 143;
    temporary folders and processes are gone then."""
    parser = create_parser()
    with listening(speaks=False), complaining(parser, interrupted="interrupted"):
        command, recipes, flags = opening(parser, sys.argv[1:])
        for recipe in recipes:
            # tells of a mistake before PyTorch is imported, and before anything is measured
            check_before(command, modes_asked(command, recipe, flags)[0].args)
        from scripts import measure

        call = getattr(measure, command.replace("-", "_"))
        call(recipes if command in OF_SEVERAL else recipes[0], flags)


def create_parser() -> Parser:
    """Of what comes before the flags."""
    parser = Parser(description=__doc__, prog="benchmark.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("recipe", nargs="?", choices=list(RECIPES))
    return parser


def opening(parser: Parser, words: Sequence[str]) -> tuple[str, list[Recipe], list[str]]:
    """The command, the recipes to measure, and the flags of a command line.

    Raises:
        ValueError: flags come first, or are of one recipe and none is named.
    """
    first = list(takewhile(lambda word: not word.startswith("-"), words))
    flags = list(words[len(first) :])
    asks = {"-h", "--help"} & set(flags)
    if words and not (first or asks):
        raise ValueError(f"{words[0]} before the command, which comes first: one of {', '.join(COMMANDS)}")
    found = parser.parse_args(first or words)
    if found.recipe is not None:
        return found.command, [RECIPES[found.recipe]], flags
    if found.command not in OF_SEVERAL or asks:
        return found.command, list(RECIPES.values())[:1], flags
    if needs_recipe(flags):
        raise ValueError(f"of which recipe is the variant? One is named as in: benchmark.py {found.command} swin")
    return found.command, list(RECIPES.values()), flags


if __name__ == "__main__":
    main()
