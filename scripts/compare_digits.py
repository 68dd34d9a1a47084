"""Plain training against AugSub on the embedded digits: mean and standard deviation over seeds.

    python scripts/compare_digits.py deit/main.py --augsub none masking --seeds 5 --jobs 2

Runs the entry point once for each drop and seed, `--jobs` of them side by side with an equal share of the cores, and
reads the figures from their log.txt. Flags that this script does not know go to the entry point. A second call runs
only what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from common.args import KINDS, parse  # noqa: E402
from common.flag_types import nonempty_path, positive_int  # noqa: E402
from common.parser import Parser, normalize_flag  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import cli_errors  # noqa: E402
from scripts.launch.registry import ENTRY_POINTS, recipe_of  # noqa: E402

Result = tuple[float, float, float]  # training loss and test accuracy of the last epoch, seconds of the run


def main() -> None:
    """Do the missing runs and print the table."""
    protect_output()
    parser = Parser(description=__doc__, prog="compare_digits.py", raw_description=True)
    parser.add_argument("entry", choices=list(ENTRY_POINTS.values()))
    parser.add_argument("--augsub", nargs="+", choices=KINDS, default=["none", "masking"], help="drops")
    parser.add_argument("--seeds", type=positive_int, default=5, help="runs of each drop")
    parser.add_argument("--jobs", type=positive_int, default=1, help="runs side by side")
    parser.add_argument("--output-dir", type=nonempty_path, default="output/compare", help="folder of the runs")
    args, flags = parser.parse_known_args()
    with cli_errors(parser):
        if any(normalize_flag(word).partition("=")[0] == "--seed" for word in flags):
            raise ValueError("--seed: each run has its own; --seeds sets how many")
        parse(recipe_of(args.entry), flags)
        print_table(args, flags)


def print_table(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Do the missing runs, `args.jobs` at a time, and print a line for each drop."""
    recipe = Path(args.entry).parent.name
    folder, threads = Path(args.output_dir) / recipe, max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs: dict[str, list[Future[Result]]] = {
            kind: [
                pool.submit(measure_run, args.entry, kind, seed, folder, threads, flags) for seed in range(args.seeds)
            ]
            for kind in args.augsub
        }
        try:
            results = {kind: [run.result() for run in kind_runs] for kind, kind_runs in runs.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the others are not started
            raise
    print(f"| {recipe} | final training loss, main model | test accuracy, % | seconds | n |\n|---|---|---|---|---|")
    for kind, kind_results in results.items():
        losses, accuracies, seconds = zip(*kind_results)
        columns = [mean_and_deviation(losses, 4), mean_and_deviation(accuracies, 2), mean_and_deviation(seconds, 0)]
        print("|", " | ".join([kind, *columns, str(len(kind_results))]), "|")


def measure_run(entry: str, kind: str, seed: int, parent: Path, threads: int, flags: Sequence[str]) -> Result:
    """Train with a drop and a seed, or read the result of an earlier call.

    Raises:
        SystemExit: the run failed; with what it printed to standard error.
    """
    folder = parent / f"{kind}-{seed}"
    result_file = folder / "seconds.json"
    settings = [entry, *flags]
    if not result_file.exists() or json.loads(result_file.read_text())["settings"] != settings:
        shutil.rmtree(folder, ignore_errors=True)  # resumed, an interrupted run would be timed in part only
        start = time.time()
        command = [sys.executable, str(ROOT / entry), "--augsub", kind, "--seed", str(seed)]
        command += ["--output-dir", str(folder), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stderr}")
        result_file.write_text(json.dumps({"seconds": time.time() - start, "settings": settings}))
    (log,) = folder.rglob("log.txt")  # the Swin recipe makes subfolders in the run's folder
    last_epoch = json.loads(log.read_text().splitlines()[-1])
    return last_epoch["train_loss"], last_epoch["test_acc1"], json.loads(result_file.read_text())["seconds"]


def mean_and_deviation(values: tuple[float, ...], digits: int) -> str:
    """Mean and standard deviation of a sample."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
