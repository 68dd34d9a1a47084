"""Small data sets for tests: a folder of JPEGs, WebDataset shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def make_jpegs(folder: Path, train: int = 16, val: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write an ImageNet-style folder, with as many JPEGs a class: train/<class>/*.jpg and val/<class>/*.jpg."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k, label in enumerate(classes):
            class_folder = folder / split / label
            class_folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 50, 3), dtype=np.uint8)
                pixels[..., k % 3] += 120
                Image.fromarray(pixels).save(class_folder / f"{i:03}.jpg")
    return folder


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    """Write a WebDataset shard of files by their names, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def make_shards(folder: Path, broken: Collection[tuple[str, int, int]] = ()) -> list[str]:
    """Write two WebDataset shards a split, of JPEGs, with timm's _info.json → the flags that name them.

    The label of an image is its index in the split. `broken`: (split, shard, index) of files that are no images.
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
