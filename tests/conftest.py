"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import RANDOM, start
from tests.sample_data import make_jpegs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On busy cores two threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def jpegs(tmp_path: Path) -> Callable[..., Path]:
    """`make_jpegs` in the test's temporary folder."""

    def make(train: int = 16, val: int = 6, classes: tuple[str, ...] = ("cat", "dog"), name: str = "images") -> Path:
        return make_jpegs(tmp_path / name, train, val, classes)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs of a given size, such as "100k"; skips the test without root."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting a small disk needs root: {done.stderr.decode().strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An uninterrupted run with AugMask → its flags without the folder, its folder, its output."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = make_jpegs(folder / "images", train=16, val=5, classes=("cat", "dog", "owl"))
    flags = ["--data-path", str(data), *RANDOM]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        start(*flags, "--output-dir", str(folder / "out"))
    torch.set_num_threads(threads)
    return flags, folder / "out", output.getvalue()


@pytest.fixture
def continued(finished, tmp_path):
    """A copy of the finished run, to be resumed → all its flags, its folder."""
    flags, out, _ = finished
    shutil.copytree(out, tmp_path / "copy")
    return [*flags, "--output-dir", str(tmp_path / "copy")], tmp_path / "copy"
