"""DataLoader workers that die, in real processes: what is told, and which image they were at."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from common.data.loader import AugmentedDataset, WatchedLoader, collate, explain_worker_failure
from tests.commands import ROOT, environment

RESUME = "; re-run the command to resume"


class Deadly:
    """Eight images, of which reading the sixth ends the process."""

    class_names = None
    notes = ()

    def __init__(self, end: Callable[[], Any]):
        self.end = end

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 5:
            self.end()
        return Image.new("RGB", (4, 4)), 0

    def sample_name(self, index: int) -> str:
        return f"{index}.png"


def read_address_zero() -> None:
    faulthandler.disable()  # pytest's would print the stack
    ctypes.string_at(0)


def end_by(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("end", "words"), [
    (read_address_zero, "killed by SIGSEGV while it read 5.png; remove this file if it is damaged"),
    (end_by(signal.SIGILL), "killed by SIGILL while it read 5.png; remove this file if it is damaged"),
    (end_by(signal.SIGKILL), "killed by SIGKILL while it read 5.png, probably out of memory: lower --num-workers"),
    (end_by(signal.SIGBUS), "killed by SIGBUS while it read 5.png, probably since /dev/shm is full: enlarge it "
                            "(docker run --shm-size) or lower --num-workers"),
    (lambda: os._exit(3), "exited with status 3 while it read 5.png"),
])  # fmt: skip
def test_the_signal_and_the_image_are_told(end, words, persistent):
    views = AugmentedDataset(Deadly(end), lambda image: torch.zeros(3, 4, 4), num_workers=2)
    loader: WatchedLoader = WatchedLoader(
        views, sampler=[(index, 0) for index in range(8)], batch_size=2, num_workers=2, collate_fn=collate,
        persistent_workers=persistent, timeout=5,
    )  # fmt: skip
    with pytest.raises((RuntimeError, OSError, EOFError)) as death:
        list(loader)
    assert explain_worker_failure(loader, death.value) == f"a DataLoader worker was {words}{RESUME}".replace(
        "was exited", "exited"
    )


class SlowSampler:
    """Places of images; from the second batch of two on they take long to draw."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place in range(8):
            yield 5, 0
            if place > 1:
                time.sleep(1)


def test_a_worker_that_dies_while_the_iterator_is_made_is_told():
    """In a process of its own: PyTorch's signal handler raises in the middle of a constructor, and what that leaves half
    made closes file descriptors a second time, which others may have by then."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import explain_early_death; explain_early_death()"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == (
        f"a DataLoader worker was killed by SIGKILL while it read 5.png, probably out of memory: "
        f"lower --num-workers{RESUME}"
    )


def explain_early_death() -> None:
    views = AugmentedDataset(Deadly(end_by(signal.SIGKILL)), lambda image: torch.zeros(3, 4, 4), num_workers=2)
    loader: WatchedLoader = WatchedLoader(views, sampler=SlowSampler(), batch_size=2, num_workers=2, collate_fn=collate)
    try:
        iter(loader)
    except RuntimeError as death:
        print(explain_worker_failure(loader, death))


def test_an_error_that_is_raised_in_a_worker_is_no_death():
    class Broken(AugmentedDataset):
        def __getitem__(self, place: Any) -> Any:
            raise RuntimeError("a mistake")

    views = Broken(Deadly(lambda: None), lambda image: image, num_workers=1)
    loader: WatchedLoader = WatchedLoader(views, sampler=[(5, 0)], num_workers=1)
    with pytest.raises(RuntimeError, match="in DataLoader worker process 0") as raised:
        list(loader)
    assert explain_worker_failure(loader, raised.value) is None


def test_an_image_that_replaces_another_is_the_one_that_is_told():
    class Broken(Deadly):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index == 0:
                raise OSError("broken")
            raise KeyError(index)

    views = AugmentedDataset(Broken(lambda: None), lambda image: image)
    with pytest.raises(KeyError) as raised:
        views[0, 3]
    assert views.samples_in_flight() == [f"{raised.value.args[0]}.png"] != ["0.png"]
