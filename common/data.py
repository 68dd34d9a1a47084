"""Data sets: folders, archives, shards, timm's, and the embedded digits."""

from __future__ import annotations

import argparse
import io
import json
import mmap
import operator
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import reader_wds
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from common.args import DIGITS

PIXEL = b"P6 1 1 255 \0\0\0"  # the least that PIL takes for an image
UNKNOWN = -1  # where an image lies in its shard, before anyone has found it


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


class Files:
    """A data set that keeps each image in a file: `samples` holds paths and labels."""

    samples: list[tuple[str, int]]

    def bytes_of(self, index: int) -> tuple[bytearray, int]:
        """An image's file as it is stored, and its label.

        Raises:
            OSError: it cannot be read.
        """
        path, label = self.samples[index]
        with open(path, "rb", buffering=0) as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            if file.readinto(content) != len(content):
                raise OSError(f"{path} became shorter while it was read")
        return content, label


class Folder(Files, datasets.ImageFolder):
    """torchvision's."""


class INaturalist(Files, datasets.VisionDataset):
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
        content, label = self.bytes_of(index)
        return Image.open(io.BytesIO(content)), label

    def bytes_of(self, index: int) -> tuple[bytes, int]:
        """An image's file as it is stored, and its label."""
        path, label = self.samples[index]
        if self.opened is None or self.opened[0] != os.getpid():  # a file position is not shared with other processes
            self.opened = os.getpid(), zipfile.ZipFile(self.archive)
        return self.opened[1].read(path), label


