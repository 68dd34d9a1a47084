"""Lists of images and their classes: Swin's <split>_map.txt, iNaturalist's JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_map(path: Path, classes: int | None = None, source: str = "") -> list[tuple[str, int]]:
    """Lines of an image's path, a tab and the number of its class → paths and labels.

    Args:
        classes: labels must be below; None where nothing else says how many there are.
        source: where `classes` comes from, for messages.

    Raises:
        ValueError: names the line without a label, or whose label is no class.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), start=1):
        if not line:
            continue
        name, _, text = line.partition("\t")
        try:
            label = int(text)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {text!r} is not a class number; expected <image>, a tab, <number>"
            ) from error
        if label < 0:
            raise ValueError(f"{path}, line {number}: label {label} stands for no class; remove the line")
        if classes is not None and label >= classes:
            raise ValueError(f"{path}, line {number}: label {label} is beyond the {classes} classes of {source}")
        samples.append((name, label))
    if not samples:
        raise ValueError(f"{path}: lists no images")
    return samples


def read_inaturalist(root: Path, name: str, level: str) -> list[tuple[str, str]]:
    """One of the competition's JSON files → paths of images and names of their classes.

    Args:
        root: folder of the files.
        name: of the file.
        level: of the taxonomy, a key of categories.json.

    Raises:
        ValueError: names the annotation whose category or image is not listed, or the category without that level.
    """
    categories = json.loads((root / "categories.json").read_text())
    content = json.loads((root / name).read_text())

    def index(entries: list[dict[str, Any]], key: str, source: str) -> dict[Any, Any]:
        try:
            return {entry["id"]: entry[key] for entry in entries}
        except KeyError as error:
            raise ValueError(f"{root / source}: an entry has no {error}") from error

    def look_up(table: Mapping[Any, Any], annotation: dict[str, Any], key: str, number: int, source: str) -> Any:
        if annotation.get(key) not in table:
            raise ValueError(
                f"{root / name}, annotation {number}: {key} {annotation.get(key)} is not among those of {source}"
            )
        return table[annotation[key]]

    names = index(categories, level, "categories.json")
    files = index(content["images"], "file_name", name)
    return [
        (
            str(root / look_up(files, annotation, "image_id", number, f"the images of {name}")),
            look_up(names, annotation, "category_id", number, "categories.json"),
        )
        for number, annotation in enumerate(content["annotations"], start=1)
    ]
