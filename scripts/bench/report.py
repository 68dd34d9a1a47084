"""What a command prints and writes: the spread of samples, tables of text, and the JSON file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.distributed import Process
from common.recipe import Recipe
from common.run_report import run_metadata
from scripts.bench.args import BenchArgs, count_cores
from scripts.cli_errors import write_output


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Compute the median, the quartiles and the size of a sample."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartile_1": low, "quartile_3": high, "count": len(values)}


def summarize_ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Summarize the ratios of two samples, round by round: what slows down one round slows down both."""
    return summarize([value / other for value, other in zip(values, base)])


def format_spread(summary: dict[str, float], digits: int = 0) -> str:
    """Format a median ± half the interquartile range, which a single value does not have."""
    half = (summary["quartile_3"] - summary["quartile_1"]) / 2
    return f"{summary['median']:.{digits}f}" + (f" ± {half:.{digits}f}" if summary["count"] > 1 else "")


def align_columns(rows: list[list[str]]) -> str:
    """Format a table of text, its first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    padded = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def strip_common_words(names: Sequence[str]) -> list[str]:
    """Remove the words, separated by `_`, that all names begin and end with."""
    split = [name.split("_") for name in names]
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        while len(split) > 1 and all(len(words) > 1 for words in split) and len({words[end] for words in split}) == 1:
            split = [words[rest] for words in split]
    return ["_".join(words) for words in split]


def short_name(result: dict[str, Any]) -> str:
    """Abbreviate the name of a result's mode for the tables."""
    return str(result["name"]).replace("reference", "ref.")


def phase_table(results: list[dict[str, Any]]) -> str:
    """Format the speed of each mode, and its time by phase."""
    phases = list(results[0]["ms"])
    rows = [["", "images/s", "ms a step", *phases]]
    for result in results:
        digits = 1 if result["ms_per_step"]["median"] < 100 else 0
        times = [f"{result['ms'][phase]['median']:.{digits}f}" for phase in phases]
        speed = f"{result['images_per_second']['median']:.1f}"
        rows.append([short_name(result), speed, format_spread(result["ms_per_step"], digits), *times])
    return align_columns(rows)


def work_table(results: list[dict[str, Any]]) -> str:
    """Format the arithmetic and the memory of a step."""
    rows = [["", "GMAC/image", "TFLOP/s", "of matrix", "peak MB"]]
    for result in results:
        gmac = f"{sum(result['multiply_adds'].values()) / 1e9:.3f}"
        rate, share = f"{result['flops_per_second'] / 1e12:.3f}", f"{result['share_of_matrix_rate']:.0%}"
        rows.append([short_name(result), gmac, rate, share, f"{result['peak_bytes'] / 1e6:.1f}"])
    first = results[0]
    rate = f"{first['matrix_flops_per_second']['median'] / 1e12:.3f}"
    return align_columns(rows) + f"\nmatrix product in {first['dtype']}: {rate} TFLOP/s"


def ratio_table(results: list[dict[str, Any]]) -> str:
    """Format the cost of each mode over the first of its trainer, and the reference's time over ours with the same
    drop. "CPU" is the ratio before it in CPU time."""
    rows = [["", "beside", "time", "CPU", "GMAC", "memory"]]
    if any("speed_over_reference" in result for result in results):
        rows[0] += ["ref. / ours", "CPU"]
    for result in results:
        first = result["to_first"]
        row = [short_name(result), short_name(first), format_spread(first["time"], 2)]
        row += [f"{first['cpu_time']['median']:.2f}", f"{first['multiply_adds']:.2f}", f"{first['peak_bytes']:.3f}"]
        if "speed_over_reference" in result:
            row.append(format_spread(result["speed_over_reference"], 2))
            row.append(f"{result['cpu_speed_over_reference']['median']:.2f}")
        rows.append(row)
    return align_columns(rows)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Collect the names of processor and GPU, and the number of cores and threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "",
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def describe_model(recipe: Recipe, args: BenchArgs) -> str:
    """Describe what is trained, in words."""
    return f"{recipe.name} {args.model}, {args.input_size} px, batch {args.batch_size}"


def format_threads(machine: dict[str, Any]) -> str:
    """Format the number of compute threads."""
    return f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def write_report(
    command: str,
    recipes: Sequence[Recipe],
    args: BenchArgs,
    process: Process,
    results: list[dict[str, Any]],
    tables: Sequence[str],
    subject: str = "",
) -> None:
    """Write the JSON file and print the tables under what was measured, and where; either, if the other fails.

    Args:
        subject: what was measured, if not the model.

    Raises:
        ValueError: the file cannot be written.
    """
    machine = describe_machine(process.device)
    entry = {
        "benchmark": command,
        "recipe": ", ".join(recipe.name for recipe in recipes),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "machine": machine,
        "rounds": args.rounds,
        "steps": args.steps,
        **run_metadata(args, process),
        "figures": results,
    }
    place = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}, {format_threads(machine)}"
    try:
        if args.json is not None:
            write_output(Path(args.json), json.dumps(entry, indent=2).encode() + b"\n")
    except OSError as error:
        raise ValueError(f"--json {args.json}: not writable ({error.strerror or error})") from error
    finally:
        subject = subject or describe_model(recipes[0], args)
        print(f"{subject}; {place}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", *tables, sep="\n\n")
