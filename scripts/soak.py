"""Trains, kills, relaunches, and compares with runs that were left alone.

    python scripts/soak.py --minutes 30
    python scripts/soak.py --kills 10 --recipes deit

Each round takes a recipe's small model on the embedded digits through a training that is cut off at random moments:
all its processes are killed (kill -9), or one that loads data, or one of two under `torchrun --max-restarts`, or it is
asked to stop (SIGTERM). The same command goes on each time. In the end weights, averaged weights, optimizer, log.txt
and curves have to be those of an undisturbed run, bit for bit. Exits with status 1 where they are not.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from common.args import Parser  # noqa: E402
from common.folder import BEST, CURVES, LAST, LOG, SETTINGS, duration, entries  # noqa: E402
from scripts.table import ENTRIES  # noqa: E402

FLAGS = ["--augsub", "masking", "--epochs", "3", "--warmup-epochs", "0", "--log-interval", "4", "--save-every", "3",
         "--drop-path", "0.1", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--amp", "off"]  # fmt: skip
MOST_RESTARTS = 1000  # of torchrun's
KINDS = ("all killed", "loader killed", "one of two killed", "asked to stop")


@dataclass(frozen=True)
class Setting:
    """A kind of run."""

    recipe: str
    processes: int
    workers: int  # that load data, of each process

    def command(self, folder: Path) -> list[str]:
        """What a user would type."""
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes),
                         "--max-restarts", str(MOST_RESTARTS)]  # fmt: skip
        return [*launcher, str(ROOT / ENTRIES[self.recipe]), *FLAGS, "--num-workers", str(self.workers),
                "--output-dir", str(folder)]  # fmt: skip

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Starts it, with what it says at the end of said.txt beside its folder."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(said_in(folder), "ab") as said:
            return subprocess.Popen(self.command(folder), cwd=folder.parent, stdout=said, stderr=said, env=environment,
                                    start_new_session=True)  # fmt: skip


def said_in(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-said.txt")


def main() -> None:
    """Prints a line for each disturbance and each comparison, and the sums."""
    parser = Parser(description=__doc__, prog="soak.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--minutes", type=float, default=None, help="how long; the last run is finished and compared")
    add("--kills", type=int, default=None, help="or how many disturbances")
    add("--recipes", default=",".join(ENTRIES), help="with commas between them")
    add("--seed", type=int, default=0, help="of the moments")
    add("--folder", type=Path, default=None, help="to work in; by default a temporary one, removed if all is well")
    args = parser.parse_args()
    recipes = args.recipes.split(",")
    unknown = [name for name in recipes if name not in ENTRIES]
    if unknown:
        parser.error(f"--recipes {unknown[0]}: unknown, there are {', '.join(ENTRIES)}")
    if args.minutes is None and args.kills is None:
        parser.error("--minutes or --kills says how long")
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder.absolute(), random.Random(args.seed))
        end = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
        try:
            while time.monotonic() < end and soak.disturbances < (args.kills or float("inf")):
                soak.round(recipes)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(soak.summary())
        if soak.mismatches and args.folder is None:
            kept = folder.with_name(f"{folder.name}-kept")
            os.rename(folder, kept)
            folder.mkdir()  # for the temporary folder's own end
            print(f"the runs are kept in {kept}")
    sys.exit(1 if soak.mismatches else 0)


@dataclass(frozen=True)
class Undisturbed:
    """A run to compare with, and the seconds from its start to its first step, and from there to its end."""

    folder: Path
    start: float
    training: float


class Soak:
    """Runs, and what has come of them.

    Args:
        folder: for the runs.
        draw: where the moments come from.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw = folder, draw
        self.began = time.monotonic()
        self.undisturbed: dict[Setting, Undisturbed] = {}
        self.counts: Counter[str] = Counter()
        self.runs = self.starts = self.mismatches = 0

    @property
    def disturbances(self) -> int:
        return sum(self.counts.values())

    def round(self, recipes: list[str]) -> None:
        """One disturbed run from begin to end, and its comparison."""
        setting = Setting(self.draw.choice(recipes), self.draw.choice((1, 1, 2)), self.draw.choice((0, 1)))
        if setting not in self.undisturbed:
            self.undisturbed[setting] = self.leave_alone(setting)
        folder = self.folder / f"run-{self.runs}"
        disturbed = self.finish(setting, folder)
        self.runs += 1
        found = compare(self.undisturbed[setting].folder, folder)
        self.mismatches += bool(found)
        verdict = f"MISMATCH: {', '.join(found[:5])}" if found else "same bits"
        self.say(f"{setting.recipe}, {setting.processes} x ({setting.workers} loading), run {self.runs} ended after "
                 f"{disturbed} disturbances: {verdict}")  # fmt: skip

    def say(self, line: str) -> None:
        print(f"{duration(time.monotonic() - self.began):>8}  {line}", flush=True)

    def leave_alone(self, setting: Setting) -> Undisturbed:
        """A run that nothing disturbs."""
        folder = self.folder / f"undisturbed-{setting.recipe}-{setting.processes}-{setting.workers}"
        began = time.monotonic()
        process = setting.start(folder)
        while not any(folder.rglob(SETTINGS)) and process.poll() is None:
            time.sleep(0.1)
        start = time.monotonic() - began
        if process.wait():
            raise RuntimeError(f"an undisturbed run failed: {said_in(folder)}")
        return Undisturbed(folder, start, time.monotonic() - began - start)

    def moment(self, setting: Setting) -> float:
        """Seconds to leave a start alone: until it is somewhere in its next third, or still on its way to training."""
        known = self.undisturbed[setting]
        if self.draw.random() < 0.2:
            return self.draw.uniform(0, known.start)
        return known.start + self.draw.uniform(0, known.training / 3)

    def finish(self, setting: Setting, folder: Path) -> int:
        """Starts a run again and again, and disturbs it, until it has come to its end → how many times it did."""
        count = 0
        while True:
            process = setting.start(folder)
            self.starts += 1
            before = count
            while process.poll() is None:
                try:
                    process.wait(self.moment(setting) if not finished(folder) else None)
                except subprocess.TimeoutExpired:
                    kind = self.disturb(setting, process)
                    if kind is not None:
                        count += 1
                        self.counts[kind] += 1
                        self.say(f"{kind}; saved: {progress(folder)}")
            if process.returncode == 0 and finished(folder):
                return count
            if process.returncode and count == before:
                raise RuntimeError(f"a run failed that nothing had disturbed: {said_in(folder)}")

    def disturb(self, setting: Setting, process: subprocess.Popen[bytes]) -> str | None:
        """Does one thing to a run → what, or None where there was nobody left to do it to."""
        kind = self.draw.choice(KINDS)
        trainers = [pid for pid in descendants(process.pid) if is_trainer(pid, setting)]
        loaders = [child for pid in trainers for child in children(pid) if "resource_tracker" not in command_of(child)]
        if kind == "loader killed" and loaders:
            return kind if kill(self.draw.choice(loaders)) else None
        if kind == "one of two killed" and setting.processes == 2 and len(trainers) == 2:
            return kind if kill(max(trainers)) else None
        if kind == "asked to stop":
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                return None
            return kind
        for pid in [*descendants(process.pid)]:  # of which torchrun gives each a session of its own
            kill(pid)
        process.wait()
        return "all killed"

    def summary(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.counts.items()))
        return (f"{duration(time.monotonic() - self.began)}: {self.disturbances} disturbances ({kinds}), {self.starts} "
                f"starts, {self.runs} runs compared, {self.mismatches} mismatches")  # fmt: skip


