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
with commas between them: none, masking, dropout, droppath, and each of the drops with -joint behind it, for --augsub-
joint. What is compared takes turns, so that a machine that is slow for a while is so for all; a figure is the median
of the turns, and ± half the distance of their quartiles. --reference puts a stand-in for the published trainers
beside: eager, float32 on a CPU and float16 autocast on a GPU, attention that is not fused, an all-reduce for each
pass, the loss read and the device waited for in every step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from common.args import Parser, parse  # noqa: E402
from common.errors import StopTraining  # noqa: E402
from common.recipe import Recipe  # noqa: E402
from scripts.options import with_flags  # noqa: E402
from scripts.table import RECIPES  # noqa: E402

COMMANDS = ("step", "data", "end-to-end", "save", "growth", "start")
OF_SEVERAL = ("data", "start")  # these measure all recipes, where none is named


def main() -> None:
    """Measures what is asked for; ends with status 2 and one sentence on bad input, with 130 after Ctrl-C."""
    command, recipes, flags = opening(sys.argv[1:])
    try:
        if {"-h", "--help"} & set(flags):
            parse(with_flags(recipes[0]), flags)
        from scripts import measure

        call = getattr(measure, command.replace("-", "_"))
        call(recipes if command in OF_SEVERAL else recipes[0], flags)
    except ValueError as error:
        leave(str(error))
    except StopTraining as stop:
        leave(f"training stopped: {stop}")
    except KeyboardInterrupt:
        print("benchmark.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def leave(sentence: str) -> NoReturn:
    """Ends with status 2."""
    print(f"benchmark.py: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def opening(words: Sequence[str]) -> tuple[str, list[Recipe], list[str]]:
    """The command, the recipe that is named or else all, and the flags of a command line."""
    parser = Parser(description=__doc__, prog="benchmark.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("recipe", nargs="?", choices=list(RECIPES))
    first = list(takewhile(lambda word: not word.startswith("-"), words))
    found = parser.parse_args(first or words)
    recipes = list(RECIPES.values()) if found.recipe is None else [RECIPES[found.recipe]]
    return found.command, recipes, list(words[len(first) :])


if __name__ == "__main__":
    main()
