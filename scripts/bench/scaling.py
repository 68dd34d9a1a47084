"""How training time per image grows with batch size, image size, model size and the number of processes.

A sweep has points, and each point every mode. All points of a sweep are timed in interleaved rounds, so background load
affects all of them alike; a sweep's models are freed before the next one's are built.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.augsub import AugSub
from common.distributed import Process, init_distributed
from common.model_checks import check_batch_norm, check_input_size, check_mask
from common.parser import Parser
from common.recipe import Recipe
from common.trainer import PHASES, autocast_dtype, build_model
from scripts.bench import plot, report
from scripts.bench.args import BenchArgs, Mode, flags_in
from scripts.bench.cases import BenchCase, RoundTime, build_case, prepare_modes
from scripts.bench.report import format_spread, short_name, strip_common_words, summarize, summarize_ratios
from scripts.bench.workers import WorkerGroup
from scripts.launch import cost

# of each recipe, smallest first; the name of a variant stands for its model with the variant's other settings
MODELS = {
    "deit": ["deit_tiny_patch16_LS", "deit_small_patch16_LS", "deit_medium_patch16_LS", "deit_base_patch16_LS"],
    "mae": ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16"],
    "swin": ["tiny", "small", "base"],
    "resnet_rsb": ["resnet18", "resnet34", "resnet50", "resnet101"],
}
BATCH_SIZES = [1, 2, 4, 8, 16]
MEMORY_SHARE = 0.5  # that all models of a sweep may take; above it each round builds its models anew

Slot = tuple[int, int]  # (point, mode) of a sweep


@dataclass(frozen=True)
class Point:
    """A place on the x axis."""

    at: int | str  # the value that is swept: a number, or the model's name
    modes: list[Mode]
    works: list[cost.ModelCost]  # the arithmetic of each mode
    processes: int = 1  # that train together, each on its own batch

    @property
    def args(self) -> BenchArgs:
        return self.modes[0].args

    @property
    def images(self) -> int:
        """Images in a step of all processes."""
        return self.args.batch_size * self.args.accum_iter * self.processes

    def flops_per_image(self, mode: int) -> float:
        """Floating-point operations that each process does for an image of any process, forward and backward."""
        return (self.works[mode].main + self.works[mode].sub) * (1 + cost.BACKWARD) / self.processes


def measure_growth(recipe: Recipe, flags: Sequence[str]) -> None:
    """Run `benchmark.py growth`."""
    args, sweeps = plan_sweeps(recipe, flags)
    with init_distributed(args.device) as process:
        results = [measure_sweep(recipe, name, points, process) for name, points in sweeps.items()]
    try:
        if args.plot is not None:
            machine = report.describe_machine(process.device)
            place = machine["gpu"] or f"{machine['cpu']}, {report.format_threads(machine)} a process"
            dtype = results[0]["points"][0]["figures"][0]["dtype"]
            rounds = f"medians and quartiles of {args.rounds} rounds" if args.rounds > 1 else "one round"
            caption = f"{report.describe_model(recipe, args)}, {dtype}; {place}; {rounds}"
            plot.draw_sweeps(Path(args.plot), results, caption)
    finally:
        report.write_report("growth", [recipe], args, process, results, [sweep_table(result) for result in results])


def plan_sweeps(recipe: Recipe, flags: Sequence[str]) -> tuple[BenchArgs, dict[str, list[Point]]]:
    """Plan all points, each tried on torch's meta device → the settings, and each sweep's points by its name.

    Raises:
        ValueError: bad input.
    """
    defaults = ["--batch-size", "64" if torch.cuda.is_available() else "4"]
    if not flags_in(flags) & {"--variant", "--model", "--cfg", "--data-path", "--data-dir", "--data-set"}:
        defaults += ["--data-set", "DIGITS"]  # keeps the small model's settings where --models names another
    words = [*defaults, *flags]
    modes = prepare_modes("growth", recipe, words)
    args = modes[0].args
    check_processes(args)
    works = [try_on_meta(recipe, args.model, mode.args) for mode in modes]  # first, as the flags ask for these modes
    parser = Parser(add_help=False)
    parser.add_argument("--model")
    _, model_words = parser.parse_known_args(words)
    model_words += ["--input-size", str(args.input_size), "--augsub-block", str(args.augsub_block)]  # over a variant's

    def name_model(name: str) -> list[str]:
        return [*model_words, "--variant" if name in recipe.variants else "--model", name]

    # of each sweep: the values of its flag, those without the flag, and the command line of a value
    axes: dict[str, tuple[list[Any] | None, list[Any], Callable[[Any], list[str]]]] = {
        "batch size": (args.batch_sizes, BATCH_SIZES, lambda size: [*words, "--batch-size", str(size)]),
        "image size": (
            args.image_sizes,
            image_sizes_around(args.input_size),
            lambda size: [*words, "--input-size", str(size)],
        ),
        "model size": (args.models, MODELS[recipe.name], name_model),
    }
    sweeps = {name: plan_points(recipe, name, *axis) for name, axis in axes.items()}
    return args, sweeps | {"processes": [Point(count, modes, works, count) for count in args.processes]}


def image_sizes_around(side: int) -> list[int]:
    """About a half, 3/4, 1, 5/4 and 3/2 of a side, in whole patches and windows."""
    step = 32 if side >= 96 else 8
    return sorted({side, *(max(1, int(side * share / step)) * step for share in (0.5, 0.75, 1.25, 1.5))})


def plan_points(
    recipe: Recipe, name: str, values: list[Any] | None, defaults: list[Any], words_of: Callable[[Any], list[str]]
) -> list[Point]:
    """Plan a point for each value; without `values` for those of `defaults` that are possible.

    Raises:
        ValueError: bad input, or an impossible point: one of `values`, or all of `defaults`.
    """
    points: list[Point] = []
    error = None
    for value in values or defaults:
        modes = prepare_modes("growth", recipe, words_of(value))
        try:
            points.append(Point(value, modes, [try_on_meta(recipe, f"{name} {value}", mode.args) for mode in modes]))
        except ValueError as impossible:
            if values:
                raise
            error = impossible
    if error is not None and not points:
        raise error
    return points


def check_processes(args: BenchArgs) -> None:
    """Refuse what would fail only after the measurement.

    Raises:
        ValueError: a launcher started several processes, or GPUs are missing.
    """
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))) > 1:
        raise ValueError("growth: starts its worker processes itself; run it once, with plain python")
    on_gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    gpus = torch.cuda.device_count()
    if on_gpu and max(args.processes) > gpus:
        raise ValueError(f"--processes {max(args.processes)}: this machine has fewer GPUs; choose at most {gpus}")


def try_on_meta(recipe: Recipe, what: str, args: BenchArgs) -> cost.ModelCost:
    """Run a forward pass in training mode on the meta device, where nothing is computed → the arithmetic.

    Raises:
        ValueError: the model or its drop cannot be had with these settings.
    """
    try:
        with torch.device("meta"):
            model = build_model(recipe, args, args.nb_classes)
            augsub = AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block)
            check_input_size(model, args, torch.device("meta"))
            check_batch_norm(model, args, Process(torch.device("meta")))
        check_mask(augsub, model, args)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return cost.measure(recipe.name, args)


def measure_sweep(recipe: Recipe, name: str, points: list[Point], process: Process) -> dict[str, Any]:
    """Measure a sweep → its results, in ms."""
    slots = [(i, j) for i, point in enumerate(points) for j in range(len(point.modes))]
    rounds = points[0].args.rounds
    if name != "processes":
        runner = SweepRunner(recipe, points, process)
        times = interleave_rounds(name, slots, rounds, runner)
        runner.release()
        return sweep_results(name, points, times, [{} for _ in points], process.device)
    with ExitStack() as stack:
        groups = []
        for point in points:
            groups.append(WorkerGroup(recipe.name, point.modes, point.processes, process.device.type))
            stack.callback(groups[-1].terminate)
        times = interleave_rounds(name, slots, rounds, lambda slot: groups[slot[0]].run_round(slot[1]))
        return sweep_results(name, points, times, [group.collect_facts() for group in groups], process.device)


def interleave_rounds(
    name: str, slots: Sequence[Slot], rounds: int, run_round: Callable[[Slot], RoundTime]
) -> dict[Slot, list[RoundTime]]:
    """Time every slot once in each round; each round begins with another slot."""
    times: dict[Slot, list[RoundTime]] = {slot: [] for slot in slots}
    for number in range(rounds):
        for place in range(len(slots)):
            slot = slots[(number + place) % len(slots)]
            if sys.stderr.isatty():
                done = number * len(slots) + place
                print(f"\r{name}: {done / (rounds * len(slots)):.0%} \033[K", end="", file=sys.stderr, flush=True)
            times[slot].append(run_round(slot))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return times


class SweepRunner:
    """Runs the rounds of a sweep in this process; keeps its models where they fit into memory together."""

    def __init__(self, recipe: Recipe, points: list[Point], process: Process):
        self.recipe, self.points, self.process = recipe, points, process
        self.cases: dict[Slot, BenchCase] = {}
        needed = sum(cost.state_bytes(work, point.args) for point in points for work in point.works)
        if process.device.type == "cuda":
            memory = torch.cuda.get_device_properties(process.device).total_memory
        else:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.keep = needed <= MEMORY_SHARE * memory

    def __call__(self, slot: Slot) -> RoundTime:
        """Time a round of a slot."""
        mode = self.points[slot[0]].modes[slot[1]]
        if slot not in self.cases:
            self.cases[slot] = build_case(self.recipe, mode, self.process, mode.args.warmup)
        time = self.cases[slot].run_round(mode.args.steps)
        if not self.keep:
            self.release()
        return time

    def release(self) -> None:
        """Free the models, which a mask's hook ties into reference cycles."""
        self.cases.clear()
        gc.collect()


