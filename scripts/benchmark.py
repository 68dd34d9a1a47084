"""Measure how fast training is, plain and with each drop, side by side in one run.

    python scripts/benchmark.py step deit --variant small_400 --augsub none,masking --batch-size 64
    python scripts/benchmark.py step --model swin_tiny_patch4_window7_224 --augsub none,masking --reference
    python scripts/benchmark.py data
    python scripts/benchmark.py end-to-end resnet_rsb --variant resnet50 --data-path /data/imagenet
    python scripts/benchmark.py growth deit --variant small_400 --plot growth.png

step        an optimizer step: images/s, time by phase, memory, arithmetic
data        input pipelines: images/s of one core on JPEGs, with the recipes' augmentations; with --data-set
            wds/photographs on JPEGs in a shard
end-to-end  a short training with DataLoader workers: images/s, and the share of time spent waiting for data
save        checkpoints written in the background: how long each keeps a step waiting, beside the time of a step
growth      time per image over batch size, image size, model size and number of processes, beside the time that the
            arithmetic alone would take; one thread and no mixed images by default

The recipe follows the command (default: deit; for data all). The flags are those of its trainer, such as --variant and
--model; without either, the small model for the digits is measured. --augsub takes several drops, separated by commas:
none, masking, dropout, droppath. Modes are interleaved, so background load affects all of them alike; a result is the
median of the rounds ± half the interquartile range, and a ratio is the median of the ratios within each round.
--reference adds a stand-in for the published trainers: eager, float32 on a CPU and float16 autocast on a GPU, unfused
attention, an all-reduce for each pass, and in every step a read of the loss and a wait for the device.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the imports without a traceback
    # PyTorch reads these when it is imported; the worker processes inherit them
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines at each start and stop of the profiler
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no DDP warning of a pass that leaves no parameter unused

from common.parser import Parser  # noqa: E402
from common.recipe import Recipe  # noqa: E402
from common.signals import handle_stop_signals  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.bench.args import COMMANDS, check_args, flags_in, parse_modes  # noqa: E402
from scripts.cli_errors import cli_errors  # noqa: E402
from scripts.launch.registry import RECIPES  # noqa: E402


def main() -> None:
    """Run a command. Bad input ends it with status 2 and one sentence, Ctrl-C with 130, SIGTERM with 143; temporary
    folders and worker processes are gone by then."""
    protect_output()
    parser = create_parser()
    with handle_stop_signals(verbose=False), cli_errors(parser, interrupted="interrupted"):
        command, recipes, flags = parse_command_line(parser, sys.argv[1:])
        for recipe in recipes:  # before PyTorch is imported, and before anything is measured
            check_args(command, parse_modes(command, recipe, flags)[0].args)
        run_command(command, recipes, flags)


def run_command(command: str, recipes: Sequence[Recipe], flags: Sequence[str]) -> None:
    """Import PyTorch and the command's module, and measure."""
    from scripts.bench import data, scaling, step

    if command == "data":
        data.measure_pipelines(recipes, flags)
        return
    commands = {
        "step": step.measure_step,
        "end-to-end": data.measure_training,
        "save": step.measure_save,
        "growth": scaling.measure_growth,
    }
    commands[command](recipes[0], flags)


def create_parser() -> Parser:
    """Create the parser of the words before the flags."""
    parser = Parser(description=__doc__, prog="benchmark.py", raw_description=True)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("recipe", nargs="?", choices=list(RECIPES))
    return parser


def parse_command_line(parser: Parser, words: Sequence[str]) -> tuple[str, list[Recipe], list[str]]:
    """Split a command line into the command, the recipes to measure, and the flags.

    Raises:
        ValueError: a flag comes first, or belongs to one recipe and none is named.
    """
    positionals = list(takewhile(lambda word: not word.startswith("-"), words))
    flags = list(words[len(positionals) :])
    asks_for_help = bool({"-h", "--help"} & set(flags))
    if words and not (positionals or asks_for_help):
        raise ValueError(f"{words[0]}: comes before the command; begin with one of {', '.join(COMMANDS)}")
    parsed = parser.parse_args(positionals or words)
    if parsed.recipe is not None:
        return parsed.command, [RECIPES[parsed.recipe]], flags
    if parsed.command != "data" or asks_for_help:
        return parsed.command, list(RECIPES.values())[:1], flags
    of_one_recipe = sorted(flags_in(flags) & {"--variant", "--cfg"})
    if of_one_recipe:
        raise ValueError(f"{of_one_recipe[0]}: belongs to one recipe; name it, as in: benchmark.py data swin")
    return parsed.command, list(RECIPES.values()), flags


if __name__ == "__main__":
    main()
