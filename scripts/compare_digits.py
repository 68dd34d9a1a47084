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
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("entry", help="entry point, e.g. deit/main.py")
    parser.add_argument("--augsub", nargs="+", default=["none", "masking"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("output/compare"))
    args, flags = parser.parse_known_args()
    recipe = Path(args.entry).parent.name
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = {
            kind: [
                pool.submit(measure, args.entry, kind, seed, args.output_dir / recipe, threads, flags)
                for seed in range(args.seeds)
            ]
            for kind in args.augsub
        }
    print(f"| {recipe} | final training loss, main model | test accuracy, % | seconds | n |\n|---|---|---|---|---|")
    for kind, runs in results.items():
        losses, accuracies, seconds = zip(*(run.result() for run in runs))
        columns = [spread(losses, 4), spread(accuracies, 2), spread(seconds, 0), str(len(runs))]
        print("|", " | ".join([kind, *columns]), "|", flush=True)


def measure(
    entry: str, kind: str, seed: int, parent: Path, threads: int, flags: list[str]
) -> tuple[float, float, float]:
    """One run → the last epoch's training loss and test accuracy, and the seconds it took."""
    folder = parent / f"{kind}-{seed}"
    took = folder / "seconds.json"
    settings = [entry, *flags]
    if not took.exists() or json.loads(took.read_text())["settings"] != settings:
        shutil.rmtree(folder, ignore_errors=True)  # a run that was cut off would be timed in part
        start = time.time()
        command = [
            sys.executable,
            str(ROOT / entry),
            "--augsub",
            kind,
            "--seed",
            str(seed),
            "--output-dir",
            str(folder),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        took.write_text(json.dumps({"seconds": time.time() - start, "settings": settings}))
    (log,) = folder.rglob("log.txt")  # the Swin recipe makes folders of its own in it
    last = json.loads(log.read_text().splitlines()[-1])
    return last["train_loss"], last["test_acc1"], json.loads(took.read_text())["seconds"]


def spread(values: tuple[float, ...], digits: int) -> str:
    """Mean and standard deviation of a sample."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