def sweep_results(
    name: str,
    points: list[Point],
    times: dict[Slot, list[RoundTime]],
    facts: Sequence[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """Compute a sweep's results. "arithmetic_ms" is the time if it were proportional to multiply-adds and inversely to
    processes, at the rate of the point with the most multiply-adds per image, and the largest batch of these."""

    def ms(slot: Slot, phases: Sequence[str] = PHASES) -> list[float]:
        images = points[slot[0]].images
        return [1000 * sum(time.phases[phase] for phase in phases) / images for time in times[slot]]

    def mode_results(i: int, j: int) -> dict[str, Any]:
        mode, work = points[i].modes[j], points[i].works[j]
        most = max(range(len(points)), key=lambda k: (points[k].flops_per_image(j), points[k].images))
        share = points[i].flops_per_image(j) / points[most].flops_per_image(j)
        arithmetic_ms = statistics.median(ms((most, j))) * share
        return {
            "name": mode.name,
            "kind": mode.kind,
            "reference": mode.reference,
            "dtype": str(autocast_dtype(mode.args.amp, device) or torch.float32).removeprefix("torch."),
            "ms_per_image": summarize(ms((i, j))),
            "cpu_ms_per_image": summarize([1000 * time.cpu / points[i].images for time in times[i, j]]),
            "ms": {phase: summarize(ms((i, j), [phase])) for phase in PHASES},
            "arithmetic_ms": arithmetic_ms,
            "over_arithmetic": statistics.median(ms((i, j))) / arithmetic_ms,
            "to_first_of_all": summarize_ratios(ms((i, j)), ms((i, 0))),
            "multiply_adds": {"main": work.main / 2, "sub": work.sub / 2},
            "parameters": work.parameters,
        }

    results = []
    for i, (point, fact) in enumerate(zip(points, facts)):
        settings = {key: getattr(point.args, key) for key in ("model", "input_size", "batch_size")}
        modes = [mode_results(i, j) for j in range(len(point.modes))]
        results.append({"at": point.at, **settings, "processes": point.processes, **fact, "figures": modes})
    return {"name": name, "points": results}


def sweep_table(sweep: dict[str, Any]) -> str:
    """Format a sweep, a line for each point and mode: 10⁹ multiply-adds of its passes, time, time over that of the
    arithmetic alone, the share of optimizer and average, and time over the first mode's."""
    first = sweep["points"][0]["figures"][0]["name"]
    rows = [[sweep["name"], "", "GMAC", "ms an image", "x arithmetic", "update", f"x {first}"]]
    for label, point in zip(strip_common_words([str(point["at"]) for point in sweep["points"]]), sweep["points"]):
        for place, result in enumerate(point["figures"]):
            median = result["ms_per_image"]["median"]
            digits = sum(median < bound for bound in (100, 10, 1))  # three significant ones
            update = sum(result["ms"][phase]["median"] for phase in ("optimizer", "EMA")) / median
            name = "" if place else label if len(label) < 22 else f"{label[:20]}…"
            gmac = f"{sum(result['multiply_adds'].values()) / 1e9:.3f}"
            ratios = [f"{result['over_arithmetic']:.2f}", f"{update:.0%}", f"{result['to_first_of_all']['median']:.2f}"]
            rows.append([name, short_name(result), gmac, format_spread(result["ms_per_image"], digits), *ratios])
    return report.align_columns(rows)
