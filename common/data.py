"""Data sets, transforms and loaders, and the embedded digits.

Which image comes when, and how it is augmented, follows from (seed, epoch, place in the epoch) alone: neither the
number of loader processes nor their timing plays a part. Unreadable images are named, counted and replaced.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers import reader_wds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from common import signals
from common.args import DIGITS, mixup_active
from common.dist import Process

# what PIL and the readers raise on files that are no image, cut short, or too large to be one; RuntimeError is timm's
# word for a sample that failed as often as it was tried
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error,
              zipfile.BadZipFile, Image.DecompressionBombError)  # fmt: skip
UNREADABLE_SHARE = 0.01
REPEATS = 3


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, of which a fifth (360, all classes alike) is for evaluation.

    Items: (PIL image in RGB, label). The 8x8 grey levels are enlarged to 32x32, bicubic, so that crops have places
    between the pixels to choose from.
    """

    classes: ClassVar = [str(digit) for digit in range(10)]

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        images, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        grey = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.images = [
            Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in grey
        ]
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


class INaturalist(datasets.VisionDataset):
    """iNaturalist 2018 or 2019 at one level of the taxonomy, from the competition's JSON files.

    Args:
        root: folder with train{year}.json, val{year}.json, categories.json and the images.
        train: which of the two lists.
        year: 2018 or 2019.
        category: level of the taxonomy, a key of categories.json.
    """

    def __init__(self, root: str, train: bool, year: int, category: str):
        super().__init__(root)
        names = {entry["id"]: entry[category] for entry in self._read("categories.json")}
        lists = {split: self._read(f"{split}{year}.json") for split in ("train", "val")}
        used = {split: {names[a["category_id"]] for a in lists[split]["annotations"]} for split in lists}
        self.class_to_idx = {name: index for index, name in enumerate(sorted(used["train"] | used["val"]))}
        self.classes = sorted(used["train" if train else "val"])
        chosen = lists["train" if train else "val"]
        files = {image["id"]: image["file_name"] for image in chosen["images"]}
        self.samples = [
            (str(Path(root, files[a["image_id"]])), self.class_to_idx[names[a["category_id"]]])
            for a in chosen["annotations"]
        ]

    def _read(self, name: str) -> Any:
        return json.loads(Path(self.root, name).read_text())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return datasets.folder.default_loader(path), target


