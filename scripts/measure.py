"""The benchmark's commands: each measures, prints a table, and writes its figures down."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.args import DIGITS
from common.dist import Process, started
from common.fast import simplejpeg
from common.prepare import check_targets, settings
from common.recipe import Recipe
from common.resume import plain
from scripts import pipelines, plan, timing
from scripts.command import write_whole
from scripts.figures import aligned, shown, spread
from scripts.options import ROWS, UNSEEN, Mode, flags_of_trainer, modes_asked
from scripts.startup import BATCH, LOOKS, measure_starts
from scripts.team import communication


def modes_of(command: str, recipe: Recipe, flags: Sequence[str], data_path: str = UNSEEN) -> list[Mode]:
    """What a command line asks to compare, the reference's modes included, and the number of compute threads set.

    Args:
        data_path: taken where the flags name none, but a variant, a model or a data set.

    Raises:
        ValueError: bad input, in one sentence.
    """
    modes = modes_asked(command, recipe, flags, data_path)
    args = modes[0].args
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.reference:
        published = modes_asked(command, recipe, flags, data_path, timing.reference_flags(device))
        modes += [Mode(f"reference {mode.name}", mode.kind, True, mode.args) for mode in published]
    for mode in modes:
        if mode.args.nb_classes is None:
            mode.args.nb_classes = 10 if mode.args.data_set == DIGITS else 1000
        mode.args.steps = mode.args.steps or (10 if device.type == "cuda" else 1)
        check_targets(mode.args, mode.args.nb_classes)
    if args.threads:
        torch.set_num_threads(args.threads)
    return modes


def step(recipe: Recipe, flags: Sequence[str]) -> None:
    """A training step."""
    modes = modes_of("step", recipe, flags)
    args = modes[0].args
    with started(args.device) as process:
        subjects = [timing.prepare_subject(recipe, mode, process, args.warmup) for mode in modes]
        dtypes = [subject.trainer.autocast or torch.float32 for subject in subjects]
        rates: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        for turn in range(args.rounds):
            first = turn % len(subjects)  # the one that comes first finds the caches cold
            for subject in subjects[first:] + subjects[:first]:
                subject.round(args.steps)
            for dtype, values in rates.items():
                values.append(timing.matrix_rate(process.device, dtype))
        waits = [timing.waits_of(recipe, mode, process) if args.profile else None for mode in modes]
        sent = communication(recipe, modes) if args.communication else [None for _ in modes]
        figures = []
        for subject, dtype, waited, counted in zip(subjects, dtypes, waits, sent):
            counts = {"waits": waited, "communication": counted}
            figures.append(figures_of(recipe, subject, dtype, rates[dtype]) | counts)
        compare(figures, [subject.seconds for subject in subjects], [subject.cpu for subject in subjects])
        tables = [table_of_time(figures), table_of_work(figures), table_of_ratios(figures)]
        if args.profile:
            times = ", ".join(f"{short(f)} {f['waits']['waits']}" for f in figures)
            updates = figures[0]["waits"]["updates"]
            tables.append(f"waits for the device in {updates} steps between log lines:\n{times}")
        report([recipe], args, process, "step", model_of(recipe, args), figures, tables)


def figures_of(recipe: Recipe, subject: timing.Subject, dtype: torch.dtype, rates: list[float]) -> dict[str, Any]:
    """All of a mode but comparisons, in SI units but for milliseconds."""
    args, seconds = subject.mode.args, subject.seconds
    images = args.batch_size * args.accum_iter
    work = plan.measure(recipe.name, args)
    speed = [images / value for value in seconds]
    arithmetic = (work.main + work.sub) * (1 + plan.BACKWARD)
    parameters = sum(p.numel() for p in subject.trainer.parameters)
    rate = statistics.median(rates)
    return {
        "name": subject.mode.name,
        "kind": subject.mode.kind,
        "reference": subject.mode.reference,
        "images_per_step": images,
        "images_per_second": spread(speed),
        "ms_per_step": spread([1000 * value for value in seconds]),
        "cpu_ms_per_step": spread([1000 * value for value in subject.cpu]),
        "ms": {part: spread([1000 * entry[part] for entry in subject.rounds]) for part in timing.PARTS},
        "peak_bytes": subject.peak,
        "parameters": parameters,
        "gradient_bytes": 4 * parameters,
        "multiply_adds": {"main": work.main / 2, "sub": work.sub / 2},
        "dtype": str(dtype).removeprefix("torch."),
        "flops_per_second": statistics.median(speed) * arithmetic,
        "matrix_flops_per_second": spread(rates),
        "share_of_matrix_rate": statistics.median(speed) * arithmetic / rate,
    }


def compare(figures: list[dict[str, Any]], seconds: list[list[float]], cpu: list[list[float]]) -> None:
    """Adds each mode's ratios: to the first mode of its trainer, and of the reference's time with its drop to its own;
    of the times round by round, since what is slow in one round is so for all. Time on the CPU is what remains of that
    on a machine that is busy with other work.
    """
    for mine, own, worked in zip(figures, seconds, cpu):
        base = next(i for i, other in enumerate(figures) if other["reference"] == mine["reference"])
        first = figures[base]
        mine["to_first"] = {
            "name": first["name"],
            "time": spread([a / b for a, b in zip(own, seconds[base])]),
            "cpu_time": spread([a / b for a, b in zip(worked, cpu[base])]),
            "multiply_adds": sum(mine["multiply_adds"].values()) / sum(first["multiply_adds"].values()),
            "peak_bytes": mine["peak_bytes"] / first["peak_bytes"],
        }
        against = [i for i, other in enumerate(figures) if other["reference"] and other["kind"] == mine["kind"]]
        if against and not mine["reference"]:
            mine["speed_over_reference"] = spread([b / a for a, b in zip(own, seconds[against[0]])])
            mine["cpu_speed_over_reference"] = spread([b / a for a, b in zip(worked, cpu[against[0]])])


def short(figure: dict[str, Any]) -> str:
    """The name of a mode as the tables have it."""
    return str(figure["name"]).replace("reference", "ref.")


def table_of_time(figures: list[dict[str, Any]]) -> str:
    """Where a step's time goes."""
    rows = [["", "images/s", "ms a step", *timing.PARTS]]
    for f in figures:
        digits = 1 if f["ms_per_step"]["median"] < 100 else 0
        parts = [f"{f['ms'][part]['median']:.{digits}f}" for part in timing.PARTS]
        rows.append([short(f), f"{f['images_per_second']['median']:.1f}", shown(f["ms_per_step"], digits), *parts])
    return aligned(rows)


