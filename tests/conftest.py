"""What the tests share: the reference file's deterministic weights and images, small models, folders of JPEGs, and
running the real entry points as real processes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.runs import RANDOM, start

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--model", "deit_tiny_patch16_LS", "--input-size", "32", "--num-workers", "0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where the cores are busy with other work, two threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(recipe: str) -> dict[str, Any]:
    """Numbers measured on the published trainer of a recipe."""
    return json.loads((ROOT / "tests" / "reference" / f"{recipe}.json").read_text())


def tensor_for(name: str, shape: list[int]) -> Tensor:
    """The reference's deterministic weight of that name."""
    n = math.prod(shape)
    phase = (sum(map(ord, name)) % 97) / 97 * 2 * math.pi
    w = np.sin(0.5113 * np.arange(n) + phase)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        w = 1 + 0.5 * w
    elif last in ("running_mean", "bias"):
        w = 0.05 * w
    elif last in ("gamma_1", "gamma_2"):
        w = 0.1 + 0.05 * w
    elif len(shape) <= 1:
        w = 1 + 0.2 * w
    else:
        w = w * math.sqrt(2 / (n / shape[0]))
    return torch.from_numpy(w.reshape(shape).astype(np.float32))


def image(batch: int, size: int) -> Tensor:
    """The reference's deterministic images, (B, 3, size, size)."""
    i = np.arange(3 * batch * size * size)
    pixels = np.cos(0.0171 * i + 0.2 * np.sin(0.0009 * i))
    return torch.from_numpy(pixels.reshape(batch, 3, size, size).astype(np.float32))


def make_jpegs(folder: Path, train: int = 16, val: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """An ImageNet-style folder of real JPEGs, as many a class: train/<class>/*.jpg and val/<class>/*.jpg."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k, label in enumerate(classes):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 50, 3), dtype=np.uint8)
                pixels[..., k % 3] += 120
                Image.fromarray(pixels).save(place / f"{i:03}.jpg")
    return folder


@pytest.fixture
def jpegs(tmp_path: Path) -> Callable[..., Path]:
    """`make_jpegs` in a folder of the test's own."""

    def make(train: int = 16, val: int = 6, classes: tuple[str, ...] = ("cat", "dog"), name: str = "images") -> Path:
        return make_jpegs(tmp_path / name, train, val, classes)

    return make


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    """A WebDataset shard of files by their names, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def make_shards(folder: Path, broken: Collection[tuple[str, int, int]] = ()) -> list[str]:
    """Two WebDataset shards a split, of real JPEGs, with timm's _info.json → the flags that name them.

    Each image has a label of its own, counted through the split. `broken`: (split, shard, place) of no images.
    """
    pytest.importorskip("webdataset")
    folder.mkdir()
    info = {}
    for split, count in (("train", 24), ("validation", 10)):
        names = [f"digits-{split}-{shard:04}.tar" for shard in range(2)]
        for shard, name in enumerate(names):
            files = {}
            for i in range(count // 2):
                jpeg = io.BytesIO()
                Image.new("RGB", (40, 40), (20 * i, 100 * shard, 0)).save(jpeg, "JPEG")
                files[f"{shard}{i:03}.jpg"] = b"no JPEG" if (split, shard, i) in broken else jpeg.getvalue()
                files[f"{shard}{i:03}.cls"] = str(i + shard * count // 2).encode()
            write_shard(folder / name, files)
        info[split] = {"name": split, "filenames": names, "shard_lengths": [count // 2] * 2, "num_samples": count}
    (folder / "_info.json").write_text(json.dumps({"splits": info}))
    return ["--data-set", "wds/digits", "--data-path", str(folder)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory of a given size, such as "100k", that really fills up; needs to be root."""
    place = tmp_path / "disk"

    def mount(size: str) -> Path:
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting a small disk needs root: {done.stderr.decode().strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def environment(**env: str) -> dict[str, str]:
    """What a process of a test's own sees: no launcher's variables, and as many threads as the tests have."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | {"OMP_NUM_THREADS": "1"} | env


def command(*args: str, entry: str = "deit/main.py", processes: int = 0) -> list[str]:
    """The command line of an entry point, under torchrun where `processes` is not 0."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(ROOT / entry), *args]


def run(
    *args: str, cwd: Path, entry: str = "deit/main.py", processes: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs an entry point to its end, as a process of its own, from the folder `cwd`."""
    return subprocess.run(
        command(*args, entry=entry, processes=processes),
        cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run with AugMask that was left alone → its flags without the folder, its folder, what it said."""
    place = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = make_jpegs(place / "images", train=16, val=5, classes=("cat", "dog", "owl"))
    flags = ["--data-path", str(data), *RANDOM]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        start(*flags, "--output-dir", str(place / "out"))
    torch.set_num_threads(threads)
    return flags, place / "out", said.getvalue()


@pytest.fixture
def continued(finished, tmp_path):
    """A copy of the finished run, to go on with → all its flags, its folder."""
    flags, out, _ = finished
    shutil.copytree(out, tmp_path / "copy")
    return [*flags, "--output-dir", str(tmp_path / "copy")], tmp_path / "copy"


def shard_flags(folder: Path, **kwargs: Any) -> list[str]:
    return [*make_shards(folder, **kwargs), "--nb-classes", "24", "--batch-size", "4", *RANDOM]
