"""Trains every recipe at a base commit and in this tree on this machine, and compares the results bit for bit.

    python tests/oracle.py --base 6eaf722
    python tests/oracle.py --base 6eaf722 --quick --recipes deit,mae

A run trains 3 epochs on the digits with everything switched on that draws random numbers, on 1 or 2 processes, with
--input pil or fast. One run of each recipe is stopped in the middle of an epoch twice, by SIGTERM and by SIGKILL, and
resumed; it has to end with the bits of the base's uninterrupted run. Compared are all entries of the last checkpoint
and of the one before it, which was saved in the middle of the last epoch, except the settings (`args`), and the
TensorBoard curves except the speed. Prints a line for each run; exit status 1 where one differs or fails.

--quick takes one run of each recipe. The base's results are cached, by commit, PyTorch version and processor. Only the
command lines and the files of a run are used, so that the tree may be rearranged freely.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
ENTRIES = {
    "deit": "deit/main.py",
    "mae": "mae/main_finetune.py",
    "swin": "swin/main.py",
    "resnet_rsb": "resnet_rsb/train.py",
}
# with 96 images a batch every epoch has 4 to 14 steps, so that a multiple of 5 falls in the middle of the last one
FLAGS = (
    "--epochs 3 --warmup-epochs 0 --batch-size 96 --log-interval 3 --save-every 5 --num-workers 1 --amp off "
    "--augsub masking --drop 0.1 --drop-path 0.1 --reprob 0.25 --remode pixel --mixup 0.8 --cutmix 1.0 --hflip 0.5 "
    "--model-ema --model-ema-decay 0.9"
)
RECIPE_FLAGS = {
    "deit": "--ThreeAugment --color-jitter 0.3 --repeated-aug",
    "mae": "--aa rand-m9-mstd0.5-inc1 --layer-decay 0.75 --accum-iter 2",
    "swin": "--aa rand-m9-mstd0.5-inc1 --color-jitter 0.4 --clip-grad 5",
    "resnet_rsb": "--aa rand-m7-mstd0.5 --aug-repeats 3 --train-interpolation random --input-size 24",
}
LAST, BEFORE_LAST = "checkpoint.pth", "previous_checkpoint_1.pth"
MARK = "AUGSUB_ORACLE"  # environment variable by which the processes of this script are found
RUN_TIMEOUT_S = 900
STOPS, STOP_ATTEMPTS = (signal.SIGTERM, signal.SIGKILL), 5
SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
starting, interrupted = threading.Lock(), threading.Event()


class RunFailed(Exception):
    """A training run did not do what it should."""


@dataclass(frozen=True)
class Case:
    """A training run. With `stops` it is stopped twice and resumed, in the tree only."""

    recipe: str
    processes: int
    input: str
    stops: bool = False

    def __str__(self) -> str:
        name = f"{self.recipe:<10}  {self.processes} process{'es' if self.processes > 1 else '  '}  {self.input:<4}"
        return name + ("  stopped and resumed" if self.stops else "")

    @property
    def flags(self) -> list[str]:
        return [*FLAGS.split(), *RECIPE_FLAGS[self.recipe].split(), "--input", self.input]

    def command(self, tree: Path, output: Path) -> list[str]:
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return [*launcher, str(tree / ENTRIES[self.recipe]), *self.flags, "--output-dir", str(output)]

    def uninterrupted(self) -> Case:
        return Case(self.recipe, self.processes, self.input)


QUICK = [
    Case("deit", 1, "pil", stops=True),
    Case("swin", 1, "fast"),
    Case("mae", 2, "fast"),
    Case("resnet_rsb", 2, "pil"),
]
# with --input fast the steps of two processes are over before a signal has passed through torchrun
STOPPED = [Case("deit", 2, "pil"), Case("mae", 1, "pil"), Case("swin", 1, "fast"), Case("resnet_rsb", 2, "pil")]
FULL = [Case(recipe, processes, input) for recipe in ENTRIES for processes in (1, 2) for input in ("pil", "fast")]
FULL += [Case(case.recipe, case.processes, case.input, stops=True) for case in STOPPED]


def main() -> None:
    """Run what is not cached, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="commit to compare with")
    parser.add_argument("--tree", type=Path, default=ROOT, help="folder to test; by default the one of this script")
    parser.add_argument("--quick", action="store_true", help="one run of each recipe")
    parser.add_argument("--recipes", default=",".join(ENTRIES), help="with commas between them")
    parser.add_argument("--cache", type=Path, default=ROOT / "output" / "oracle", help="folder of the base's results")
    parser.add_argument("--fresh", action="store_true", help="run the base even where its results are cached")
    args = parser.parse_args()
    recipes = args.recipes.split(",")
    if not set(recipes) <= ENTRIES.keys():
        parser.error(f"--recipes {args.recipes}: choose from {','.join(ENTRIES)}")
    try:
        commit = git("rev-parse", "--verify", f"{args.base}^{{commit}}")
    except subprocess.CalledProcessError:
        parser.error(f"--base {args.base}: no such commit")
    cases = [case for case in (QUICK if args.quick else FULL) if case.recipe in recipes]
    cache = Cache(args.cache / f"{commit[:12]}-torch-{torch.__version__}-{processor()}", args.fresh)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        different = compare_all(cases, args.tree.resolve(), commit, cache)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{len(cases)} runs compared with {commit[:12]}, {different} different", flush=True)
    sys.exit(1 if different else 0)