def table_of_work(figures: list[dict[str, Any]]) -> str:
    """Arithmetic, memory and communication of a step."""
    rows = [["", "GMAC/image", "TFLOP/s", "of matrix", "peak MB", "MB sent", "all-reduces"]]
    for f in figures:
        sent = f["communication"]
        rows.append([
            short(f), f"{sum(f['multiply_adds'].values()) / 1e9:.3f}", f"{f['flops_per_second'] / 1e12:.3f}",
            f"{f['share_of_matrix_rate']:.0%}", f"{f['peak_bytes'] / 1e6:.1f}",
            *([f"{sent['bytes'] / 1e6:.1f}", f"{sent['all_reduces']}"] if sent else ["-", "-"]),
        ])  # fmt: skip
    f = figures[0]
    note = f"matrix product in {f['dtype']}: {f['matrix_flops_per_second']['median'] / 1e12:.3f} TFLOP/s"
    if f["communication"] is None:
        note += f"\none process sends nothing, several {f['gradient_bytes'] / 1e6:.1f} MB each"
    return aligned(rows) + f"\n{note}"


def table_of_ratios(figures: list[dict[str, Any]]) -> str:
    """What a mode costs beside the first of its trainer, and how much longer the reference takes with the same drop.
    "CPU" is the ratio before it in time that the process had the cores."""
    rows = [["", "beside", "time", "CPU", "GMAC", "memory"]]
    rows[0] += ["ref. / ours", "CPU"] if any("speed_over_reference" in f for f in figures) else []
    for f in figures:
        first = f["to_first"]
        row = [short(f), short(first), shown(first["time"], 2), f"{first['cpu_time']['median']:.2f}",
               f"{first['multiply_adds']:.2f}", f"{first['peak_bytes']:.3f}"]  # fmt: skip
        if "speed_over_reference" in f:
            row += [shown(f["speed_over_reference"], 2), f"{f['cpu_speed_over_reference']['median']:.2f}"]
        rows.append(row)
    return aligned(rows)


