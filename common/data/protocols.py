"""What a dataset can do, whoever wrote it, and the first images of one as a dataset of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image


class ImageDataset(Protocol):
    """Labelled images with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and label; raises one of `READ_ERRORS` where the image cannot be read."""

    def sample_name(self, index: int) -> str:
        """Path of an image, or what else names it in a message."""

    @property
    def class_names(self) -> list[str] | None:
        """In the order of the labels; None where the dataset does not say."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines to print at the start, such as files that were skipped."""


@runtime_checkable
class EncodedDataset(ImageDataset, Protocol):
    """An `ImageDataset` whose images are stored as files."""

    def read_encoded(self, index: int) -> tuple[bytes | bytearray, int]:
        """An image's file as it is stored, and the label; raises OSError where it cannot be read."""


@runtime_checkable
class ShardedDataset(EncodedDataset, Protocol):
    """An `EncodedDataset` of shards, which are read fastest few at a time."""

    shard_ends: np.ndarray  # (shards,); the number of images up to and including each


class Subset:
    """The first `count` images of a dataset, or all of fewer, which are read as in the whole.

    torch's Subset would hide what makes the dataset an `EncodedDataset` or a `ShardedDataset`.
    """

    def __init__(self, data: Any, count: int):
        self.data, self.count = data, min(count, len(data))
        self.class_names, self.notes, self.sample_name = data.class_names, data.notes, data.sample_name
        if isinstance(data, EncodedDataset):
            self.read_encoded = data.read_encoded
        if isinstance(data, ShardedDataset):
            complete = data.shard_ends[data.shard_ends < self.count]
            self.shard_ends = np.append(complete, self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.data[index]
