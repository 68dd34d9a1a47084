"""Loaders and transforms.

Which image comes when, and how it is augmented, follows from (seed, epoch, place in the epoch) alone: neither the
number of loader processes nor their timing plays a part. Unreadable images are named, counted and replaced.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import random
import signal
import struct
import threading
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common import signals
from common.args import mixup_active
from common.data import Shards
from common.device_augment import DeviceAugment, Raw
from common.dist import Process
from common.fast import FastTransform, fill_of

# what PIL and the readers raise on files that are no image, cut short, or too large to be one; RuntimeError is timm's
# word for a sample that failed as often as it was tried
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error,
              zipfile.BadZipFile, Image.DecompressionBombError)  # fmt: skip
UNREADABLE_SHARE = 0.01
REPEATS = 3
TOGETHER = 65_536  # images of shards that are shuffled among each other
NONE = -1  # label of an item without an image
Item = tuple[Tensor | Raw, int, tuple[str, ...]]


class Views(Dataset):
    """Transformed images of a data set, each drawn from a random state of its own.

    Item (index, seed) → (image (3, H, W), label, names of what could not be read: none or one). Where `replace` is set
    another image, drawn at random, takes the place of one that cannot be read; else, and where a hundred drawn in its
    place cannot be read either, there is no image and the label is `NONE`. `busy_with` tells in the main process what
    each of `workers` loader processes is at.
    """

    def __init__(self, data: Any, transform: Callable[[Any], Any], replace: bool = True, workers: int = 0):
        self.data, self.replace = data, replace
        self.transform: Callable[..., Any] = transform
        self.at = torch.full((max(workers, 1),), -1).share_memory_()
        if hasattr(data, "_max_retries"):  # timm replaces unreadable images too, without a count
            data._max_retries = 1

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        index, seed = place
        at, others = index, None
        worker = torch.utils.data.get_worker_info()
        slot = worker.id if worker is not None else 0
        self.at[slot] = index
        unreadable: tuple[str, ...] = ()
        for _ in range(100 if self.replace else 1):
            try:
                image, label = self.read(at)
                tensor = self.view(image, seed)
                self.at[slot] = -1
                return tensor, int(label), unreadable
            except UNREADABLE:
                others = others or random.Random(seed)
                unreadable, at = (self.name_of(index),), others.randrange(len(self))
        self.at[slot] = -1
        return torch.zeros(3, 1, 1), NONE, unreadable

    def read(self, index: int) -> tuple[Any, Any]:
        """What the transform takes, and the label."""
        image, label = self.data[index]
        return image.convert("RGB"), label

    def view(self, image: Any, seed: int) -> Any:
        """The image as the seed has it transformed."""
        with drawn_from(seed):
            return self.transform(image)

    def busy_with(self) -> list[str]:
        """The images that loader processes are at."""
        return [self.name_of(index) for index in self.at.tolist() if index >= 0]

    def name_of(self, index: int) -> str:
        """Path of an image, or what else names it."""
        samples = getattr(self.data, "samples", None)
        if samples is not None:
            return str(samples[index][0])
        try:
            return str(self.data.filename(index, absolute=True))
        except (AttributeError, NotImplementedError, TypeError):
            return f"image {index}"


class FastViews(Views):
    """Views that are decoded with their crop known, where the data set has its images as bytes; items have a `Raw` for
    an image."""

    def __init__(self, data: Any, transform: FastTransform, replace: bool = True, workers: int = 0):
        super().__init__(data, transform, replace, workers)
        self.numpy = np.random.RandomState()  # to copy the state of numpy's own takes longer than to draw a plan

    def view(self, image: Any, seed: int) -> Raw:
        self.numpy.seed(seed % 2**32)
        with drawn_from(seed, numpy=False):
            return self.transform(image, self.numpy)

    def read(self, index: int) -> tuple[Any, Any]:
        if not hasattr(self.data, "bytes_of"):
            return super().read(index)
        return self.data.bytes_of(index)


@contextmanager
def drawn_from(seed: int, numpy: bool = True) -> Iterator[None]:
    """Within it python's, torch's and, if asked for, numpy's random numbers come from one seed; their states come back
    after."""
    before = random.getstate(), np.random.get_state() if numpy else None, torch.random.get_rng_state()
    random.seed(seed)
    if numpy:
        np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        if before[1] is not None:
            np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


class SeededSampler(Sampler[tuple[int, int]]):
    """Gives each index of `order` the seed that its augmentation draws from: a hash of (seed, epoch, rank, place)."""

    def __init__(self, order: Any, seed: int, rank: int):
        self.order, self.seed, self.rank, self.epoch = order, seed, rank, 0
        self.start = 0  # places that are passed over

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seeds = np.random.default_rng([self.seed, self.epoch, self.rank]).integers(2**62, size=len(self))
        return islice(zip(self.order, seeds.tolist()), self.start, None)


class ShardOrder(Sampler[int]):
    """Images of shards in an order that stays in few shards at a time: shards are shuffled, and then the images of
    as many of them as have `TOGETHER`.

    Args:
        ends: images in the shards up to and with each.
        order: which places of that order to give; shuffles nothing itself.
        seed: of the run.
    """

    def __init__(self, ends: np.ndarray, order: Any, seed: int):
        self.ends, self.order, self.seed, self.epoch = ends, order, seed, 0

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch, 2**32 - 1])  # a seed that no rank's augmentation has
        shards = draw.permutation(len(self.ends))
        starts = np.concatenate([[0], self.ends[:-1]])
        group = np.cumsum((self.ends - starts)[shards]) // TOGETHER
        parts = []
        for number in np.unique(group):
            images = [np.arange(starts[shard], self.ends[shard]) for shard in shards[group == number]]
            parts.append(draw.permutation(np.concatenate(images)))
        shuffled = np.concatenate(parts).tolist()
        return (shuffled[place] for place in self.order)


class Stream(IterableDataset):
    """Transformed images of a timm data set that can only be read from front to back.

    Items are those of `Views`, but what cannot be read ends the run. An epoch's order and augmentation follow from
    (seed, epoch, rank), the number of loader processes, and the reader.

    Args:
        data: timm's data set.
        transform: PIL image → (3, H, W).
        seed: of the run.
        process: this one.
        train: the reader shuffles, and gives each process its share. Else every process reads the whole and keeps each
            world_size-th image.
    """

    def __init__(self, data: Any, transform: Callable[[Image.Image], Any], seed: int, process: Process, train: bool):
        self.data, self.transform, self.seed, self.process, self.train = data, transform, seed, process, train
        self.epoch = multiprocessing.Value("q", 0)  # loader processes that live on hear of it
        if not train:
            for name, alone in (("dist_rank", 0), ("dist_num_replicas", 1)):
                if hasattr(data.reader, name):
                    setattr(data.reader, name, alone)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.value = epoch
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Item]:
        worker = torch.utils.data.get_worker_info()
        draw = random.Random(repr((self.seed, self.epoch.value, self.process.rank, worker.id if worker else 0)))
        images = iter(self.data)
        if not self.train:
            images = islice(images, self.process.rank, None, self.process.world_size)
        for image, label in images:
            with drawn_from(draw.randrange(2**62)):
                yield self.transform(image.convert("RGB")), int(label), ()


def collate(batch: list[Item]) -> tuple[Tensor | Raw, Tensor, list[str]]:
    """→ images (B, 3, H, W), labels (B,), of which `NONE` has a blank for an image, and names of unreadable ones."""
    there = [image for image, label, _ in batch if label != NONE]
    blank = blank_like(there[0]) if there else torch.zeros(3, 1, 1)
    images = stacked([image if label != NONE else blank for image, label, _ in batch])
    labels = torch.tensor([label for _, label, _ in batch])
    return images, labels, [name for _, _, names in batch for name in names]


def blank_like(image: Tensor | Raw) -> Tensor | Raw:
    """Zeros in an image's place."""
    return torch.zeros_like(image) if isinstance(image, Tensor) else Raw(*map(torch.zeros_like, image))


