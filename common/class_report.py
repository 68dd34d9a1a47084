"""Accuracy by class and confusion matrix of an evaluation, as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import distributed
from common.run_dir import atomic_write

BY_CLASS, CONFUSION = "accuracy_by_class.csv", "confusion_matrix.csv"


class ClassReport:
    """The label and the prediction of each image that was evaluated."""

    def __init__(self) -> None:
        self.pairs: list[Tensor] = []  # (2, B) each: labels, predictions

    def add(self, labels: Tensor, logits: Tensor) -> None:
        """Keep a batch's; labels (B,), logits (B, classes)."""
        predictions = logits.topk(min(5, logits.shape[1]))[1][:, 0]  # as timm's accuracy, also where two are equal
        self.pairs.append(torch.stack([labels, predictions]))

    def gather(self) -> Tensor:
        """Return labels and predictions of all ranks, (2, images) on the host; to be called on all of them."""
        pairs = torch.cat([torch.empty(2, 0, dtype=torch.long), *(pair.cpu() for pair in self.pairs)], dim=1)
        return torch.cat(distributed.all_gather(pairs), dim=1)


def write_report(folder: Path, prefix: str, pairs: Tensor, classes: int, class_names: Sequence[str] | None) -> None:
    """Write <prefix>accuracy_by_class.csv and <prefix>confusion_matrix.csv.

    Args:
        pairs: from `ClassReport.gather`.
        classes: of the model.
        class_names: in the order of the labels; a class without a name has its number.

    Raises:
        OSError: they cannot be written.
    """
    names = [*(class_names or ()), *map(str, range(len(class_names or ()), classes))]
    labels, predictions = pairs
    images = labels.bincount(minlength=classes).tolist()
    correct = labels[labels == predictions].bincount(minlength=classes).tolist()
    shares = [f"{100 * right / count:.2f}" if count else "" for right, count in zip(correct, images)]
    by_class = zip(range(classes), names, images, correct, shares)
    write_csv(folder / f"{prefix}{BY_CLASS}", ("label", "class", "images", "correct", "accuracy"), by_class)
    by_label = predictions[labels.argsort()].split(images)
    write_csv(
        folder / f"{prefix}{CONFUSION}",
        ("class / predicted", *names),
        ((name, *some.bincount(minlength=classes).tolist()) for name, some in zip(names, by_label)),
    )


def write_csv(path: Path, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically, in UTF-8."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
        text.detach()
