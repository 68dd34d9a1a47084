"""How training time per image grows with four things: batch size, image size, model size and processes.

A sweep has points, and a point every mode under measurement. All of a sweep's points take turns, so that a minute in
which the machine is slow hits all of them; one sweep's models are gone before the next one's are built.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from common.args import Parser
from common.augsub import AugSub
from common.dist import Process
from common.prepare import autocast_dtype, check_images, check_mask, create_model
from common.recipe import Recipe
from scripts import plan, timing
from scripts.figures import aligned, short, shown, spread
from scripts.options import Mode, flags_in
from scripts.team import Team

# of each recipe, smallest first; a name of a variant gives the model with the variant's other settings
MODELS = {
    "deit": ["deit_tiny_patch16_LS", "deit_small_patch16_LS", "deit_medium_patch16_LS", "deit_base_patch16_LS"],
    "mae": ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16"],
    "swin": ["tiny", "small", "base"],
    "resnet_rsb": ["resnet18", "resnet34", "resnet50", "resnet101"],
}
BATCH_SIZES = [1, 2, 4, 8, 16]
SHARE = 0.5  # of the memory for what all models of a sweep hold; above it each turn builds its model anew

ModesOf = Callable[[str, Recipe, Sequence[str]], list[Mode]]
Cell = tuple[int, int]  # a point's place in its sweep, and a mode's in the point
Turn = tuple[dict[str, float], float]  # seconds a step by part, and seconds a step of the CPU


@dataclass(frozen=True)
class Point:
    """A place on the x axis.

    Args:
        at: what is swept: a number, or the model's name.
        works: of each mode.
        processes: that train together, each with a batch of its own.
    """

    at: int | str
    modes: list[Mode]
    works: list[plan.Measured]
    processes: int = 1

    @property
    def args(self) -> argparse.Namespace:
        return self.modes[0].args

    @property
    def images(self) -> int:
        """In a step, of all processes."""
        return self.args.batch_size * self.args.accum_iter * self.processes

    def arithmetic(self, mode: int) -> float:
        """Floating-point operations for an image that each process does, forward and backward."""
        return (self.works[mode].main + self.works[mode].sub) * (1 + plan.BACKWARD) / self.processes


@dataclass(frozen=True)
class Sweep:
    """Points that differ in one thing."""

    name: str
    points: list[Point]


def sweeps_of(recipe: Recipe, flags: Sequence[str], modes_of: ModesOf) -> tuple[argparse.Namespace, list[Sweep]]:
    """All that is to be measured, each point tried on torch's meta device → the settings, the sweeps.

    What flags ask for must be possible; of the points that nobody asked for, those that are.

    Args:
        modes_of: (command, recipe, flags) → what the flags ask to compare.

    Raises:
        ValueError: bad input, in one sentence.
    """
    before = ["--batch-size", "64" if torch.cuda.is_available() else "4"]
    if not flags_in(flags) & {"--variant", "--model", "--cfg", "--data-path", "--data-dir", "--data-set"}:
        before += ["--data-set", "DIGITS"]  # keeps the small model's settings where --models names another
    words = [*before, *flags]
    base = modes_of("growth", recipe, words)
    args = base[0].args
    check_place(args)

    def sweep(name: str, flag: str, asked: Sequence[Any] | None, own: Sequence[Any], words: Sequence[str]) -> Sweep:
        found = []
        for value in asked or own:
            try:
                setting = ["--variant" if value in recipe.variants else flag, str(value)]
                modes = modes_of("growth", recipe, [*words, *setting])
                found.append(Point(value, modes, [checked(recipe, f"{name} {value}", mode.args) for mode in modes]))
            except ValueError:
                if asked or (not found and value == own[-1]):
                    raise
        return Sweep(name, found)

    named_model = Parser(add_help=False)
    named_model.add_argument("--model")
    fixed = ["--input-size", str(args.input_size), "--augsub-block", str(args.augsub_block)]  # over a variant's
    modelless = [*named_model.parse_known_args(words)[1], *fixed]
    works = [checked(recipe, args.model, mode.args) for mode in base]
    return args, [
        sweep("batch size", "--batch-size", args.batch_sizes, BATCH_SIZES, words),
        sweep("image size", "--input-size", args.image_sizes, sizes_around(args.input_size), words),
        sweep("model size", "--model", args.models, MODELS[recipe.name], modelless),
        Sweep("processes", [Point(count, base, works, count) for count in args.processes]),
    ]


def sizes_around(side: int) -> list[int]:
    """Image sizes around one: about a half, 3/4, 1, 5/4 and 3/2 of it, in whole patches and windows."""
    step = 32 if side >= 96 else 8
    return sorted({side, *(max(1, int(side * share / step)) * step for share in (0.5, 0.75, 1.25, 1.5))})


def check_place(args: argparse.Namespace) -> None:
    """Refuses what would be found out after the measurement only.

    Raises:
        ValueError: one of several processes runs this, or GPUs are missing.
    """
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))) > 1:
        raise ValueError("growth starts its processes itself: run it as one, with plain python")
    on_gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    if on_gpu and max(args.processes) > torch.cuda.device_count():
        raise ValueError(f"--processes {max(args.processes)}: this machine has {torch.cuda.device_count()} GPUs")


def checked(recipe: Recipe, what: str, args: argparse.Namespace) -> plan.Measured:
    """Tries a training forward pass where nothing is computed → the arithmetic.

    Raises:
        ValueError: the model or its drop cannot be had with these settings.
    """
    try:
        with torch.device("meta"):
            model = create_model(recipe, args, args.nb_classes)
            augsub = AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block)
            check_images(model, args, torch.device("meta"))
        check_mask(augsub, model, args)
        side = args.input_size  # in training batch norm may have too few values
        model.train()(torch.zeros(args.batch_size, 3, side, side, device="meta"))
        return plan.measure(recipe.name, args)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def measured(recipe: Recipe, sweep: Sweep, process: Process) -> dict[str, Any]:
    """Measures a sweep → its figures, in ms."""
    cells = [(i, j) for i, point in enumerate(sweep.points) for j in range(len(point.modes))]
    rounds = sweep.points[0].args.rounds
    if sweep.name != "processes":
        play = Player(recipe, sweep, process)
        turns = take_turns(sweep.name, cells, rounds, play)
        play.release()
        return figures_of(sweep, turns, [{} for _ in sweep.points], process.device)
    with ExitStack() as stack:
        teams = []
        for point in sweep.points:
            teams.append(Team(recipe.name, point.modes, point.processes, process.device.type))
            stack.callback(teams[-1].end)
        turns = take_turns(sweep.name, cells, rounds, lambda cell: teams[cell[0]].turn(cell[1]))
        return figures_of(sweep, turns, [team.facts() for team in teams], process.device)


def take_turns(name: str, cells: Sequence[Cell], rounds: int, play: Callable[[Cell], Turn]) -> dict[Cell, list[Turn]]:
    """Has every cell take a turn in each round; each round begins with another one."""
    turns: dict[Cell, list[Turn]] = {cell: [] for cell in cells}
    for number in range(rounds):
        for place in range(len(cells)):
            cell = cells[(number + place) % len(cells)]
            if sys.stderr.isatty():
                done = number * len(cells) + place
                print(f"\r{name}: {done / (rounds * len(cells)):.0%} \033[K", end="", file=sys.stderr, flush=True)
            turns[cell].append(play(cell))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return turns


class Player:
    """Plays the turns of a sweep in this process; holds its models where they fit into memory together."""

    def __init__(self, recipe: Recipe, sweep: Sweep, process: Process):
        self.recipe, self.points, self.process = recipe, sweep.points, process
        self.held: dict[Cell, timing.Subject] = {}
        needed = sum(plan.state_bytes(work, point.args) for point in sweep.points for work in point.works)
        if process.device.type == "cuda":
            room = torch.cuda.get_device_properties(process.device).total_memory
        else:
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.hold = needed <= SHARE * room

    def __call__(self, cell: Cell) -> Turn:
        mode = self.points[cell[0]].modes[cell[1]]
        if cell not in self.held:
            self.held[cell] = timing.warm_subject(self.recipe, mode, self.process, mode.args.warmup)
        subject = self.held[cell]
        subject.round(mode.args.steps)
        turn = subject.rounds[-1], subject.cpu[-1]
        if not self.hold:
            del subject
            self.release()
        return turn

    def release(self) -> None:
        """Lets go of the models, which a stopwatch ties into cycles."""
        self.held.clear()
        gc.collect()


def figures_of(
    sweep: Sweep, turns: dict[Cell, list[Turn]], facts: Sequence[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """A sweep's figures. "arithmetic_ms" is the time where it went by multiply-adds, and by processes, alone: by the
    rate of the point that has the most of them to an image, and the largest batch."""
    points = sweep.points

    def ms(cell: Cell, parts: Sequence[str] = timing.PARTS) -> list[float]:
        return [1000 * sum(turn[part] for part in parts) / points[cell[0]].images for turn, _ in turns[cell]]

    def figure(i: int, j: int) -> dict[str, Any]:
        mode, work = points[i].modes[j], points[i].works[j]
        most = max(range(len(points)), key=lambda k: (points[k].arithmetic(j), points[k].images))
        alone = statistics.median(ms((most, j))) * points[i].arithmetic(j) / points[most].arithmetic(j)
        return {
            "name": mode.name,
            "kind": mode.kind,
            "reference": mode.reference,
            "dtype": str(autocast_dtype(mode.args.amp, device) or torch.float32).removeprefix("torch."),
            "ms_per_image": spread(ms((i, j))),
            "cpu_ms_per_image": spread([1000 * cpu / points[i].images for _, cpu in turns[i, j]]),
            "ms": {part: spread(ms((i, j), [part])) for part in timing.PARTS},
            "arithmetic_ms": alone,
            "over_arithmetic": statistics.median(ms((i, j))) / alone,
            "to_first_of_all": spread([own / first for own, first in zip(ms((i, j)), ms((i, 0)))]),
            "multiply_adds": {"main": work.main / 2, "sub": work.sub / 2},
            "parameters": work.weights,
        }

    found = []
    for i, (point, fact) in enumerate(zip(points, facts)):
        names = {name: getattr(point.args, name) for name in ("model", "input_size", "batch_size")}
        figures = [figure(i, j) for j in range(len(point.modes))]
        found.append({"at": point.at, **names, "processes": point.processes, **fact, "figures": figures})
    return {"name": sweep.name, "points": found}


def table_of(sweep: dict[str, Any]) -> str:
    """A sweep's table, a line a point and mode: 10⁹ multiply-adds of its passes, time, the time over what arithmetic
    alone would take, the share of optimizer and average, and the time over the first mode's."""
    first = sweep["points"][0]["figures"][0]["name"]
    rows = [[sweep["name"], "", "GMAC", "ms an image", "x arithmetic", "update", f"x {first}"]]
    for label, point in zip(short([str(point["at"]) for point in sweep["points"]]), sweep["points"]):
        for place, f in enumerate(point["figures"]):
            median = f["ms_per_image"]["median"]
            digits = sum(median < bound for bound in (100, 10, 1))  # three that count
            update = sum(f["ms"][part]["median"] for part in ("optimizer", "EMA")) / median
            rows.append([
                "" if place else label if len(label) < 22 else f"{label[:20]}…", f["name"].replace("reference", "ref."),
                f"{sum(f['multiply_adds'].values()) / 1e9:.3f}", shown(f["ms_per_image"], digits),
                f"{f['over_arithmetic']:.2f}", f"{update:.0%}", f"{f['to_first_of_all']['median']:.2f}",
            ])  # fmt: skip
    return aligned(rows)
