"""Damaged image files through each input pipeline: an image comes out or the file is refused, and no process crashes.

    python -m tests.fuzz --files 2000

The files of each format are read in a process of their own, so that a signal is seen; the next process goes on after
the file at which it came. Exits with 1 after a crash, a hang, or an error that is not one of `READ_ERRORS`.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.args import parse
from common.data.datasets import FileDataset
from common.data.fast.recorder import FastTransform
from common.data.loader import AugmentedDataset, FastAugmentedDataset
from common.data.transforms import training_stages, training_transform
from common.data_config import augment_config
from deit.recipe import RECIPE

PIPELINES = ("pil", "fast")
HANG_S = 60.0  # a file that takes longer is a hang
PENDING, IMAGE, REFUSED, ERROR = range(4)  # states of a file
# PIL's mode and the options of saving it, for each kind of file
FILES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "JPEG": [("RGB", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {}),
             ("RGB", {"restart_marker_blocks": 2})],
    "PNG": [("RGB", {}), ("RGBA", {}), ("P", {"transparency": 3}), ("L", {}), ("LA", {}), ("I;16", {}), ("1", {})],
    "WEBP": [("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", {}), ("RGB", {"save_all": True, "append": True})],
    "BMP": [("RGB", {}), ("P", {}), ("L", {}), ("1", {})],
    "TIFF": [("RGB", {}), ("RGB", {"compression": "tiff_lzw"}), ("RGB", {"compression": "tiff_deflate"}),
             ("RGB", {"compression": "jpeg"}), ("1", {"compression": "group4"}), ("I;16", {}), ("F", {}),
             ("RGBA", {"compression": "packbits"}), ("CMYK", {})],
}  # fmt: skip


@dataclass
class Outcome:
    """What became of the files of a format in a pipeline."""

    images: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)  # crashes, hangs and unexpected errors, with the file's number


def whole_file(kind: str, number: int) -> bytes:
    """A file of a format, in one of its modes and codings."""
    modes = FILES[kind]
    mode, options = modes[number % len(modes)]
    pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((48, 36), Image.Resampling.BICUBIC)
    if mode in ("I;16", "F"):
        grey = np.asarray(image.convert("L"))
        image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    if options.get("append"):
        options = {"save_all": True, "append_images": [image.rotate(90)]}
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def damaged_file(kind: str, number: int) -> bytes:
    """A file with bytes changed anywhere or in its header, cut off, cut out, put in, or moved."""
    draw = np.random.default_rng([number, list(FILES).index(kind)])
    content = bytearray(whole_file(kind, int(draw.integers(1000))))
    repack = kind == "PNG" and draw.integers(3) > 0
    if repack:  # else most are refused for a checksum, before they reach the decoder
        content = bytearray(map_chunks(content, zlib.decompress))
    size = len(content)
    start, end = sorted(draw.integers(0, size, 2).tolist())
    way = draw.integers(7)
    if way == 0:
        del content[start:]
    elif way == 1:
        del content[start : start + int(draw.integers(1, 40))]
    elif way == 2:
        content[start:start] = draw.bytes(int(draw.integers(1, 40)))
    elif way == 3:
        content[start : start + 20] = content[end : end + 20]
    elif way == 4:  # a length or an offset
        value = [b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x80\x00"]
        content[start : start + 4] = value[int(draw.integers(len(value)))]
    else:
        last = size if way == 5 else min(size, 200)
        for place in draw.integers(0, last, int(draw.integers(1, 6))):
            content[place] = int(draw.integers(256))
    return map_chunks(content, zlib.compress) if repack else bytes(content)


def map_chunks(content: bytes | bytearray, change: Callable[[bytes], bytes]) -> bytes:
    """A PNG with other pixel data, and the right length and checksum of each chunk."""
    start, parts = 8, [bytes(content[:8])]
    while start + 8 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        kind, data = bytes(content[start + 4 : start + 8]), bytes(content[start + 8 : end])
        data = change(data) if kind == b"IDAT" else data
        parts += [len(data).to_bytes(4, "big"), kind, data, zlib.crc32(kind + data).to_bytes(4, "big")]
        start = end + 4
    return b"".join(parts)


class DamagedFiles(FileDataset):
    """As many damaged files of a format."""

    def __init__(self, kind: str, files: int):
        super().__init__([(f"{kind} {number}", 0) for number in range(files)], ["x"])
        self.kind = kind

    def read_encoded(self, index: int) -> tuple[bytes, int]:
        return damaged_file(self.kind, index), 0


def create_views(kind: str, pipeline: str, files: int) -> AugmentedDataset:
    """The files as a pipeline gives them to training."""
    args = parse(RECIPE, ["--data-path", "x", "--input-size", "32", "--input", pipeline])
    data, augment = DamagedFiles(kind, files), augment_config(args)
    if pipeline == "fast":
        return FastAugmentedDataset(data, FastTransform(*training_stages(augment)), replace=False)
    return AugmentedDataset(data, training_transform(augment), replace=False)


def read_files(kind: str, pipeline: str, states: Tensor, first: int) -> None:
    """Read files from the number `first` on and set their states, which another process watches."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of PIL, such as "Corrupt EXIF data"
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes each of its errors
    views = create_views(kind, pipeline, len(states))
    for number in range(first, len(states)):
        try:
            _, _, unreadable = views[number, number]
            states[number] = REFUSED if unreadable else IMAGE
        except Exception:
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            states[number] = ERROR


def fuzz(kind: str, pipeline: str, files: int) -> Outcome:
    """Read damaged files of a format through a pipeline."""
    states, faults = torch.full((files,), PENDING, dtype=torch.uint8).share_memory_(), []
    context = multiprocessing.get_context("fork")
    first = 0
    while first < files:
        process = context.Process(target=read_files, args=(kind, pipeline, states, first))
        process.start()
        done = -1
        while process.is_alive() and done != (done := int((states != PENDING).sum())):
            process.join(HANG_S)
        fault = "hangs" if process.is_alive() else f"ends with {process.exitcode}"
        if process.is_alive():
            process.kill()
            process.join()
        elif process.exitcode and process.exitcode < 0:
            fault = f"ends with {signal.Signals(-process.exitcode).name}"
        pending = (states[first:] == PENDING).nonzero()
        if not len(pending):
            break
        first += int(pending[0])
        faults.append(f"{kind} {first}: {fault}")
        states[first] = ERROR
        first += 1
    known = {fault.partition(":")[0] for fault in faults}
    errors = (states == ERROR).nonzero().flatten().tolist()
    faults += [f"{kind} {number}: unexpected error" for number in errors if f"{kind} {number}" not in known]
    return Outcome(int((states == IMAGE).sum()), int((states == REFUSED).sum()), faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000, help="of each format, in each pipeline")
    files = parser.parse_args().files
    faults: list[str] = []
    for kind in FILES:
        for pipeline in PIPELINES:
            start = time.perf_counter()
            outcome = fuzz(kind, pipeline, files)
            faults += outcome.faults
            print(
                f"{kind} with --input {pipeline}: {files} files, {outcome.images} images, {outcome.refused} refused, "
                f"{len(outcome.faults)} faults, {time.perf_counter() - start:.0f} s",
                *outcome.faults,
                sep="\n",
                flush=True,
            )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
