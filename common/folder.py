"""A run's output folder: the names in it, files that are complete or absent, and what log.txt tells.

For all who write there, and for those who look on without PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LAST, BEST, BEFORE = "checkpoint.pth", "best_checkpoint.pth", "previous_checkpoint_{}.pth"
LOG, CURVES, SUMMARY, SETTINGS = "log.txt", "tensorboard", "summary.csv", "args.json"


@contextmanager
def replacing(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """Gives a file to write and puts it in `path`'s place at the end; if the body raises, `path` stays as it was."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(aside, path)
        flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder last through a loss of power."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def keep_as(path: Path, other: Path) -> None:
    """Makes `other` a second name of the file at `path`, or a copy where the file system has no second names."""
    aside = other.with_name(f".{other.name}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)
        os.replace(aside, other)
    finally:
        aside.unlink(missing_ok=True)


def lock(path: Path, wait: float, say: Callable[[], None]) -> IO[bytes] | None:
    """Takes a lock that lasts until the file is closed or this process ends, however it does.

    Args:
        path: of the lock's file.
        wait: seconds for whoever has it to give it up.
        say: is called once if there is somebody to wait for.

    Returns:
        The open file; None where the file system has no locks.

    Raises:
        TimeoutError: another process has it still.
    """
    file = open(path, "ab")  # noqa: SIM115  # to be closed by who asked
    end = None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                file.close()
                return None
        if end is None:
            end = time.monotonic() + wait
            say()
        if time.monotonic() > end:
            file.close()
            raise TimeoutError(f"{path} is locked")
        time.sleep(0.2)


def remove_parts(folder: Path) -> None:
    """Removes the checkpoints that were half written when a run was killed."""
    for part in folder.glob(".*.pth.*.part"):
        part.unlink(missing_ok=True)


def entries(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of log.txt; one that was torn by a crash is passed over."""
    path, found = folder / LOG, []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict) and "epoch" in entry]


def duration(seconds: float) -> str:
    """83 → "1:23", 5000 → "1:23:20"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
