"""Trains and is killed, again and again: run by test_kill.py, in a process of its own.

Each start of the training is a fork of this process, which has everything imported; it is a whole run of the entry
point's own `run`, and dies of a real SIGKILL. Prints JSON: how often it was killed at each kill point, and the folders
of the runs that ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save

from common import evaluation, logger
from common.augsub import AugSub
from common.checkpoint import hub_format, manager
from common.checkpoint import io as files
from common.cli import run as run_cli
from common.run_dir import BEST_MODEL, LAST_MODEL, LOG
from common.trainer import Trainer
from deit.recipe import RECIPE


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch_call(owner: Any, name: str, number: int, before: Callable[..., None], after: Callable[[], None]) -> None:
    """Run `before` (with the call's arguments) and `after` around the call of that number of a function."""
    function, count = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if count == number:
            after()
        return result

    setattr(owner, name, patched)


def do_nothing(*args: Any, **kwargs: Any) -> None: ...


def kill_before(owner: Any, name: str, number: int) -> None:
    patch_call(owner, name, number, lambda *args, **kwargs: kill_self(), do_nothing)


def kill_after(owner: Any, name: str, number: int) -> None:
    patch_call(owner, name, number, do_nothing, kill_self)


def kill_in_checkpoint_write(number: int) -> None:
    """Half of a write's bytes are in the file."""

    def write_half(written: Any, data: Any) -> None:
        written.file.write(bytes(data)[: len(data) // 2])
        written.file.flush()
        kill_self()

    patch_call(files._WriteErrorRecorder, "write", number, write_half, do_nothing)


def kill_in_model_file() -> None:
    """Half of a model's weights are written."""

    def write_half(weights: dict[str, torch.Tensor], tmp: Path, **kwargs: Any) -> None:
        content = save(weights)
        tmp.write_bytes(content[: len(content) // 2])
        kill_self()

    patch_call(hub_format, "save_file", 1, write_half, do_nothing)


def kill_in_log_line(number: int) -> None:
    """Half of a line of log.txt is written."""

    def write_half(log: Any, entry: dict[str, Any]) -> None:
        with open(log.folder / LOG, "a") as file:
            file.write(json.dumps(entry)[:37])
        kill_self()

    patch_call(logger.JsonLog, "append", number, write_half, do_nothing)


def kill_in_scalar_record(number: int) -> None:
    """TensorBoard's file ends within a record."""
    boards: list[Any] = []

    def truncate() -> None:
        boards[0].writer.flush()
        newest = max(boards[0].folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size - 9)
        kill_self()

    patch_call(logger.TensorBoard, "add_scalars", number, lambda board, *args: boards.append(board), truncate)


def kill_worker(number: int) -> None:
    """A DataLoader worker is killed, not the run."""

    def kill(*args: Any, **kwargs: Any) -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    patch_call(Trainer, "train_step", number, kill, do_nothing)


KILL_POINTS: dict[str, Callable[[random.Random], None]] = {
    "in a forward": lambda rng: kill_before(AugSub, "losses", rng.randint(1, 7)),
    "between forward and update": lambda rng: kill_before(Trainer, "update", rng.randint(1, 7)),
    "after an update": lambda rng: kill_after(Trainer, "update", rng.randint(1, 7)),
    "in a save": lambda rng: kill_in_checkpoint_write(rng.randint(1, 400)),
    "in a model's file": lambda rng: kill_in_model_file(),
    "before a rename": lambda rng: kill_before(os, "replace", rng.randint(2, 16)),
    "after a rename": lambda rng: kill_after(os, "replace", rng.randint(2, 16)),
    "between rename and prune": lambda rng: kill_after(manager, "rotate", rng.randint(1, 4)),
    "in evaluation": lambda rng: kill_before(evaluation, "evaluate", rng.randint(1, 2)),
    "in a line of the log": lambda rng: kill_in_log_line(1),
    "in a TensorBoard record": lambda rng: kill_in_scalar_record(rng.randint(1, 4)),
    "of a worker": lambda rng: kill_worker(rng.randint(1, 6)),
    "at any time": do_nothing,
}


def main() -> None:
    kills, seed, flags = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rng, counts = random.Random(seed), Counter[str]()
    start_s = 2.0  # how long a start takes, replaced by the last measurement
    folders: list[str] = []
    loaded = 0  # models
    folder = Path("run-0")
    torch.set_num_threads(1)
    while counts.total() < kills or folder.exists():
        kill_point = min(KILL_POINTS, key=lambda name: (counts[name], rng.random())) if counts.total() < kills else ""
        start_time = time.monotonic()
        child = os.fork()
        if child == 0:
            train_and_exit(kill_point, rng, [*flags, "--output-dir", str(folder)])
        if kill_point == "at any time":
            time.sleep(rng.uniform(0, start_s))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        loaded += load_models(folder)
        if kill_point and (os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2):
            counts[kill_point] += 1
            continue
        if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
            raise SystemExit(f"{folder}: a start failed that nothing killed, with status {status}")
        start_s = time.monotonic() - start_time
        folders.append(str(folder))
        folder = Path(f"run-{len(folders)}")
    print(json.dumps({"kills": counts, "folders": folders, "loaded": loaded}))


def load_models(folder: Path) -> int:
    """Has timm load the models that a run has written, whatever happened to it → their number."""
    models = [folder / name for name in (BEST_MODEL, LAST_MODEL) if (folder / name / hub_format.WEIGHTS).exists()]
    for model in models:
        timm.create_model(f"local-dir:{model}", pretrained=True)
    return len(models)


def train_and_exit(kill_point: str, rng: random.Random, flags: list[str]) -> None:
    """Train in a process that ends with it; its output is appended to console.txt."""
    os.dup2(os.open("console.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    os.dup2(1, 2)
    status = 1
    try:
        if kill_point:
            KILL_POINTS[kill_point](rng)
        run_cli(RECIPE, flags)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