def compare_all(cases: list[Case], tree: Path, commit: str, cache: Cache) -> int:
    """Run all cases, those of one process two at a time → how many differ or fail."""
    different = 0
    cached = all(cache.load(case) for case in cases)
    with tempfile.TemporaryDirectory(prefix="oracle-") as name:
        folder = Path(name)
        with nullcontext() if cached else worktree(commit, folder / "base"):
            for processes, jobs in ((1, 2), (2, 1)):
                with ThreadPoolExecutor(jobs) as pool:
                    try:
                        some = [case for case in cases if case.processes == processes]
                        for case, result in compare(some, tree, folder, cache, pool):
                            different += result != "same"
                            print(f"{case!s:<55} {result}", flush=True)
                    except BaseException:
                        with starting:
                            interrupted.set()
                        pool.shutdown(wait=False, cancel_futures=True)
                        kill_marked(folder)
                        raise
    return different


def compare(
    cases: list[Case], tree: Path, folder: Path, cache: Cache, pool: ThreadPoolExecutor
) -> Iterator[tuple[Case, str]]:
    """Run cases in the base and in the tree → each with "same" or what differs, as they end."""
    of_base: dict[Case, Future[dict[str, str]]] = {}
    of_tree: dict[Future[dict[str, str]], Case] = {}
    for case in cases:
        plain = case.uninterrupted()
        if plain not in of_base:
            of_base[plain] = pool.submit(base_digests, plain, folder, cache)
        of_tree[pool.submit(train, case, tree, folder)] = case
    for future in as_completed(of_tree):
        case = of_tree[future]
        try:
            base, result = of_base[case.uninterrupted()].result(), future.result()
        except RunFailed as error:
            yield case, f"FAILED: {error}"
            continue
        names = [name for name in {**base, **result} if base.get(name) != result.get(name)]
        yield case, f"DIFFERENT: {', '.join(names)}" if names else "same"


def base_digests(case: Case, folder: Path, cache: Cache) -> dict[str, str]:
    """The digests of the base's run, from the cache where they are in it."""
    digests = cache.load(case)
    if digests is None:
        digests = train(case, folder / "base", folder)
        cache.save(case, digests)
    return digests


class Cache:
    """Digests of the base's runs as JSON files, valid until this script changes.

    Args:
        folder: of the files; its name says commit, PyTorch version and processor.
        fresh: whether to ignore what an earlier call has left.
    """

    def __init__(self, folder: Path, fresh: bool):
        self.folder, self.fresh = folder, fresh

    def path(self, case: Case) -> Path:
        return self.folder / f"{case.recipe}-{case.processes}-{case.input}.json"

    def load(self, case: Case) -> dict[str, str] | None:
        if self.fresh or not self.path(case).exists():
            return None
        content = json.loads(self.path(case).read_text())
        return content["digests"] if content["script"] == SCRIPT else None

    def save(self, case: Case, digests: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.path(case).with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"script": SCRIPT, "digests": digests}, indent=1))
        os.replace(part, self.path(case))