class ZipFolder(datasets.VisionDataset):
    """Images in <split>.zip, listed with their labels in <split>_map.txt: a path in the archive, a tab, a number."""

    def __init__(self, root: Path, split: str):
        super().__init__(root)
        self.archive = root / f"{split}.zip"
        lines = (root / f"{split}_map.txt").read_text().splitlines()
        self.samples = [(path, int(label)) for path, _, label in (line.partition("\t") for line in lines if line)]
        self.classes = [str(label) for label in range(1 + max(label for _, label in self.samples))]
        self.opened: tuple[int, zipfile.ZipFile] | None = None
        with zipfile.ZipFile(self.archive) as archive:
            missing = {path for path, _ in self.samples} - set(archive.namelist())
        if missing:
            raise OSError(f"{self.archive.name} does not hold {min(missing)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        if self.opened is None or self.opened[0] != os.getpid():  # a file position is not shared with other processes
            self.opened = os.getpid(), zipfile.ZipFile(self.archive)
        return Image.open(io.BytesIO(self.opened[1].read(path))), label


def open_data_set(args: argparse.Namespace, train: bool) -> Dataset:
    """The training or evaluation images as (PIL image, label).

    Raises:
        ValueError: the folder or its files are missing or empty, or the package that reads the data set is.
    """
    name, root = args.data_set, args.data_path
    if root is not None and not Path(root).exists():
        raise ValueError(f"--data-path {root}: there is no such folder")
    try:
        if name == DIGITS:
            return Digits(train)
        if name == "IMNET" and args.zip:
            return ZipFolder(Path(root), "train" if train else "val")
        if name == "IMNET":
            place = find_folder(Path(root), train)
            if not train and (Path(root) / "train").is_dir():  # labels are numbers: a class that is missing shifts them
                check_same([p.name for p in (Path(root) / "train").iterdir() if p.is_dir()],
                           [p.name for p in place.iterdir() if p.is_dir()])  # fmt: skip
            return datasets.ImageFolder(str(place))
        if name in ("CIFAR", "CIFAR10"):
            return (datasets.CIFAR10 if name == "CIFAR10" else datasets.CIFAR100)(root, train=train)
        if name in ("INAT", "INAT19"):
            return INaturalist(root, train, 2019 if name == "INAT19" else 2018, args.inat_category)
        return create_dataset(
            name,
            root=root,
            split=args.train_split if train else args.val_split,
            is_training=train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except (
        OSError,
        RuntimeError,
        AssertionError,
        ImportError,
        LookupError,
        NameError,
        json.JSONDecodeError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).replace("You can use download=True to download it", "").split())
        reason = reason or type(error).__name__
        raise ValueError(f"--data-set {name}: no images could be read from {root or name} ({reason})") from error


def find_folder(root: Path, train: bool) -> Path:
    """Where the training or the evaluation images lie below a data set's folder.

    Raises:
        ValueError: it has no such folder.
    """
    places = [root / "train"] if train else [root / "val", root / "validation"]
    place = next((p for p in places if p.is_dir()), None)
    if place is None:
        wanted = " or ".join(p.name for p in places)
        raise ValueError(f"{root} has no folder {wanted}: train/<class>/*.jpg and val/<class>/*.jpg are needed")
    return place


def check_classes(train: Dataset, val: Dataset) -> int | None:
    """The number of classes, where the data set tells it.

    Raises:
        ValueError: the two parts have different classes.
    """
    ours, theirs = _classes(train), _classes(val)
    if ours is None or theirs is None:
        return None
    check_same(ours, theirs)
    return len(ours)


def check_same(ours: list[str], theirs: list[str]) -> None:
    """Raises ValueError where the classes of the training images are not those of the evaluation images."""
    for some, other, which, missing in ((ours, theirs, "train", "val"), (theirs, ours, "val", "train")):
        extra = sorted(set(some) - set(other))
        if extra:
            raise ValueError(
                f"the training and the evaluation images have different classes: {len(extra)} of {which}, such as "
                f"{extra[0]!r}, are not in {missing}"
            )


def _classes(data: Dataset) -> list[str] | None:
    for holder in (data, getattr(data, "reader", None)):
        known = getattr(holder, "classes", None) or getattr(holder, "class_to_idx", None)
        if known:
            return list(known)
    return None


NONE = -1  # label of an item without an image
Item = tuple[Tensor, int, tuple[str, ...]]


class Views(Dataset):
    """Transformed images of a data set, each drawn from a random state of its own.

    Item (index, seed) → (image (3, H, W), label, names of what could not be read: none or one). Where `replace` is set
    another image, drawn at random, takes the place of one that cannot be read; else, and where a hundred drawn in its
    place cannot be read either, there is no image and the label is `NONE`.
    """

    def __init__(self, data: Any, transform: Callable[[Image.Image], Tensor], replace: bool = True):
        self.data, self.transform, self.replace = data, transform, replace
        if hasattr(data, "_max_retries"):  # timm replaces unreadable images too, without a count
            data._max_retries = 1

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        index, seed = place
        others = random.Random(seed)
        at = index
        unreadable: tuple[str, ...] = ()
        for _ in range(100 if self.replace else 1):
            try:
                image, label = self.data[at]
                with drawn_from(seed):
                    return self.transform(image.convert("RGB")), int(label), unreadable
            except UNREADABLE:
                unreadable, at = (self.name_of(index),), others.randrange(len(self))
        return torch.zeros(3, 1, 1), NONE, unreadable

    def name_of(self, index: int) -> str:
        """Path of an image, or what else names it."""
        samples = getattr(self.data, "samples", None)
        if samples is not None:
            return str(samples[index][0])
        try:
            return str(self.data.filename(index, absolute=True))
        except (AttributeError, NotImplementedError, TypeError):
            return f"image {index}"


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within it python's, numpy's and torch's random numbers come from one seed; their states come back after."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
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


class Broken(NamedTuple):
    """Stands for an image of a shard that could not be decoded."""

    name: str


class Stream(IterableDataset):
    """Transformed images of a timm data set that is read from front to back, such as WebDataset shards.

    Items are those of `Views`. An epoch's order and augmentation follow from (seed, epoch, rank) and the number of
    loader processes, not from the epochs before it.

    Args:
        data: timm's data set.
        transform: PIL image → (3, H, W).
        seed: of the run.
        process: this one.
        train: the reader shuffles, gives each process its share, and the image before takes the place of one that
            cannot be read. Else every process reads the whole and keeps each world_size-th image.
    """

    def __init__(self, data: Any, transform: Callable[[Image.Image], Tensor], seed: int, process: Process, train: bool):
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
        if isinstance(self.data.reader, reader_wds.ReaderWds):
            restart_shards(self.data.reader, draw.randrange(2**62))
        images = self._replaced() if self.train else self._share()
        for image, label, unreadable in images:
            with drawn_from(draw.randrange(2**62)):
                tensor = torch.zeros(3, 1, 1) if image is None else self.transform(image.convert("RGB"))
                yield tensor, int(label), unreadable

    def _share(self) -> Iterator[tuple[Image.Image | None, int, tuple[str, ...]]]:
        for image, label in islice(self.data, self.process.rank, None, self.process.world_size):
            if isinstance(image, Broken):
                yield None, NONE, (image.name,)
            else:
                yield image, label, ()

    def _replaced(self) -> Iterator[tuple[Image.Image | None, int, tuple[str, ...]]]:
        good: tuple[Image.Image, int] | None = None
        waiting: list[str] = []  # names of those before the first that could be read
        for image, label in self.data:
            if not isinstance(image, Broken):
                good = image, label
                yield *good, ()
                yield from ((*good, (name,)) for name in waiting)
                waiting.clear()
            elif good is not None:
                yield *good, (image.name,)
            else:
                waiting.append(image.name)
        yield from ((None, NONE, (name,)) for name in waiting)


def restart_shards(reader: reader_wds.ReaderWds, seed: int) -> None:
    """Makes a reader of shards shuffle from `seed` at its next pass, and give a `Broken` for what it cannot decode.

    timm's shuffle begins anew with each start of the program and runs on from one epoch to the next, and what it
    cannot decode it leaves out.
    """
    decode = reader_wds._decode

    def decode_or_name(sample: dict[str, Any], **how: Any) -> Any:
        try:
            return decode(sample, **how)
        except UNREADABLE:
            name = f"{sample['__key__']} of {sample['__url__']}"
            return {"jpg": Broken(name), "target": NONE, "json": None}

    reader._lazy_init()  # learns which loader process it is in
    reader.worker_seed = seed
    reader_wds._decode = decode_or_name
    try:
        reader._lazy_init()  # makes its pipeline, from the seed
    finally:
        reader_wds._decode = decode


def collate(batch: list[Item]) -> tuple[Tensor, Tensor, list[str]]:
    """→ images (B, 3, H, W), labels (B,), of which `NONE` has a blank for an image, and names of unreadable ones."""
    there = [image for image, label, _ in batch if label != NONE]
    blank = torch.zeros_like(there[0]) if there else torch.zeros(3, 1, 1)
    images = torch.stack([image if label != NONE else blank for image, label, _ in batch])
    labels = torch.tensor([label for _, label, _ in batch])
    return images, labels, [name for _, _, names in batch for name in names]


def training_loader(args: argparse.Namespace, data: Any, process: Process) -> tuple[DataLoader, int]:
    """Shuffled batches of augmented images, and how many of them make an epoch on every process.

    Raises:
        ValueError: there are fewer images than processes, or than one batch of all of them.
    """
    if len(data) < process.world_size:
        raise ValueError(f"{process.world_size} processes for {len(data)} training images: start fewer processes")
    transform = training_transform(args)
    views: Any
    sampler: Any
    workers = args.num_workers
    if isinstance(data, IterableDataset):
        views, sampler = Stream(data, transform, args.seed, process, train=True), None
        shards = len(getattr(getattr(data.reader, "split_info", None), "filenames", ()))  # type: ignore[attr-defined]
        if shards:  # a loader process without a shard of its own would end the epoch
            workers = min(workers, shards // process.world_size)
            if shards < process.world_size:
                raise ValueError(f"{process.world_size} processes for {shards} shards: start fewer processes")
        length = len(data)  # type: ignore[arg-type]  # of this process: timm's readers divide
    else:
        if args.repeated_aug:
            order: Any = RepeatAugSampler(
                data, process.world_size, process.rank, num_repeats=args.aug_repeats or REPEATS
            )
        else:
            order = DistributedSampler(data, process.world_size, process.rank, seed=args.seed, drop_last=True)
        sampler = SeededSampler(order, args.seed, process.rank)
        views = Views(data, transform)
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
        num_workers=workers,
        pin_memory=args.pin_mem and process.device.type == "cuda",
        persistent_workers=workers > 0,
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
        views = Views(data, evaluation_transform(args), replace=False)
        order = [(index, 0) for index in range(process.rank, len(data), process.world_size)]
    return DataLoader(
        views,
        batch_size=int(1.5 * args.batch_size),
        sampler=order,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and process.device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=signals.ignore,
    )


def training_transform(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """timm's training transform. With `args.src` a resize and a crop after padding by 4 pixels stand in for the random
    resized crop."""
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
    return transforms.Compose([crop, change, finish])


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
