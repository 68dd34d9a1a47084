"""Stop signals: on Ctrl-C, SIGTERM or a scheduler's signal a run finishes its step, saves and exits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# SIGUSR2 is what submitit has Slurm send ahead of a time limit or a preemption
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# a terminal sends Ctrl-C to the whole process group and torchrun forwards it to its workers: the second signal within
# this time is the same Ctrl-C
REPEAT_AFTER_S = 1.0


class StopRequest:
    """Whether a signal asked this process to stop, and which.

    Attributes:
        deferred: whether a signal waits for the end of the step; else it ends the process at once.
        signal_name: such as "SIGTERM"; None before a signal came.
        received_at: time of the first signal, by `time.monotonic`.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self.deferred = False
        self.signal_name: str | None = None
        self.received_at = 0.0

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def defer(self) -> None:
        """From here on a signal waits for the end of the step."""
        self.deferred = True

    def receive(self, number: int, frame: Any) -> None:
        """Signal handler. A second Ctrl-C or SIGTERM raises KeyboardInterrupt at the current line."""
        if not self.deferred and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.deferred and number == signal.SIGTERM:
            raise SystemExit(128 + number)
        if self.signal_name is None:
            self.signal_name, self.received_at = signal.Signals(number).name, time.monotonic()
            if number == signal.SIGINT and self.verbose:
                with suppress(OSError):  # standard error is full or gone
                    os.write(2, b"\nstopping after this step; Ctrl-C again exits at once\n")
        elif number != signal.SIGUSR2 and time.monotonic() - self.received_at > REPEAT_AFTER_S:
            raise KeyboardInterrupt


@contextmanager
def handle_stop_signals(verbose: bool = True) -> Iterator[StopRequest]:
    """Install handlers for `STOP_SIGNALS` and restore the previous ones at the end.

    Until `deferred` is set, SIGINT and SIGTERM end the process at once. Outside the main thread, the only one in which
    Python handles signals, the request stays unset.
    """
    request = StopRequest(verbose)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def defer_sigint() -> Iterator[None]:
    """Block Ctrl-C until the end of the block, also in processes that the block starts."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def ignore_stop_signals(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: a worker goes on until its trainer has finished the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
