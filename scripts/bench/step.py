"""What an optimizer step costs – time by phase, memory, arithmetic – and a checkpoint that is written beside it.

The steps are the trainer's, `Trainer.train_step` and `Trainer.update`, on random images.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from common.checkpoint.manager import BackgroundWriter, copy_to_cpu, save_checkpoint
from common.checkpoint.state import trainer_state
from common.distributed import Process, init_distributed
from common.recipe import Recipe
from common.trainer import PHASES, Trainer
from scripts.bench import report
from scripts.bench.args import Mode
from scripts.bench.cases import BenchCase, build_case, prepare_modes, synchronize
from scripts.bench.report import summarize, summarize_ratios
from scripts.launch import cost


def measure_step(recipe: Recipe, flags: Sequence[str]) -> None:
    """Run `benchmark.py step`."""
    modes = prepare_modes("step", recipe, flags)
    args = modes[0].args
    with init_distributed(args.device) as process:
        cases = [build_case_with_memory(recipe, mode, process) for mode in modes]
        dtypes = [case.trainer.autocast or torch.float32 for case in cases]
        matrix_rates: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
        for number in range(args.rounds):
            first = number % len(cases)  # the first case of a round runs with cold caches
            for case in cases[first:] + cases[:first]:
                case.run_round(args.steps)
            for dtype, rates in matrix_rates.items():
                rates.append(measure_matrix_rate(process.device, dtype))
        results = [step_results(recipe, case, dtype, matrix_rates[dtype]) for case, dtype in zip(cases, dtypes)]
        add_ratios(results, cases)
        tables = [report.phase_table(results), report.work_table(results), report.ratio_table(results)]
        report.write_report("step", [recipe], args, process, results, tables)


def step_results(recipe: Recipe, case: BenchCase, dtype: torch.dtype, matrix_rates: list[float]) -> dict[str, Any]:
    """Compute all results of a mode but the comparisons, in SI units and milliseconds."""
    args = case.mode.args
    images = args.batch_size * args.accum_iter
    work = cost.measure(recipe.name, args)
    speeds = [images / seconds for seconds in case.seconds]
    flops_per_second = statistics.median(speeds) * (work.main + work.sub) * (1 + cost.BACKWARD)
    return {
        "name": case.mode.name,
        "kind": case.mode.kind,
        "reference": case.mode.reference,
        "images_per_step": images,
        "images_per_second": summarize(speeds),
        "ms_per_step": summarize([1000 * seconds for seconds in case.seconds]),
        "cpu_ms_per_step": summarize([1000 * seconds for seconds in case.cpu_seconds]),
        "ms": {phase: summarize([1000 * times.phases[phase] for times in case.rounds]) for phase in PHASES},
        "peak_bytes": case.peak_bytes,
        "parameters": sum(p.numel() for p in case.trainer.parameters),
        "multiply_adds": {"main": work.main / 2, "sub": work.sub / 2},
        "dtype": str(dtype).removeprefix("torch."),
        "flops_per_second": flops_per_second,
        "matrix_flops_per_second": summarize(matrix_rates),
        "share_of_matrix_rate": flops_per_second / statistics.median(matrix_rates),
    }


def add_ratios(results: list[dict[str, Any]], cases: list[BenchCase]) -> None:
    """Add each mode's ratios: to the first mode of its trainer, and of the reference's time with the same drop to
    ours. On a busy machine the ratio of CPU times is the one to trust."""
    for result, case in zip(results, cases):
        first = next(i for i, other in enumerate(results) if other["reference"] == result["reference"])
        result["to_first"] = {
            "name": results[first]["name"],
            "time": summarize_ratios(case.seconds, cases[first].seconds),
            "cpu_time": summarize_ratios(case.cpu_seconds, cases[first].cpu_seconds),
            "multiply_adds": sum(result["multiply_adds"].values()) / sum(results[first]["multiply_adds"].values()),
            "peak_bytes": result["peak_bytes"] / results[first]["peak_bytes"],
        }
        for other in cases:
            if other.mode.reference and not case.mode.reference and other.mode.kind == case.mode.kind:
                result["speed_over_reference"] = summarize_ratios(other.seconds, case.seconds)
                result["cpu_speed_over_reference"] = summarize_ratios(other.cpu_seconds, case.cpu_seconds)


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of one large square matrix product."""
    side, repeats = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return 2 * side**3 * repeats / (time.perf_counter() - start)


