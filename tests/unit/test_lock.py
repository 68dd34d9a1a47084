"""The lock of an output folder, between real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.run_dir import acquire_lock
from tests.commands import ROOT, environment

HOLD = """
import os, sys, time
from pathlib import Path
from common.run_dir import acquire_lock

lock = acquire_lock(Path(sys.argv[1]), 0)
"""
FORK = """
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""
FORK_LOADER = """
from torch.utils.data import DataLoader

class Hangs:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        time.sleep(60)

next(iter(DataLoader(Hangs(), num_workers=1, multiprocessing_context="fork")))
"""
FORK_BRIEFLY = """
pid = os.fork()
if pid == 0:
    sys.exit()
os.waitpid(pid, 0)
print(pid, flush=True)
time.sleep(60)
"""


def hold(path: Path, then: str) -> tuple[subprocess.Popen, int]:
    """A process that holds the lock → it, and the id of a process that it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("fork", [FORK, FORK_LOADER], ids=["fork", "DataLoader"])
def test_lock_is_free_when_its_holder_is_killed_while_a_forked_worker_lives_on(fork, tmp_path):
    path, waits = tmp_path / ".running", []
    holder, worker = hold(path, fork)
    try:
        with pytest.raises(TimeoutError):
            acquire_lock(path, 0, lambda: waits.append(1))
        assert waits == [1]
        holder.kill()
        holder.wait()
        begin = time.monotonic()
        lock = acquire_lock(path, 2, lambda: waits.append(2))
        assert time.monotonic() - begin < 1
        os.kill(worker, 0)  # raises ProcessLookupError if it has ended
        assert lock is not None and waits == [1]
        lock.release()
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)


def test_lock_stays_when_a_forked_worker_ends(tmp_path):
    holder, _ = hold(tmp_path / ".running", FORK_BRIEFLY)
    try:
        with pytest.raises(TimeoutError):
            acquire_lock(tmp_path / ".running", 0)
    finally:
        holder.kill()
        holder.wait()


def test_second_process_waits_until_the_lock_is_released(tmp_path):
    waits = []
    holder, _ = hold(tmp_path / ".running", "print(0, flush=True); time.sleep(1); lock.release(); time.sleep(60)")
    try:
        lock = acquire_lock(tmp_path / ".running", 30, lambda: waits.append(1))
        assert lock is not None and waits == [1]
        lock.release()
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_gets_none_and_no_soft_lock_either(code, tmp_path, monkeypatch):
    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        assert acquire_lock(tmp_path / ".running", 0) is None
    assert os.listdir(tmp_path) in ([], [".running"]) and not any(path.stat().st_size for path in tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_an_error():
    with pytest.raises(OSError, match="/proc/none"):
        acquire_lock(Path("/proc/none/.running"), 0)
