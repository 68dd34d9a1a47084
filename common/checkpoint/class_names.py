"""Class names of a checkpoint against those of the data: a label is a number, and shifts where the names do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLASS_NAMES = "class_names"  # key of a checkpoint


def saved_class_names(
    content: dict[str, Any], path: str | Path, pretrained_cfg: Mapping[str, Any] | None = None
) -> list[str] | None:
    """Return the class names in a checkpoint, in the order of the labels; None where it has none.

    Args:
        pretrained_cfg: timm's, of the config.json beside weights in timm's hub format, which hold no names.

    Raises:
        ValueError: they are no list of names.
    """
    names = content.get(CLASS_NAMES)
    if names is None and pretrained_cfg is not None:
        names = pretrained_cfg.get("label_names")
        if isinstance(names, dict):  # timm's form where some labels have no name
            labels = [str(label) for label in range(len(names))]
            names = [names[label] for label in labels] if names.keys() == set(labels) else None
    if not names:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: corrupt, or not a checkpoint of this trainer (its class names are no list of names)")
    return names


def describe_other_classes(saved: Sequence[str] | None, data: Sequence[str] | None) -> str | None:
    """Say how the classes of a checkpoint differ from the data's; None where they do not, or where one is unknown."""
    if saved is None or data is None or list(saved) == list(data):
        return None
    removed, added = sorted(set(saved) - set(data)), sorted(set(data) - set(saved))
    if not removed and not added and len(saved) == len(data):
        label = next(label for label, pair in enumerate(zip(saved, data)) if pair[0] != pair[1])
        return f"its classes are the data's in another order: label {label} is {saved[label]!r}, here {data[label]!r}"
    examples = [f"{names[0]!r} is {where}" for names, where in ((removed, "not in the data"), (added, "new")) if names]
    counts = [f"it has {len(saved)} and the data {len(data)}"] if len(saved) != len(data) else []
    return f"its classes are not the data's: {', '.join([*counts, *examples])}"


def check_class_names(
    path: str | Path, saved: Sequence[str] | None, data: Sequence[str] | None, flag_value: str = ""
) -> None:
    """Refuse a checkpoint whose labels mean other classes than the data's.

    Args:
        path: its name in the message.
        flag_value: what `--finetune` takes for it; "" for `path`.

    Raises:
        ValueError: says which, and what to do.
    """
    difference = describe_other_classes(saved, data)
    if difference is not None:
        raise ValueError(
            f"{path}: {difference}; use the data that it was trained on, or train a new classifier with --finetune "
            f"{flag_value or path}"
        )