def stacked(images: list[Any]) -> Tensor | Raw:
    """Images → a batch. Decoders have a pixel's channels together in memory, where a batch leaves them."""
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    pixels = torch.stack([raw.pixels.permute(1, 2, 0) for raw in images]).permute(0, 3, 1, 2)
    return Raw(pixels, torch.stack([raw.plan for raw in images]))


def training_loader(args: argparse.Namespace, data: Any, process: Process) -> tuple[DataLoader, int]:
    """Shuffled batches of augmented images, and how many of them make an epoch on every process.

    Raises:
        ValueError: there are fewer images than processes, or than one batch of all of them.
    """
    if len(data) < process.world_size:
        raise ValueError(f"{process.world_size} processes for {len(data)} training images: start fewer processes")
    fast = args.input == "fast"
    transform: Any = FastTransform(*training_stages(args)) if fast else training_transform(args)
    views: Any
    sampler: Any
    if isinstance(data, IterableDataset):
        views, sampler = Stream(data, transform, args.seed, process, train=True), None
        length = len(data)  # type: ignore[arg-type]  # of this process: timm's readers divide
    else:
        sharded = isinstance(data, Shards)
        among: dict[str, Any] = {"num_replicas": process.world_size, "rank": process.rank, "shuffle": not sharded}
        if args.repeated_aug:
            order: Any = RepeatAugSampler(data, num_repeats=args.aug_repeats or REPEATS, **among)
        else:
            order = DistributedSampler(data, seed=args.seed, drop_last=True, **among)
        if sharded:
            order = ShardOrder(data.ends, order, args.seed)
        sampler = SeededSampler(order, args.seed, process.rank)
        views = (FastViews if fast else Views)(data, transform, workers=args.num_workers)
        length = len(sampler)
    batches = length // args.batch_size
    if batches < 1:
        raise ValueError(
            f"{length} training images a process are fewer than one batch: --batch-size {args.batch_size} must shrink"
        )
    loader = DataLoader(
        views,
        batch_size=args.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=args.num_workers,
        timeout=args.data_timeout if args.num_workers else 0,
        pin_memory=args.pin_mem and process.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        collate_fn=collate,
        worker_init_fn=signals.ignore,
        generator=torch.Generator(),  # else the first pass of each start draws from the generator of the drops
    )
    return loader, batches


