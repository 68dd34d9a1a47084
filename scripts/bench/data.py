"""How fast images come in: input pipelines on JPEGs, in one process, and the share of a training's time that is spent
waiting for data."""

from __future__ import annotations

import io
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.args import EMBEDDED
from common.checkpoint.state import as_json
from common.data.bad_samples import BadSampleCounter
from common.data.datasets import ImageStream, open_dataset
from common.data.fast.recorder import FastTransform
from common.data.images import to_rgb
from common.data.loader import AugmentedDataset, FastAugmentedDataset, build_train_loader, iterate_epoch
from common.data.protocols import Subset
from common.data.transforms import training_stages, training_transform
from common.data_config import augment_config, dataset_config, loader_config
from common.distributed import Process, init_distributed
from common.engine import LossMeter, train_epoch
from common.recipe import Recipe
from common.rng import seed_everything
from common.trainer import Trainer
from scripts.bench import report
from scripts.bench.args import BenchArgs, Mode
from scripts.bench.cases import build_mode_trainer, prepare_modes
from scripts.bench.report import format_spread, summarize, summarize_ratios

WIDTH, HEIGHT = 500, 375  # of most of ImageNet's photographs
CLASSES = ("a", "b")


def create_pipelines(args: BenchArgs, data: Any) -> dict[str, Callable[[int], Any]]:
    """Create functions that load an image by index; the others are compared with the first.

    "PIL" is timm's transform, as in the published trainers; "fast" the host's part of `--input fast`, the rest of which
    is done on the device; "decoding" PIL's decoding to RGB alone, which is the part that no transform can save.
    """
    pil = AugmentedDataset(data, training_transform(augment_config(args)))
    fast = FastAugmentedDataset(data, FastTransform(*training_stages(augment_config(args))))
    return {
        "PIL": lambda index: pil[index % len(data), index],
        "fast": lambda index: fast[index % len(data), index],
        "decoding": lambda index: to_rgb(data[index % len(data)][0]),
    }


def measure_pipelines(recipes: Sequence[Recipe], flags: Sequence[str]) -> None:
    """Run `benchmark.py data`: images/s of one core on JPEGs, with the augmentation of each recipe."""
    with tempfile.TemporaryDirectory() as folder:
        args_of = {recipe.name: prepare_modes("data", recipe, flags, folder)[0].args for recipe in recipes}
        args = next(iter(args_of.values()))
        images = f"images of {args.data_path}"
        if args.data_path == folder:
            make_data(args, min(64, args.images))
            images = f"JPEGs of {WIDTH} x {HEIGHT}"
        torch.set_num_threads(1)
        results = [pipeline_results(name, recipe_args) for name, recipe_args in args_of.items()]
    base, *others = results[0]["to_first"]
    rows = [["images/s on one core", "augmentation", base, *others, *(f"{name} / {base}" for name in others)]]
    for result in results:
        speeds = [format_spread(speed, 1) for speed in result["images_per_second"].values()]
        ratios = [f"{result['to_first'][name]['median']:.2f}" for name in others]
        rows.append([result["name"], result["augmentation"], *speeds, *ratios])
    subject = f"{images}, {args.images} a round"
    process, tables = Process(torch.device("cpu")), [report.align_columns(rows)]
    report.write_report("data", recipes, args, process, results, tables, subject)


def pipeline_results(recipe: str, args: BenchArgs) -> dict[str, Any]:
    """Time a recipe's pipelines in interleaved rounds, over the same images in each.

    Raises:
        ValueError: the data set is a stream.
    """
    data = open_dataset(dataset_config(args), train=True)
    if isinstance(data, ImageStream):
        raise ValueError(f"--data-set {args.data_set}: a stream without random access; choose a folder of images")
    pipelines = create_pipelines(args, data)
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for load in pipelines.values():
        load(0)
    for number in range(args.rounds):
        for name, load in pipelines.items():
            start = time.perf_counter()
            for index in range(number * args.images, (number + 1) * args.images):
                load(index)
            seconds[name].append((time.perf_counter() - start) / args.images)
    base = next(iter(seconds.values()))
    return {
        "name": recipe,
        "augmentation": "ThreeAugment" if args.aa == "3a" else f"RandAugment {args.aa}" if args.aa else "none",
        "args": as_json(vars(args)),
        "images_per_second": {name: summarize([1 / value for value in values]) for name, values in seconds.items()},
        "ms_per_image": {name: summarize([1000 * value for value in values]) for name, values in seconds.items()},
        "to_first": {name: summarize_ratios(base, values) for name, values in seconds.items()},
    }


def make_data(args: BenchArgs, images: int) -> None:
    """Make photographs in the folder of the data, as files and, for a data set of shards, in a shard."""
    folder = make_photographs(Path(args.data_path), images)
    if args.data_set.startswith("wds/"):
        pack_shards(folder)


