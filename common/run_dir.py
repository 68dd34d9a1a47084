"""A run's output folder: file names, atomic writes, the lock, and reading log.txt.

Imports no PyTorch, so that the scripts that show a run's progress start at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock

LAST, BEST, PREVIOUS = "checkpoint.pth", "best_checkpoint.pth", "previous_checkpoint_{}.pth"
BEST_MODEL, LAST_MODEL = "best", "last"  # folders in timm's hub format
LOG, CURVES, SUMMARY, SETTINGS = "log.txt", "tensorboard", "summary.csv", "args.json"
LOCK_FILE = ".running"
LOCK_TIMEOUT_S = 120.0  # NFS servers keep the locks of a machine that crashed for 90 s
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of flock, by file system


@contextmanager
def atomic_path(path: Path, before_rename: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give the path of a temporary file to write, which is renamed to `path` when the body ends; if the body raises,
    `path` is unchanged.

    Args:
        path: of the finished file.
        before_rename: called when the temporary file is complete; the body has flushed it to the disk.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield tmp
        before_rename()
        os.replace(tmp, path)
        flush_to_disk(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, before_rename: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """Open a temporary file that is renamed to `path` when the body ends; if the body raises, `path` is unchanged.

    Args:
        path: of the finished file.
        before_rename: called when the temporary file is complete and flushed to the disk.
    """
    with atomic_path(path, before_rename) as tmp, open(tmp, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, last through a loss of power."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def link_or_copy(path: Path, other: Path) -> None:
    """Make `other` a hard link to `path`, replacing it atomically; a copy where the file system has no hard links."""
    tmp = other.with_name(f".{other.name}.{os.getpid()}.part")
    try:
        tmp.unlink(missing_ok=True)
        try:
            os.link(path, tmp)
        except OSError:
            shutil.copyfile(path, tmp)
        os.replace(tmp, other)
    finally:
        tmp.unlink(missing_ok=True)


def acquire_lock(path: Path, timeout_s: float, on_wait: Callable[[], None] = lambda: None) -> FileLock | None:
    """Lock a file until `release()` or the end of this process, also by SIGKILL while its forked workers live on.

    Args:
        path: lock file, created where it is absent and left in place.
        timeout_s: seconds to wait for another holder; negative waits without end.
        on_wait: called once, before waiting.

    Returns:
        The lock; None on a file system without locks, where the run goes on unprotected.

    Raises:
        TimeoutError: another process still holds the lock.
        OSError: the file cannot be created.
    """
    from filelock import FileLock  # here, as --help reads this module and needs no lock

    # The soft fallback is a file that outlives a killed process and would keep its folder closed.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False, poll_interval=0.2)
    try:
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            on_wait()
            lock.acquire(timeout=timeout_s)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return lock


def lock_run_dir(folder: Path) -> FileLock | None:
    """Create an output folder and lock it, as `acquire_lock`; say so while it waits for another run.

    Raises:
        ValueError: it cannot be written, or another run holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        message = f"waiting for another run in {folder} to end"
        return acquire_lock(folder / LOCK_FILE, LOCK_TIMEOUT_S, lambda: print(message, flush=True))
    except TimeoutError as error:
        raise ValueError(f"--output-dir {folder}: in use by another run, which holds {LOCK_FILE}") from error
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: not writable ({error.strerror or error})") from error


def remove_stale_tmp(folder: Path) -> None:
    """Remove the temporary files of checkpoints and models that were being written when a run was killed."""
    # safetensors writes into a file of its own beside the one that it is given
    patterns = [
        ".*.pth.*.part",
        *(f"{name}/{tmp}" for name in (BEST_MODEL, LAST_MODEL) for tmp in (".*.part", ".tmp*")),
    ]
    for tmp in (path for pattern in patterns for path in folder.glob(pattern)):
        tmp.unlink(missing_ok=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read log.txt, one dict per epoch; skip a line that a crash left incomplete."""
    path, entries = folder / LOG, []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "epoch" in entry]


def duration(seconds: float) -> str:
    """83 → "1:23", 5000 → "1:23:20"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