def processor() -> str:
    """Name the processor: results hang on its model and its instructions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return hashlib.sha256("".join([platform.machine(), platform.processor(), *kinds]).encode()).hexdigest()[:12]


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[None]:
    """A checkout of the commit, which is removed in the end."""
    git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield
    finally:
        git("worktree", "remove", "--force", str(folder))


def train(case: Case, tree: Path, folder: Path) -> dict[str, str]:
    """Train to the end, with the stops that the case asks for → digests.

    Raises:
        RunFailed: with the last line that the run printed.
    """
    stopped = not case.stops
    for _ in range(1 if stopped else STOP_ATTEMPTS):
        output = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
        command = case.command(tree, output)
        stopped = stopped or all(stop_in_mid_epoch(command, output, folder, number) for number in STOPS)
        if stopped:
            break
    if not stopped:
        raise RunFailed(f"it came to its end before it could be stopped, {STOP_ATTEMPTS} times")
    process = start(command, output, folder)
    try:
        process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_marked(output)
        raise RunFailed(f"{tree}: not done after {RUN_TIMEOUT_S} s") from None
    if process.returncode:
        lines = [line for line in log_file(output).read_text(errors="replace").splitlines() if line.strip()]
        raise RunFailed(f"{tree}: exit status {process.returncode}: {next(reversed(lines), '')}")
    return digests_of(output)


def start(command: list[str], output: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a run, whose processes all carry its folder in their environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", MARK: str(output)}
    with starting, open(log_file(output), "ab") as log:
        if interrupted.is_set():
            raise RunFailed("interrupted")
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def log_file(output: Path) -> Path:
    return output.with_suffix(".txt")


def stop_in_mid_epoch(command: list[str], output: Path, folder: Path, number: signal.Signals) -> bool:
    """Start a run again and again until it is stopped in the middle of an epoch → whether it was, before it came
    to its end."""
    while True:
        # asked to stop, a run saves what it has, so a report is early enough; a kill has to wait for a checkpoint
        moment = reports if number == signal.SIGTERM else saved_at
        before = moment(output)
        process, end = start(command, output, folder), time.monotonic() + RUN_TIMEOUT_S
        while process.poll() is None and moment(output) == before and time.monotonic() < end:
            time.sleep(0.01)
        if process.poll() == 0:
            return False
        if process.poll() is not None:
            raise RunFailed(f"it ended with exit status {process.returncode} before it could be stopped")
        if number == signal.SIGKILL:
            kill_marked(output)
        else:
            process.send_signal(number)  # torchrun passes it on
        process.wait(RUN_TIMEOUT_S)
        content = torch.load(find(output, LAST), weights_only=True)
        if content["position"] is not None:
            return True


def reports(output: Path) -> int:
    """How many reports in mid-epoch a run has printed so far."""
    path = log_file(output)
    return path.read_bytes().count(b"  step 3/") if path.exists() else 0


def saved_at(output: Path) -> int | None:
    """What changes when a run saves a checkpoint."""
    return max((path.stat().st_mtime_ns for path in output.rglob(LAST)), default=None)


def kill_marked(mark: Path) -> None:
    """Kill all processes of a run, or of all runs below a folder: torchrun puts its own into other sessions."""
    word = f"\0{MARK}={mark}".encode()
    while True:
        alive = 0
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if word in b"\0" + path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    alive += 1
            except OSError:  # it has ended meanwhile, or is another user's
                continue
        if not alive:
            return
        time.sleep(0.05)


def find(output: Path, name: str) -> Path:
    """A file of a run; Swin's are in <output>/<model name>/<tag>."""
    path = next(output.rglob(name), None)
    if path is None:
        raise RunFailed(f"it has left no {name}")
    return path


def digests_of(output: Path) -> dict[str, str]:
    """SHA-256 of each entry of the last two checkpoints and of each curve → by name."""
    last = torch.load(find(output, LAST), weights_only=True)
    before = torch.load(find(output, BEFORE_LAST), weights_only=True)
    if before["position"] is None:
        raise RunFailed(f"{BEFORE_LAST} is not of the middle of an epoch")
    parts = {**last, **{f"mid-epoch {name}": value for name, value in before.items()}, **curves(output)}
    return {name: digest(value) for name, value in parts.items() if name.split()[-1] not in ("args", "digest")}


def curves(output: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of TensorBoard's curves, except the speed's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each start after a kill
    events = EventAccumulator(str(find(output, "tensorboard")), size_guidance={"scalars": 0}).Reload()
    return {
        f"curve {tag}": [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("speed/")
    }


def digest(value: Any) -> str:
    """SHA-256 of tensors and plain values; neither the order of a dict's keys counts nor whether 1 is a float."""
    state = hashlib.sha256()

    def update(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            state.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            state.update(f"dict {len(value)};".encode())
            for key in sorted(value, key=repr):
                state.update(f"{key!r};".encode())
                update(value[key])
        elif isinstance(value, (list, tuple)):
            state.update(f"list {len(value)};".encode())
            for item in value:
                update(item)
        else:
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # a resumed run has a best epoch of 0.0 where an uninterrupted one has 0
            state.update(f"{value!r};".encode())

    update(value)
    return state.hexdigest()


if __name__ == "__main__":
    main()
