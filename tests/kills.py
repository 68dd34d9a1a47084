"""Trains and is killed, again and again: the other side of test_kill.py, in a process of its own.

Each start of the training is a fork of this process, which has everything imported; it is a whole run of the entry
point's own `run`, and dies of a real SIGKILL. Prints JSON: how often it was killed in which moment, and the folders of
the runs that came to their end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, engine, files, log, train
from common.augsub import AugSub
from common.folder import CURVES, LOG
from common.run import run
from deit.recipe import RECIPE


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, calls: int, after: bool) -> None:
    """Has this process killed at one of the calls of a function, before what it does or after."""
    plain, left = getattr(owner, name), [calls]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            killed()
        result = plain(*args, **kwargs)
        if left[0] == 0:
            killed()
        return result

    setattr(owner, name, deadly)


def half_written(calls: int) -> None:
    """Killed when a write of a checkpoint has put half of its bytes into the file."""
    plain, left = files._Written.write, [calls]

    def deadly(self: Any, data: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            killed()
        return plain(self, data)

    files._Written.write = deadly  # type: ignore[method-assign]


def half_a_line(calls: int) -> None:
    """Killed in the middle of a line of log.txt."""
    plain, left = log.Log.record, [calls]

    def deadly(self: Any, entry: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] == 0:
            with open(self.folder / LOG, "a") as file:
                file.write(json.dumps(entry)[:37])
            killed()
        plain(self, entry)

    log.Log.record = deadly  # type: ignore[method-assign]


def half_a_curve(calls: int) -> None:
    """Killed when TensorBoard's file ends in the middle of a record."""
    plain, left = log.Log.scalars, [calls]

    def deadly(self: Any, values: Any, step: int) -> None:
        plain(self, values, step)
        left[0] -= 1
        if left[0] == 0:
            self.curves.flush()
            newest = max((self.folder / CURVES).iterdir(), key=lambda path: path.stat().st_mtime_ns)
            os.truncate(newest, newest.stat().st_size - 9)
            killed()

    log.Log.scalars = deadly  # type: ignore[method-assign]


def a_loader(calls: int) -> None:
    """A process that loads data is killed, at one of the steps."""
    import multiprocessing

    plain, left = engine.Trainer.micro_step, [calls]

    def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        return plain(self, *args, **kwargs)

    engine.Trainer.micro_step = deadly  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[random.Random], None]] = {
    "in a forward": lambda draw: at(AugSub, "losses", draw.randint(1, 7), after=False),
    "between forward and update": lambda draw: at(engine.Trainer, "update", draw.randint(1, 7), after=False),
    "after an update": lambda draw: at(engine.Trainer, "update", draw.randint(1, 7), after=True),
    "in a save": lambda draw: half_written(draw.randint(1, 400)),
    "before a rename": lambda draw: at(os, "replace", draw.randint(2, 12), after=False),
    "after a rename": lambda draw: at(os, "replace", draw.randint(2, 12), after=True),
    "between rename and prune": lambda draw: at(checkpoint, "make_way", draw.randint(1, 4), after=True),
    "in evaluation": lambda draw: at(train, "evaluate", draw.randint(1, 2), after=False),
    "in a line of the log": lambda draw: half_a_line(1),
    "in a record of the curves": lambda draw: half_a_curve(draw.randint(1, 4)),
    "of a loader": lambda draw: a_loader(draw.randint(1, 6)),
    "at any time": lambda draw: None,
}


def main() -> None:
    kills, seed, flags = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    draw, done = random.Random(seed), Counter[str]()
    seconds = [2.0]  # that a start takes, as far as is known
    folders: list[str] = []
    running = Path(f"run-{len(folders)}")
    torch.set_num_threads(1)
    while sum(done.values()) < kills or running.exists():
        enough = sum(done.values()) >= kills
        moment = min(MOMENTS, key=lambda name: (done[name], draw.random())) if not enough else ""
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            start(moment, draw, [*flags, "--output-dir", str(running)])
        if moment == "at any time":
            time.sleep(draw.uniform(0, seconds[0]))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if moment and (os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2):
            done[moment] += 1
            continue
        if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
            raise SystemExit(f"a start failed by itself, with {status} in {running}")
        seconds[0] = time.monotonic() - began
        folders.append(str(running))
        running = Path(f"run-{len(folders)}")
    print(json.dumps({"kills": done, "folders": folders}))


def start(moment: str, draw: random.Random, flags: list[str]) -> None:
    """The run, in a process that ends with it."""
    os.dup2(os.open("said.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    os.dup2(1, 2)
    status = 1
    try:
        if moment:
            MOMENTS[moment](draw)
        run(RECIPE, flags)
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