def make_photographs(folder: Path, images: int) -> Path:
    """Make a folder of JPEGs like ImageNet's: random crops of 500 x 375 pixels, flips and brightness of the two
    photographs that come with scikit-learn; quality 95, so 60 to 100 kB each."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for split, count in (("train", images), ("val", len(CLASSES))):
        for number in range(count):
            photograph = photographs[number % len(photographs)]
            top, left = (rng.integers(0, size - side + 1) for size, side in zip(photograph.shape, (HEIGHT, WIDTH)))
            crop = photograph[top : top + HEIGHT, left : left + WIDTH][:, :: rng.choice([-1, 1])]
            crop = (crop * rng.uniform(0.8, 1.0)).astype(np.uint8)
            path = folder / split / CLASSES[number % len(CLASSES)] / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop).save(path, quality=95)
    return folder


def pack_shards(folder: Path) -> None:
    """Pack each split of an ImageNet-style folder into a WebDataset shard, and write timm's _info.json."""
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


def measure_training(recipe: Recipe, flags: Sequence[str]) -> None:
    """Run `benchmark.py end-to-end`: short epochs with DataLoader workers."""
    with tempfile.TemporaryDirectory() as folder:
        modes = prepare_modes("end-to-end", recipe, flags, folder)
        args = modes[0].args
        if args.data_path == folder and args.data_set not in EMBEDDED:
            make_data(args, args.images)
        with init_distributed(args.device) as process:
            trainings = [prepare_training(recipe, mode, process, args.images) for mode in modes]
            try:
                for _ in range(args.rounds):
                    for training in trainings:
                        training.run_epoch()
            finally:
                for training in trainings:
                    training.loader._iterator = None  # ends its workers
            results = [training.results() for training in trainings]
            rows = [["", "images/s", "waiting for data", "loader processes"]]
            for result in results:
                speed, waiting = format_spread(result["images_per_second"], 1), f"{result['waiting']['median']:.1%}"
                rows.append([result["name"], speed, waiting, str(result["loader_processes"])])
            report.write_report("end-to-end", [recipe], args, process, results, [report.align_columns(rows)])


@dataclass
class Training:
    """Short epochs of a mode, each timed from when its first batch has come, so that the workers have started."""

    mode: Mode
    trainer: Trainer
    loader: Any
    batches: int  # of an epoch
    epochs: list[tuple[int, float, float]] = field(default_factory=list)  # images, seconds, seconds waiting for data

    def run_epoch(self) -> None:
        """Train for an epoch with the training loop itself."""
        epoch = len(self.epochs)
        seed_everything(self.mode.args.seed, 0, epoch)
        times: list[tuple[float, float, int]] = []
        batches = time_batches(iterate_epoch(self.loader, epoch), times)
        meter = LossMeter(self.trainer, epoch, math.ceil(self.batches / self.trainer.accum_steps))
        bad_samples = BadSampleCounter(len(self.loader.dataset), "training", print)
        for _ in train_epoch(self.trainer, batches, self.batches, meter, bad_samples, self.mode.args.log_interval):
            pass
        seconds = time.perf_counter() - times[0][1]
        wait_seconds = sum(received - asked for asked, received, _ in times[1:])
        self.epochs.append((sum(images for *_, images in times), seconds, wait_seconds))

    def results(self) -> dict[str, Any]:
        """Summarize the epochs."""
        return {
            "name": self.mode.name,
            "kind": self.mode.kind,
            "reference": self.mode.reference,
            "loader_processes": self.loader.num_workers,
            "images_per_second": summarize([images / seconds for images, seconds, _ in self.epochs]),
            "waiting": summarize([wait / seconds for _, seconds, wait in self.epochs]),
        }


def time_batches(batches: Iterable[Any], times: list[tuple[float, float, int]]) -> Iterator[Any]:
    """Yields batches and appends for each when it was asked for, when it came, and its images."""
    stream = iter(batches)
    while True:
        asked = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            return
        times.append((asked, time.perf_counter(), len(batch[1])))
        yield batch


def prepare_training(recipe: Recipe, mode: Mode, process: Process, images: int) -> Training:
    """Build loader and trainer of a mode, over the first `images` of the data set.

    Raises:
        ValueError: bad settings, or fewer images than two batches.
    """
    data: Any = open_dataset(dataset_config(mode.args), train=True)
    if not isinstance(data, ImageStream):
        data = Subset(data, images)
    loader, batches = build_train_loader(data, loader_config(mode.args), augment_config(mode.args), process)
    batches = min(batches, images // mode.args.batch_size)
    if batches < 2:
        raise ValueError(f"--images {images}: less than two batches; pass at least {2 * mode.args.batch_size}")
    return Training(mode, build_mode_trainer(recipe, mode, process, batches), loader, batches)