def build_case_with_memory(recipe: Recipe, mode: Mode, process: Process) -> BenchCase:
    """Build a mode and measure the memory of a step."""
    before = torch.cuda.memory_allocated(process.device) if process.device.type == "cuda" else 0
    case = build_case(recipe, mode, process, mode.args.warmup)
    case.peak_bytes = measure_peak_memory(case, before)
    return case


def measure_peak_memory(case: BenchCase, before: int) -> int:
    """Measure the bytes of all tensors of a mode at the fullest moment of a step.

    On a GPU `max_memory_allocated`, less the bytes `before` the mode was built. The CPU's allocator keeps no such
    count: there it is the state's bytes and the highest sum of the profiler's events of tensors allocated and freed.
    Workspaces that oneDNN takes from the system are in neither.
    """
    device = case.trainer.process.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        case.step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = state_nbytes(case.trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return held + peak


def state_nbytes(trainer: Trainer) -> int:
    """Sum up the bytes of weights, buffers, optimizer state and averaged weights, each storage once."""
    modules: list[nn.Module] = [trainer.raw_model] + ([trainer.ema] if trainer.ema is not None else [])
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_save(recipe: Recipe, flags: Sequence[str]) -> None:
    """Run `benchmark.py save`: writes checkpoints into a temporary folder while training goes on."""
    modes = prepare_modes("save", recipe, flags)
    args = modes[0].args
    with init_distributed(args.device) as process, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pth")
        results: list[dict[str, Any]] = []
        rows = [["", "parameters", "file", "s a step", "s a step waits", "s a write", "s a step beside it"]]
        for mode in modes:
            case = build_case(recipe, mode, process, args.warmup)
            times = time_saves(case, path, args.rounds, args.steps)
            parameters = sum(p.numel() for p in case.trainer.raw_model.parameters())
            size = path.stat().st_size
            seconds = {name: summarize(values) for name, values in times.items()}
            results.append({"name": mode.name, "kind": mode.kind, "parameters": parameters, "bytes": size, **seconds})
            spreads = [report.format_spread(value, 2) for value in seconds.values()]
            rows.append([mode.name, f"{parameters / 1e6:.1f}M", f"{size / 1e6:,.1f} MB", *spreads])
        report.write_report("save", [recipe], args, process, results, [report.align_columns(rows)])


def time_saves(case: BenchCase, path: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """Save in the background while training goes on → seconds of each "step" without a save, of each "stall" of
    training by a save, of each "write", and of each "step_beside" a write."""
    stalls, writes, steps_beside = [], [], []
    writer = BackgroundWriter()
    write_ends: list[float] = []

    def write(state: dict[str, Any]) -> None:
        save_checkpoint(path, state, keep=1)
        write_ends.append(time.perf_counter())

    device = case.trainer.process.device
    for _ in range(rounds):
        case.run_round(steps)
        synchronize(device)
        save_start = time.perf_counter()
        writer.start(partial(write, copy_to_cpu(trainer_state(case.trainer))))
        stalls.append(time.perf_counter() - save_start)
        while writer.thread is not None and writer.thread.is_alive():
            start = time.perf_counter()
            case.step()
            synchronize(device)
            steps_beside.append(time.perf_counter() - start)
        writer.wait()
        writes.append(write_ends[-1] - save_start)
    return {"step": case.seconds, "stall": stalls, "write": writes, "step_beside": steps_beside}