def data(recipes: Sequence[Recipe], flags: Sequence[str]) -> None:
    """Images a second that a core makes of JPEGs, for a row of each recipe."""
    with tempfile.TemporaryDirectory() as folder:
        args = {recipe.name: modes_of("data", recipe, flags, folder)[0].args for recipe in recipes}
        first = next(iter(args.values()))
        images = f"images of {first.data_path}"
        if first.data_path == folder:
            pipelines.make_data(first, min(64, first.images))
            images = f"JPEGs of {pipelines.WIDTH} x {pipelines.HEIGHT}"
        found = pipelines.measure_pipelines(args, first.images, first.rounds)
        figures: list[dict[str, Any]] = []
        for row in found:
            base = row.seconds[next(iter(row.seconds))]
            figures.append({
                "name": row.name,
                "augmentation": row.augmentation,
                "args": plain(vars(args[row.name])),
                "images_per_second": {p: spread([1 / s for s in seconds]) for p, seconds in row.seconds.items()},
                "ms_per_image": {p: spread([1000 * s for s in seconds]) for p, seconds in row.seconds.items()},
                "to_first": {p: spread([a / b for a, b in zip(base, s)]) for p, s in row.seconds.items()},
            })  # fmt: skip
    names = list(pipelines.PIPELINES)
    head = ["images/s on one core", "augmentation", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    lines = []
    for f in figures:
        speeds = [shown(f["images_per_second"][name], 1) for name in names]
        ratios = [f"{f['to_first'][name]['median']:.2f}" for name in names[1:]]
        lines.append([f["name"], f["augmentation"], *speeds, *ratios])
    by = "fast with simplejpeg" if simplejpeg is not None else "fast without simplejpeg"
    what = f"{images}, {first.images} a turn, {by}"
    report(recipes, first, Process(torch.device("cpu")), "data", what, figures, [aligned([head, *lines])])


def end_to_end(recipe: Recipe, flags: Sequence[str]) -> None:
    """A short real training."""
    with tempfile.TemporaryDirectory() as folder:
        modes = modes_of("end-to-end", recipe, flags, folder)
        args = modes[0].args
        if args.data_path == folder and args.data_set != DIGITS:
            pipelines.make_data(args, args.images)
        with started(args.device) as process:
            trainings = [pipelines.prepare_training(recipe, mode, process, args.images) for mode in modes]
            with pipelines.closed(trainings):
                for _ in range(args.rounds):
                    for training in trainings:
                        training.epoch()
            figures: list[dict[str, Any]] = []
            for training in trainings:
                figures.append({
                    "name": training.mode.name,
                    "kind": training.mode.kind,
                    "reference": training.mode.reference,
                    "loader_processes": training.loader.num_workers,
                    "images_per_second": spread([images / seconds for images, seconds, _ in training.rounds]),
                    "waiting": spread([waited / seconds for _, seconds, waited in training.rounds]),
                })  # fmt: skip
            rows = [["", "images/s", "waiting for data", "loader processes"]]
            for f in figures:
                speed, waiting = shown(f["images_per_second"], 1), f"{f['waiting']['median']:.1%}"
                rows.append([f["name"], speed, waiting, str(f["loader_processes"])])
            report([recipe], args, process, "end-to-end", model_of(recipe, args), figures, [aligned(rows)])


def save(recipe: Recipe, flags: Sequence[str]) -> None:
    """Checkpoints that are written while training goes on, in a temporary folder."""
    modes = modes_of("save", recipe, flags)
    args = modes[0].args
    with started(args.device) as process, tempfile.TemporaryDirectory() as folder:
        figures: list[dict[str, Any]] = []
        for mode in modes:
            subject = timing.prepare_subject(recipe, mode, process, args.warmup)
            stalls, writes, beside = timing.save_rounds(
                subject, Path(folder, "checkpoint.pth"), args.rounds, args.steps
            )
            figures.append({
                "name": mode.name,
                "kind": mode.kind,
                "parameters": sum(p.numel() for p in subject.trainer.bare.parameters()),
                "bytes": Path(folder, "checkpoint.pth").stat().st_size,
                "step": spread(subject.seconds),
                "stall": spread(stalls),
                "write": spread(writes),
                "step_beside": spread(beside),
            })  # fmt: skip
        rows = [["", "parameters", "file", "s a step", "s a step waits", "s a write", "s a step beside it"]]
        for f in figures:
            times = [shown(f[name], 2) for name in ("step", "stall", "write", "step_beside")]
            rows.append([f["name"], f"{f['parameters'] / 1e6:.1f}M", f"{f['bytes'] / 1e6:,.1f} MB", *times])
        report([recipe], args, process, "save", model_of(recipe, args), figures, [aligned(rows)])


def growth(recipe: Recipe, flags: Sequence[str]) -> None:
    """Time per image over four things that grow."""
    from scripts.draw import draw
    from scripts.growth import measured, sweeps_of, table_of

    args, sweeps = sweeps_of(recipe, flags, modes_of)
    with started(args.device) as process:
        figures = [measured(recipe, sweep, process) for sweep in sweeps]
    try:
        if args.plot is not None:
            on = timing.machine(process.device)
            where = on["gpu"] or f"{on['cpu']}, {threads_of(on)} a process"
            dtype = figures[0]["points"][0]["figures"][0]["dtype"]
            turns = f"medians and quartiles of {args.rounds} turns" if args.rounds > 1 else "one turn"
            draw(Path(args.plot), figures, f"{model_of(recipe, args)}, {dtype}; {where}; {turns}")
    finally:
        tables = list(map(table_of, figures))
        report([recipe], args, process, "growth", model_of(recipe, args), figures, tables)


def start(recipes: Sequence[Recipe], flags: Sequence[str]) -> None:
    """Seconds that a user waits for each recipe's entry point."""
    args = modes_of("start", recipes[0], flags)[0].args
    rows = {recipe.name: args.variant or ROWS[recipe.name] for recipe in recipes}
    found = measure_starts(rows, flags_of_trainer("start", flags), args.rounds)
    figures: list[dict[str, Any]] = [
        {"name": entry.recipe, "row": entry.row, "seconds": {look: spread(entry.seconds[look]) for look in LOOKS}}
        for entry in found
    ]
    what = f"seconds from the command, first step of {BATCH} images on JPEGs"
    head = ["", "--help", "first step on the digits", "of a row", ""]
    lines = [[f["name"], *(shown(f["seconds"][look], 2) for look in LOOKS), f["row"]] for f in figures]
    report(recipes, args, Process(torch.device("cpu")), "start", what, figures, [aligned([head, *lines])])


def model_of(recipe: Recipe, args: argparse.Namespace) -> str:
    """What is trained, in words."""
    return f"{recipe.name} {args.model}, {args.input_size} px, batch {args.batch_size}"


def report(
    recipes: Sequence[Recipe],
    args: argparse.Namespace,
    process: Process,
    command: str,
    what: str,
    figures: list[dict[str, Any]],
    tables: Sequence[str],
) -> None:
    """Writes the JSON file and prints the tables, and on what was measured; either, where the other fails.

    Raises:
        ValueError: the file cannot be written.
    """
    where = timing.machine(process.device)
    entry = {
        "benchmark": command,
        "recipe": ", ".join(recipe.name for recipe in recipes),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "machine": where,
        "rounds": args.rounds,
        "steps": args.steps,
        **settings(args, process),
        "figures": figures,
    }
    on = where["gpu"] or f"{where['cores']} cores of {where['cpu']}, {threads_of(where)}"
    try:
        if args.json is not None:
            write_whole(Path(args.json), json.dumps(entry, indent=2).encode() + b"\n")
    except OSError as error:
        raise ValueError(f"--json {args.json}: not writable ({error.strerror or error})") from error
    finally:
        print(f"{what}; {on}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", *tables, sep="\n\n")


def threads_of(machine: dict[str, Any]) -> str:
    """How many compute threads there were, in words."""
    return f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