class Shards(Dataset):
    """Images in WebDataset shards on disk, each found by its place, so that any order of them can be read.

    Items: (PIL image, label). Image i is the i-th of all shards, one after the other. Where in its shard an image lies
    is found out when the first of the shard is read, and all loader processes that were forked know it from then on.
    Those that come to a new shard at once each look through it: a lock would spare them that, but a process killed
    while it held the lock would hang the others.

    Args:
        reader: timm's, which has found the shards and knows which of a sample's files is what.

    Raises:
        OSError: a shard is missing, or there are no images. An item raises it, with the names of image and shard, where
            its shard has no image or no label in its place, or PIL or timm cannot make an image and a class of them.
    """

    def __init__(self, reader: reader_wds.ReaderWds):
        self.reader = reader
        self.paths = [Path(reader.root, name) for name in reader.split_info.filenames]
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise OSError(f"{len(missing)} of {len(self.paths)} shards are not on this disk, such as {missing[0]}")
        json_holds_label = reader.target_keys or reader.target_key or reader.split_info.alt_label
        self.label_suffix = "json" if json_holds_label else "cls"
        lengths = reader.split_info.shard_lengths
        found = [] if len(lengths) == len(self.paths) else [self.places_in(path) for path in self.paths]
        self.ends = np.cumsum([len(places) for places in found] or lengths)
        if not self.ends.any():
            raise OSError("its shards hold no images")
        # (images, 4), of each image and of its label: where it begins, which is 0 where there is none, and its bytes.
        # Not share_memory_(): in a container /dev/shm may be too small, and what does not fit stays there as a file.
        self.places = torch.frombuffer(mmap.mmap(-1, 4 * 8 * len(self)), dtype=torch.int64).view(-1, 4).fill_(UNKNOWN)
        for shard, places in enumerate(found):
            self.note(shard, places)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, label = self.stored(index)
        with self.named(index):
            return self.decoded(content, label)

    def bytes_of(self, index: int) -> tuple[bytes, int]:
        """An image's file as it is stored, and its label.

        Raises:
            OSError: as an item.
        """
        content, label = self.stored(index)
        with self.named(index):
            if self.label_suffix == "cls":
                return content, self.class_of(int(label))
            return content, self.decoded(PIXEL, label)[1]  # timm gives this label with an image alone

    def stored(self, index: int) -> tuple[bytes, bytes]:
        """The files that hold an image and its label.

        Raises:
            OSError: the shard lacks one of them, ends within one or cannot be read.
        """
        shard, _ = self.place_of(index)
        if UNKNOWN in self.places[index].tolist():
            self.note(shard, self.places_in(self.paths[shard]))
        start, size, label_start, label_size = self.places[index].tolist()
        if min(start, label_start) <= 0:
            raise OSError(f"{self.filename(index)} has no {'label' if start > 0 else self.reader.input_key}")
        with open(self.paths[shard], "rb", buffering=0) as file:
            content, label = (os.pread(file.fileno(), *part) for part in ((size, start), (label_size, label_start)))
        if (len(content), len(label)) != (size, label_size):
            raise OSError(f"{self.paths[shard]} ends within {self.filename(index)}")
        return content, label

    def places_in(self, path: Path) -> Tensor:
        """Where the images and labels of a shard lie: (samples, 4), as in `places`.

        What the last sample lacks is `UNKNOWN`: the shard may go on with it, and this reading have been cut short.
        """
        samples_in.cache_clear()
        suffixes = self.reader.input_key.split(";")
        samples = samples_in(path)
        places = []
        for number, (_, parts) in enumerate(samples, start=1):
            none = (0, 0) if number < len(samples) else (UNKNOWN, UNKNOWN)
            image = next((parts[suffix] for suffix in suffixes if suffix in parts), none)
            places.append((*image, *parts.get(self.label_suffix, none)))
        return torch.tensor(places, dtype=torch.int64).view(-1, 4)

    def note(self, shard: int, places: Tensor) -> None:
        """Notes what was found of a shard, for all processes.

        What was not found is not noted, but looked for whenever it is asked for: a disk that once gave too little costs
        no images for the rest of the run. Each missing image of a shard that stays cut short costs a look through it:
        as long as a few images' decoding where the shard has a thousand, and training ends where more than
        `UNREADABLE_SHARE` of the images are missing.
        """
        first, last = self.range_of(shard)
        noted, places = self.places[first:last][: len(places)], places[: last - first]
        known = places != UNKNOWN
        noted[known] = places[known]

    def decoded(self, content: bytes, label: bytes) -> tuple[Image.Image, int]:
        """What timm makes of a sample; raises what PIL, json and timm do, and ValueError where it has no class."""
        reader = self.reader
        suffix = reader.input_key.partition(";")[0]
        decoded = reader_wds._decode(
            {suffix: content, self.label_suffix: label},
            image_key=suffix,
            image_mode=reader.input_img_mode,
            target_key=reader.target_keys or reader.target_key,
            alt_label=reader.split_info.alt_label,
        )
        if decoded is None:
            raise ValueError("timm takes the label for none")
        return decoded["jpg"], self.class_of(decoded["target"])

    def class_of(self, target: int) -> int:
        """What trainer and model call a label of the shards.

        Raises:
            KeyError: the class map lacks it.
            TypeError: it is no whole number.
            ValueError: a tensor cannot hold it, or it would be taken for that of no image.
        """
        label = operator.index(self.reader.class_to_idx[target] if self.reader.remap_class else target)
        if not 0 <= label < 2**63:
            raise ValueError(f"{label} is no class")
        return label

    @contextmanager
    def named(self, index: int) -> Iterator[None]:
        """Within it, what an image and its label cause is an OSError that names the image."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # PIL, json and timm have errors of all kinds for bytes that they do not understand
            reason = str(error).replace(" of sample 'None'", "")  # timm would have the sample's key for every image
            raise OSError(f"{self.filename(index)} cannot be read ({type(error).__name__}: {reason})") from error

    def place_of(self, index: int) -> tuple[int, int]:
        """The shard that holds an image, and where among its images."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - self.range_of(shard)[0]

    def range_of(self, shard: int) -> tuple[int, int]:
        """A shard's first image, and the one after its last."""
        return int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])

    def filename(self, index: int, absolute: bool = True) -> str:
        """What names an image: its key and its shard."""
        shard, place = self.place_of(index)
        try:
            samples = samples_in(self.paths[shard])
        except OSError:  # which may be why the image is named
            samples = []
        return f"{samples[place][0] if place < len(samples) else f'image {place}'} of {self.paths[shard]}"


@lru_cache(maxsize=2)  # an image that cannot be read is looked for, and then named more than once
def samples_in(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a shard, in order: key, and for each of its files the suffix, where it begins and its bytes.

    As WebDataset has it, files that follow each other and are alike up to the first dot of their names are a sample.
    A shard that is cut short ends before what is missing.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if member.isfile() and suffix:
                    key = f"{folder}/{stem}" if folder else stem
                    if not samples or samples[-1][0] != key:
                        samples.append((key, {}))
                    samples[-1][1][suffix.lower()] = member.offset_data, member.size
    except tarfile.TarError:
        pass
    return samples


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
            return Folder(str(place))
        if name in ("CIFAR", "CIFAR10"):
            return (datasets.CIFAR10 if name == "CIFAR10" else datasets.CIFAR100)(root, train=train)
        if name in ("INAT", "INAT19"):
            return INaturalist(root, train, 2019 if name == "INAT19" else 2018, args.inat_category)
        found = create_dataset(
            name,
            root=root,
            split=args.train_split if train else args.val_split,
            is_training=train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
        reader = getattr(found, "reader", None)
        return Shards(reader) if isinstance(reader, reader_wds.ReaderWds) else found
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
