"""Datasets of the Hugging Face hub, `hfds/…`, by timm's reader: which columns hold image and label, and the labels'
check."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from timm.data.readers.targets import has_field

from common.data.images import open_image

USUAL_IMAGE, USUAL_LABEL = "image", "label"  # columns that timm reads


class HubDataset:
    """An `EncodedDataset`.

    Args:
        reader: timm's.
        name: of the dataset and its split, for messages.
        classes: `--nb-classes`, for a dataset that does not say.

    Raises:
        ValueError: a label is no class; names the row.
    """

    def __init__(self, reader: Any, name: str, classes: int | None = None):
        self.reader, self.name = reader, name
        self.class_names = list(reader.class_to_idx) or None
        self.notes = [f"{name}: images of column {reader.image_key}, labels of column {reader.label_key}"]
        limit = classes if self.class_names is None else len(self.class_names)
        if reader.label_key in reader.dataset.column_names:  # else it is nested in another, and read with its image
            check_labels(reader.dataset.select_columns([reader.label_key]), name, limit)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, label = self.read_encoded(index)
        return open_image(content), label

    def read_encoded(self, index: int) -> tuple[bytes, int]:
        file, label = self.reader[index]
        with file:
            return file.read(), operator.index(label)

    def sample_name(self, index: int) -> str:
        return f"{self.name}, row {index}"


def open_hub_dataset(
    name: str, cache: str | None, split: str, input_key: str | None, target_key: str | None, classes: int | None
) -> HubDataset:
    """Open `hfds/<name>`, a dataset of the hub or a folder of files that its library reads.

    Args:
        cache: where the library keeps what it downloads; None for its own place.
        input_key, target_key: columns of image and label; None guesses.
        classes: `--nb-classes`.

    Raises:
        ImportError: the library is not installed.
        OSError: it cannot open the dataset.
        ValueError: there is no such split or column, or a label is no class.
    """
    import datasets

    try:
        data = datasets.load_dataset(name.partition("/")[2], split=split, cache_dir=cache)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise OSError(str(error.__cause__ or error)) from error
    image_key, label_key = choose_columns(data.features, input_key, target_key)
    options = {"input_key": image_key, "target_key": label_key}
    reader = timm.data.create_dataset(name, root=cache, split=split, **options).reader
    return HubDataset(reader, f"{name}, split {split}", classes)


def choose_columns(features: Mapping[str, Any], input_key: str | None, target_key: str | None) -> tuple[str, str]:
    """The columns of image and label: those that are asked for, else timm's, else the only ones of their kind.

    Raises:
        ValueError: names the flag that has to say.
    """
    import datasets

    def is_number(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and feature.dtype.removeprefix("u").startswith("int")

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name, feature in features.items() if is_number(feature)]
    return (
        choose_column("--input-key", input_key, USUAL_IMAGE, images, features),
        choose_column("--target-key", target_key, USUAL_LABEL, labels, features),
    )


def choose_column(flag: str, given: str | None, usual: str, candidates: list[str], features: Mapping[str, Any]) -> str:
    """One column, as `choose_columns`."""
    if given is not None and "," in given:
        raise ValueError(f"{flag} {given}: several columns; name one")
    if given is not None and not has_field(features, given):
        raise ValueError(f"{flag} {given}: no such column; the data set has {', '.join(features)}")
    if given is not None:
        return given
    if usual in candidates:
        return usual
    if len(candidates) != 1:
        kind = f"{len(candidates) or 'no'} columns may hold the {usual}"
        raise ValueError(f"{flag}: {kind}; name one of {', '.join(candidates or features)}")
    return candidates[0]


def check_labels(column: Any, name: str, classes: int | None) -> None:
    """Check all labels without reading an image.

    Args:
        column: a dataset of the labels alone.
        name: of the dataset and its split.
        classes: labels must be below; None where nobody says.

    Raises:
        ValueError: a label is no class; names the row.
    """
    import pyarrow

    (key,) = column.column_names
    labels = column.with_format("arrow")[:].column(key)
    if not pyarrow.types.is_integer(labels.type):
        raise ValueError(
            f"{name}: column {key} holds {labels.type} values; name a column of class numbers with --target-key"
        )
    numbers = np.asarray(labels.cast(pyarrow.int64()).fill_null(-1))
    wrong = numbers < 0 if classes is None else (numbers < 0) | (numbers >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        problem = "stands for no class" if numbers[row] < 0 else f"is beyond the {classes} classes"
        raise ValueError(
            f"{name}, row {row}: label {labels[row]} {problem} ({wrong.sum()} such rows); choose another split"
        )
