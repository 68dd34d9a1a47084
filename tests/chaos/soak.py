"""Trains, kills, restarts, and compares with undisturbed runs.

    python -m tests.chaos.soak --minutes 30
    python -m tests.chaos.soak --kills 10 --recipes deit

Each round trains a recipe's small model on the embedded digits and disturbs it at random moments: all its processes are
killed (kill -9), or one DataLoader worker, or one of two ranks under `torchrun --max-restarts`, or it gets SIGTERM. The
same command is started again each time. At the end weights, averaged weights, optimizer, log.txt and TensorBoard's
scalars must equal those of an undisturbed run, bit for bit. Exits with status 1 where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.parser import Parser
from common.run_dir import SETTINGS, duration
from scripts.launch.planner import ROOT
from scripts.launch.registry import ENTRY_POINTS

FLAGS = ["--augsub", "masking", "--epochs", "3", "--warmup-epochs", "0", "--log-interval", "4", "--save-every", "3",
         "--drop-path", "0.1", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--amp", "off"]  # fmt: skip
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000"]
STOP_TIMEOUT_S = 60
ALL_KILLED, WORKER_KILLED, RANK_KILLED, SIGTERM_SENT = DISTURBANCES = (
    "all processes killed", "worker killed", "one of two ranks killed", "SIGTERM",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """What is trained, on how many processes, with how many DataLoader workers each."""

    recipe: str
    processes: int
    workers: int

    def command(self, folder: Path) -> list[str]:
        launcher = [*LAUNCHER, "--nproc-per-node", str(self.processes)] if self.processes > 1 else []
        return [sys.executable, *launcher, str(ROOT / ENTRY_POINTS[self.recipe]), *FLAGS,
                "--num-workers", str(self.workers), "--output-dir", str(folder)]  # fmt: skip

    def start(self, folder: Path) -> psutil.Popen:
        """Start the command; its output is appended to a file beside its folder."""
        with open(console_file(folder), "ab") as console:
            return psutil.Popen(self.command(folder), cwd=folder.parent, stdout=console, stderr=console,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip

    def find_trainers(self, process: psutil.Popen) -> list[psutil.Process]:
        """The processes that train, of those that are still alive."""
        if self.processes == 1:
            return [process]
        return [child for child in list_children(process) if ENTRY_POINTS[self.recipe] in read_cmdline(child)]


@dataclass(frozen=True)
class Baseline:
    """An undisturbed run, with its seconds from start to first step and from there to its end."""

    folder: Path
    startup_s: float
    training_s: float


def main() -> None:
    """Print a line for each disturbance and each comparison, then the totals."""
    parser = Parser(description=__doc__, prog="soak.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--minutes", type=float, default=None, help="how long; the last run is finished and compared")
    add("--kills", type=int, default=None, help="or how many disturbances")
    add("--recipes", default=",".join(ENTRY_POINTS), help="separated by commas")
    add("--seed", type=int, default=0, help="of the random moments")
    add("--folder", type=Path, default=None, help="to work in; default: a temporary one, kept if runs differ")
    args = parser.parse_args()
    recipes = args.recipes.split(",")
    unknown = [name for name in recipes if name not in ENTRY_POINTS]
    if unknown:
        parser.error(f"--recipes {unknown[0]}: unknown recipe; choose from {', '.join(ENTRY_POINTS)}")
    if args.minutes is None and args.kills is None:
        parser.error("--minutes or --kills: one of them is required")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(folder, random.Random(args.seed))
    end = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
    try:
        while time.monotonic() < end and soak.disturbances < (args.kills or float("inf")):
            soak.run_round(recipes)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(soak.summary())
    if soak.mismatches:
        print(f"the runs are kept in {folder}")
    elif args.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if soak.mismatches else 0)


class Soak:
    """Disturbed runs and their totals.

    Args:
        folder: of the runs.
        rng: draws what is run, and when it is disturbed and how.
    """

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.start_time = time.monotonic()
        self.baselines: dict[RunConfig, Baseline] = {}
        self.counts: Counter[str] = Counter()
        self.runs = self.starts = self.mismatches = 0

    @property
    def disturbances(self) -> int:
        return sum(self.counts.values())

    def run_round(self, recipes: list[str]) -> None:
        """Train one run to its end under disturbances, and compare it with its baseline."""
        from tests.compare_runs import diff_runs

        config = RunConfig(self.rng.choice(recipes), self.rng.choice((1, 1, 2)), self.rng.choice((0, 1)))
        if config not in self.baselines:
            self.baselines[config] = self.run_baseline(config)
        folder = self.folder / f"run-{self.runs}"
        count = self.run_disturbed(config, folder)
        self.runs += 1
        diff = diff_runs(self.baselines[config].folder, folder)
        self.mismatches += bool(diff)
        verdict = f"MISMATCH: {', '.join(diff[:5])}" if diff else "same bits"
        self.print(f"{config.recipe}, {config.processes} processes with {config.workers} workers each: run {self.runs} "
                   f"ended after {count} disturbances: {verdict}")  # fmt: skip

    def print(self, line: str) -> None:
        print(f"{duration(time.monotonic() - self.start_time):>8}  {line}", flush=True)

    def run_baseline(self, config: RunConfig) -> Baseline:
        folder = self.folder / f"baseline-{config.recipe}-{config.processes}-{config.workers}"
        start_time = time.monotonic()
        process = config.start(folder)
        while not any(folder.rglob(SETTINGS)) and process.poll() is None:
            time.sleep(0.1)
        startup_s = time.monotonic() - start_time
        if process.wait():
            raise RuntimeError(f"an undisturbed run failed: {console_file(folder)}")
        return Baseline(folder, startup_s, time.monotonic() - start_time - startup_s)

    def draw_delay(self, config: RunConfig) -> float:
        """Seconds until the next disturbance: one in five during start-up, else in the next third of training."""
        baseline = self.baselines[config]
        if self.rng.random() < 0.2:
            return self.rng.uniform(0, baseline.startup_s)
        return baseline.startup_s + self.rng.uniform(0, baseline.training_s / 3)

    def run_disturbed(self, config: RunConfig, folder: Path) -> int:
        """Start a run, disturbs it and start it again, until it has ended → the number of disturbances."""
        count = 0
        while True:
            process = config.start(folder)
            self.starts += 1
            count_at_start = count
            while process.poll() is None:
                try:
                    process.wait(None if is_finished(folder) else self.draw_delay(config))
                except psutil.TimeoutExpired:
                    disturbance = self.disturb(config, process)
                    if disturbance is not None:
                        count += 1
                        self.counts[disturbance] += 1
                        self.print(f"{disturbance}; newest checkpoint: {describe_progress(folder)}")
            if process.returncode == 0 and is_finished(folder):
                return count
            if process.returncode and count == count_at_start:
                raise RuntimeError(f"an undisturbed start failed: {console_file(folder)}")

    def disturb(self, config: RunConfig, process: psutil.Popen) -> str | None:
        """Disturb a run once → how, or None where it had ended."""
        disturbance = self.rng.choice(DISTURBANCES)
        trainers = config.find_trainers(process)
        workers = [child for trainer in trainers for child in list_children(trainer)
                   if "resource_tracker" not in read_cmdline(child)]  # fmt: skip
        if disturbance == WORKER_KILLED and workers:
            return disturbance if kill([self.rng.choice(workers)]) else None
        if disturbance == RANK_KILLED and config.processes == len(trainers) == 2:
            return disturbance if kill([max(trainers, key=lambda trainer: trainer.pid)]) else None
        if disturbance == SIGTERM_SENT:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except psutil.TimeoutExpired:
                return None
            return disturbance
        kill([process, *list_children(process, recursive=True)])  # torchrun starts each rank in a session of its own
        process.wait()
        return ALL_KILLED

    def summary(self) -> str:
        counts = ", ".join(f"{count} x {name}" for name, count in sorted(self.counts.items()))
        return (f"{duration(time.monotonic() - self.start_time)}: {self.disturbances} disturbances ({counts}), "
                f"{self.starts} starts, {self.runs} runs compared, {self.mismatches} mismatches")  # fmt: skip


def console_file(folder: Path) -> Path:
    """Where a run's standard output and error go."""
    return folder.with_name(f"{folder.name}-console.txt")


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """A run's newest checkpoint; None before the first one."""
    from common.checkpoint.io import load
    from tests.compare_runs import find_checkpoint

    path = find_checkpoint(folder)
    return load(path) if path is not None else None


def describe_progress(folder: Path) -> str:
    """How far a run's newest checkpoint is."""
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        return "none"
    position = checkpoint["position"]
    return f"epoch {checkpoint['epoch'] + 2}, step {position['update'] if position is not None else 0}"


def is_finished(folder: Path) -> bool:
    """Whether a run has trained all its epochs."""
    checkpoint = read_checkpoint(folder)
    return (checkpoint is not None and checkpoint["position"] is None
            and checkpoint["epoch"] + 1 == checkpoint["args"]["epochs"])  # fmt: skip


def list_children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    """Processes that this one has started; none where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=recursive)
    return []


def read_cmdline(process: psutil.Process) -> str:
    """A process's command line; "" where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def kill(processes: Sequence[psutil.Process]) -> bool:
    """Send SIGKILL → whether any of the processes was still alive."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            count += 1
    return count > 0


if __name__ == "__main__":
    main()
