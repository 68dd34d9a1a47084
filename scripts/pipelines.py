"""How fast images come in: the training pipelines, measured on JPEGs in one process, and the share of a real training's
time that is spent waiting for them."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset

from common.data import open_data_set
from common.dist import Process, seed_everything
from common.engine import Trainer, Unreadable, Watch, train_one_epoch
from common.fast import FastTransform
from common.loader import FastViews, Views, batches_of, training_loader, training_stages, training_transform
from common.recipe import Recipe
from scripts.options import Mode
from scripts.timing import build

Pipeline = Callable[[argparse.Namespace, Any], Callable[[int], Any]]
WIDTH, HEIGHT = 500, 375  # of most of ImageNet's photographs
CLASSES = ("a", "b")


def pil(args: argparse.Namespace, data: Any) -> Callable[[int], Any]:
    """timm's transform on PIL's images, as in the published trainers."""
    views = Views(data, training_transform(args))
    return lambda index: views[index % len(data), index][0]


def decoding(args: argparse.Namespace, data: Any) -> Callable[[int], Any]:
    """PIL's decoding to RGB alone, which is what no transform can save."""
    return lambda index: data[index % len(data)][0].convert("RGB")


def fast(args: argparse.Namespace, data: Any) -> Callable[[int], Any]:
    """What `--input fast` leaves to the host; the rest is done on the device."""
    views = FastViews(data, FastTransform(*training_stages(args)))
    return lambda index: views[index % len(data), index][0]


PIPELINES: dict[str, Pipeline] = {
    "PIL": pil,
    "fast": fast,
    "decoding": decoding,
}  # the first is what the others are compared with


@dataclass
class Measured:
    """A recipe's pipelines.

    Args:
        seconds: an image, one entry a round, by pipeline.
    """

    name: str
    augmentation: str
    seconds: dict[str, list[float]] = field(default_factory=dict)


def make_data(args: argparse.Namespace, images: int) -> None:
    """Photographs in the folder of the data, as files or, where the data set is one of shards, in a shard."""
    folder = make_photographs(Path(args.data_path), images)
    if args.data_set.startswith("wds/"):
        pack(folder)


def make_photographs(folder: Path, images: int) -> Path:
    """A folder of JPEGs as ImageNet has them: 500 x 375 pixels cut from the two photographs that come with
    scikit-learn, each at a place, a side and a brightness of its own; quality 95, so 60 to 100 kB each."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    photographs = load_sample_images().images
    for split, count in (("train", images), ("val", len(CLASSES))):
        for place in range(count):
            photograph = photographs[place % len(photographs)]
            top, left = (draw.integers(0, size - side + 1) for size, side in zip(photograph.shape, (HEIGHT, WIDTH)))
            cut = photograph[top : top + HEIGHT, left : left + WIDTH][:, :: draw.choice([-1, 1])]
            cut = (cut * draw.uniform(0.8, 1.0)).astype(np.uint8)
            path = folder / split / CLASSES[place % len(CLASSES)] / f"{place:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = io.BytesIO()
            Image.fromarray(cut).save(encoded, "JPEG", quality=95)
            path.write_bytes(encoded.getvalue())
    return folder


def pack(folder: Path) -> None:
    """Adds a WebDataset shard of each split of an ImageNet-style folder, and timm's _info.json of them."""
    splits: dict[str, dict[str, Any]] = {}
    for split, source in (("train", "train"), ("validation", "val")):
        paths = sorted((folder / source).rglob("*.jpg"), key=lambda path: path.name)
        name = f"{split}-0000.tar"
        with tarfile.open(folder / name, "w") as shard:
            for path in paths:
                shard.add(path, path.name)
                label = str(CLASSES.index(path.parent.name)).encode()
                entry = tarfile.TarInfo(path.with_suffix(".cls").name)
                entry.size = len(label)
                shard.addfile(entry, io.BytesIO(label))
        splits[split] = {"name": split, "filenames": [name], "shard_lengths": [len(paths)], "num_samples": len(paths)}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


def measure_pipelines(rows: dict[str, argparse.Namespace], images: int, rounds: int) -> list[Measured]:
    """Times each row's pipelines in turn, in this process and on one core, which is all that it computes on from here
    on; over the same images in each round.

    Raises:
        ValueError: the data set has no order.
    """
    measured = []
    torch.set_num_threads(1)
    for name, args in rows.items():
        data = open_data_set(args, train=True)
        if isinstance(data, IterableDataset):
            raise ValueError(f"--data-set {args.data_set} is read from front to back: `data` needs a folder of images")
        row = Measured(name, "ThreeAugment" if args.aa == "3a" else f"RandAugment {args.aa}" if args.aa else "none")
        made = {pipeline: make(args, data) for pipeline, make in PIPELINES.items()}
        for load in made.values():
            load(0)
        for turn in range(rounds):
            for pipeline, load in made.items():
                start = time.perf_counter()
                for index in range(turn * images, (turn + 1) * images):
                    load(index)
                row.seconds.setdefault(pipeline, []).append((time.perf_counter() - start) / images)
        measured.append(row)
    return measured


@dataclass
class Training:
    """Short real epochs of a mode.

    Args:
        rounds: (images, seconds, of which seconds waiting for data), an entry a round; the first batch is left out.
    """

    mode: Mode
    trainer: Trainer
    loader: Any
    batches: int
    rounds: list[tuple[int, float, float]] = field(default_factory=list)

    def epoch(self) -> None:
        """Trains for an epoch with the trainer's own loop."""
        epoch = len(self.rounds)
        seed_everything(self.mode.args.seed, 0, epoch)
        watch = Waiting(batches_of(self.loader, epoch))
        train_one_epoch(
            self.trainer, watch, self.batches, epoch, Watch(self.mode.args.log_interval, lambda report: None),
            Unreadable(len(self.loader.dataset), "training", print),
        )  # fmt: skip
        self.rounds.append((watch.images, time.perf_counter() - watch.began, watch.waited))


class Waiting:
    """Batches, and the time that they were waited for after the first, which comes when the loader has started."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches
        self.images, self.waited, self.began = 0, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self.batches)
        for batch in stream:
            self.began = time.perf_counter()
            yield batch
            break
        while True:
            start = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            # the last update's wait for the device counts, so the first batch's images do too
            self.images += len(batch[0]) * (2 if not self.images else 1)
            yield batch


def prepare_training(recipe: Recipe, mode: Mode, process: Process, images: int) -> Training:
    """Data, loader processes and trainer of a mode, over the first `images` of the data set.

    Raises:
        ValueError: bad settings, or fewer images than two batches.
    """
    data: Any = open_data_set(mode.args, train=True)
    if not isinstance(data, IterableDataset):
        data = Subset(data, range(min(images, len(data))))
    loader, batches = training_loader(mode.args, data, process)
    batches = min(batches, images // mode.args.batch_size)
    if batches < 2:
        raise ValueError(f"--images {images}: two batches of --batch-size {mode.args.batch_size} are needed")
    return Training(mode, build(recipe, mode, process, batches), loader, batches)


@contextmanager
def closed(trainings: list[Training]) -> Iterator[None]:
    """Ends the loader processes at the end."""
    try:
        yield
    finally:
        for training in trainings:
            training.loader._iterator = None
