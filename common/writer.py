"""Writing in the background: training goes on while a copy of its state is on its way to the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Writer:
    """One write at a time, in a thread; what it fails with is raised in the thread that trains."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begins a write, when the one before has ended."""
        self.wait()

        def attempt() -> None:
            try:
                write()
            except BaseException as failure:  # a thread that dies with it would leave training in the belief
                self.failure = failure

        # a second Ctrl-C does not wait for a thread that is a daemon
        self.thread = threading.Thread(target=attempt, name="checkpoint", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises what a write has failed with."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def wait(self) -> None:
        """Waits for the write under way; raises what it failed with."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def settle(self, seconds: float | None = None) -> None:
        """Waits for the write under way, whatever comes of it."""
        if self.thread is not None:
            self.thread.join(seconds)


def snapshot(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples of tensors on the CPU, which does not change as training goes on.

    Copies from a GPU go to page-locked memory side by side; the host waits once, for all of them.
    """
    from_gpu = False

    def copy(value: Any) -> Any:
        nonlocal from_gpu
        if isinstance(value, Tensor) and value.device.type == "cuda":
            from_gpu = True
            target = torch.empty_like(value, device="cpu", pin_memory=True)
            return target.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {name: copy(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(copy(part) for part in value)
        return value

    copied = copy(state)
    if from_gpu:
        torch.cuda.synchronize()
    return copied
