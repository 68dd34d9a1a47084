"""Asked to stop, a run finishes its step, saves and leaves: Ctrl-C, SIGTERM, and the signal of a scheduler."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# SIGUSR2 is what submitit has Slurm send ahead of a time limit or a preemption
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
APART = 1.0  # seconds from which two signals are two: torchrun passes on the one that its terminal sent to all


class Request:
    """Whether the process was asked to stop, and by what."""

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.gently = False  # whether the process is at work that it can stop between two steps
        self.by: str | None = None
        self.at = 0.0

    def __bool__(self) -> bool:
        return self.by is not None

    def receive(self, number: int, frame: Any) -> None:
        """The handler. A second Ctrl-C or SIGTERM raises KeyboardInterrupt where the process stands."""
        if not self.gently and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.gently and number == signal.SIGTERM:
            raise SystemExit(128 + number)
        if self.by is None:
            self.by, self.at = signal.Signals(number).name, time.monotonic()
            if number == signal.SIGINT and self.speaks:
                os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")
        elif number != signal.SIGUSR2 and time.monotonic() - self.at > APART:
            raise KeyboardInterrupt


@contextmanager
def listening(speaks: bool = True) -> Iterator[Request]:
    """Takes the signals that ask a process to stop, and gives them back to whoever had them before.

    Until `gently` is set, SIGINT and SIGTERM end the process where it stands.
    Outside the main thread, which alone may handle signals, the request stays unset.
    """
    request = Request(speaks)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in ASKING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts a Ctrl-C off to the end, also for the processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_printing() -> None:
    """After a BrokenPipeError, as `| head` brings about: else the interpreter would print to the reader that left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ignore(worker: int) -> None:
    """For a loader process, which works until its trainer has finished the step."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