def kill(pid: int) -> bool:
    """kill -9 → whether the process was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    """Processes that this one has started."""
    processes = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [process for process in processes if parent_of(process) == pid]


def parent_of(pid: int) -> int | None:
    """The process that has started this one; None where this one has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def descendants(pid: int) -> Iterator[int]:
    """A process, those that it has started, those that they have, …"""
    yield pid
    for child in children(pid):
        yield from descendants(child)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def is_trainer(pid: int, setting: Setting) -> bool:
    """Whether a process trains: it was not forked to load data, and is no launcher."""
    words, above = command_of(pid), parent_of(pid)
    if above is None:
        return False
    launcher = "torch.distributed.run"
    return ENTRIES[setting.recipe] in words and launcher not in words and (
        setting.processes == 1 or launcher in command_of(above))  # fmt: skip


def content_of(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    from common.files import load

    return load(path)


def checkpoint_in(folder: Path) -> Path | None:
    """A run's newest checkpoint; the Swin recipe makes folders of its own for it."""
    return next(folder.rglob(LAST), None)


def progress(folder: Path) -> str:
    """How far a run's newest checkpoint is."""
    path = checkpoint_in(folder)
    if path is None:
        return "nothing yet"
    content = content_of(path)
    position = content["position"]
    return f"epoch {content['epoch'] + 2}, step {position['update'] if position is not None else 0}"


def finished(folder: Path) -> bool:
    """Whether a run is at its end, not stopped on request."""
    path = checkpoint_in(folder)
    if path is None:
        return False
    content = content_of(path)
    return content["position"] is None and content["epoch"] + 1 == content["args"]["epochs"]


def compare(some: Path, other: Path) -> list[str]:
    """What two runs differ in, to the bit: checkpoints but for their settings, log.txt, curves."""
    found = []
    some, other = (path.parent for folder in (some, other) if (path := checkpoint_in(folder)) is not None)
    for name in (LAST, BEST):
        ours, theirs = (content_of(folder / name) for folder in (some, other))
        for content in (ours, theirs):
            content.pop("args")
        found += [f"{name}{where}" for where in differences(ours, theirs)]
    if (some / LOG).read_bytes() != (other / LOG).read_bytes() or not entries(some):
        found.append(LOG)
    return found + [f"curve {name}" for name in differing_curves(some, other)]


def differing_curves(some: Path, other: Path) -> list[str]:
    """Names of TensorBoard's curves that do not have the same points; speed may differ."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each start after a kill
    curves = [EventAccumulator(str(folder / CURVES), size_guidance={"scalars": 0}).Reload() for folder in (some, other)]
    names = set().union(*(curve.Tags()["scalars"] for curve in curves)) - {"speed/images_per_second"}
    points = [{name: [(p.step, p.value) for p in curve.Scalars(name)] if name in curve.Tags()["scalars"] else None
               for name in names} for curve in curves]  # fmt: skip
    return sorted(name for name in names if points[0][name] != points[1][name])


def differences(some: Any, other: Any, at: str = "") -> list[str]:
    """Where two checkpoints' contents differ, to the bit."""
    import torch

    if isinstance(some, dict) and isinstance(other, dict) and some.keys() == other.keys():
        return [found for key in some for found in differences(some[key], other[key], f"{at}/{key}")]
    if isinstance(some, (list, tuple)) and isinstance(other, (list, tuple)) and len(some) == len(other):
        return [found for i, pair in enumerate(zip(some, other)) for found in differences(*pair, f"{at}/{i}")]
    same = (
        torch.equal(some, other)
        if isinstance(some, torch.Tensor) and isinstance(other, torch.Tensor)
        else some == other
    )
    return [] if same else [at]


if __name__ == "__main__":
    main()