def batches_of(loader: DataLoader, epoch: int, done: int = 0) -> Iterator[Any]:
    """The batches of an epoch after the first `done`, which only a stream has to read again."""
    set_epoch(loader, epoch)
    if isinstance(loader.sampler, SeededSampler):
        loader.sampler.start = done * (loader.batch_size or 1)
        return iter(loader)
    return islice(loader, done, None)


def failure_of(loader: DataLoader | None, error: BaseException) -> str | None:
    """What PyTorch says where loader processes hang or die, in our words; None where it is of something else."""
    if loader is None:
        return None
    if isinstance(error, RuntimeError) and "DataLoader timed out" in str(error):
        busy = loader.dataset.busy_with() if isinstance(loader.dataset, Views) else []
        where = f"; they hang at {', '.join(busy)}" if busy else ""
        return f"the data-loading processes gave no batch for {loader.timeout:g} s (--data-timeout){where}"
    if (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)) or _torn(error):
        return ("a data-loading process was killed, as it is where memory runs out; fewer --num-workers need less; the "
                "same command goes on from the last checkpoint")  # fmt: skip
    return None


def _torn(error: BaseException) -> bool:
    """Whether a batch could not be fetched from the process that has it, for that one is gone."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    fetching = any(frame.f_globals.get("__name__") == reductions.__name__ for frame in frames)
    short_of_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)  # it lives then
    return isinstance(error, (OSError, EOFError)) and fetching and not short_of_files


def end_processes() -> None:
    """Ends the loader processes, also those that hang."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise over their end
    for child in multiprocessing.active_children():
        child.kill()


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tells a loader which epoch's order and augmentation come next."""
    for ordered in (loader.sampler, loader.dataset):
        if hasattr(ordered, "set_epoch"):
            ordered.set_epoch(epoch)


def evaluation_loader(args: argparse.Namespace, data: Any, process: Process) -> DataLoader:
    """This process's share of the evaluation images; the shares of all processes hold each image exactly once."""
    if isinstance(data, IterableDataset):
        views: Any = Stream(data, evaluation_transform(args), args.seed, process, train=False)
        order = None
    else:
        views = Views(data, evaluation_transform(args), replace=False, workers=args.num_workers)
        order = [(index, 0) for index in range(process.rank, len(data), process.world_size)]
    return DataLoader(
        views,
        batch_size=int(1.5 * args.batch_size),
        sampler=order,
        num_workers=args.num_workers,
        timeout=args.data_timeout if args.num_workers else 0,
        pin_memory=args.pin_mem and process.device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=signals.ignore,
    )


def training_transform(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """timm's training transform."""
    return transforms.Compose(training_stages(args))


def training_stages(args: argparse.Namespace) -> tuple[transforms.Compose, transforms.Compose, transforms.Compose]:
    """timm's training transform in three: crop and flips; policy and colour jitter; normalisation and erasing. With
    `args.src` a resize and a crop after padding by 4 pixels stand in for the random resized crop."""
    crop, change, finish = create_transform(
        args.input_size,
        is_training=True,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        separate=True,
    )
    if args.src:
        crop.transforms[0] = transforms.Compose(
            [
                transforms.Resize(args.input_size, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomCrop(args.input_size, padding=4, padding_mode="reflect"),
            ]
        )
    return crop, change, finish


def create_augment(args: argparse.Namespace, device: torch.device) -> DeviceAugment | None:
    """What is left to do on the device, or None where PIL does it all."""
    if args.input == "pil":
        return None
    _, change, finish = training_stages(args)
    normalize = next(part for part in finish.transforms if isinstance(part, transforms.Normalize))
    mean, std = (torch.as_tensor(values).tolist() for values in (normalize.mean, normalize.std))
    return DeviceAugment(device, mean, std, fill_of(change), args.remode)


def evaluation_transform(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """Resize to int(size / eval_crop_ratio), bicubic, and crop the centre."""
    return create_transform(
        args.input_size, interpolation="bicubic", crop_pct=args.eval_crop_ratio, crop_mode=args.crop_mode
    )


def create_mixup(args: argparse.Namespace, classes: int) -> Mixup | None:
    """timm's mixup and CutMix, or None where both are off."""
    if not mixup_active(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )
