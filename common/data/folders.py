"""ImageNet-style folders, <split>/<class>/…: which folders are classes, and which files in them are images."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path

from timm.utils.misc import natural_key
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")  # of archives made by macOS, and of Synology's network drives
METADATA_PREFIX = "._"  # of the files in which macOS keeps metadata of others on foreign file systems


class ClassFolders(datasets.ImageFolder):
    """torchvision's listing without hidden and system folders, and without macOS's metadata files.

    Args:
        folder: of a split.
        natural_order: of the classes: 1, 2, 10, as in timm's reader; else 1, 10, 2, as in torchvision's.

    Attributes:
        skipped: files that are not images by their extension, by extension.

    Raises:
        FileNotFoundError: there are no classes, or a class has no images.
    """

    def __init__(self, folder: Path, natural_order: bool = False):
        self.folder, self.natural_order = folder, natural_order
        self.skipped: Counter[str] = Counter()
        try:
            super().__init__(str(folder), is_valid_file=self._is_image)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; images end in {', '.join(IMG_EXTENSIONS)}") from error

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(list_classes(directory))
        if self.natural_order:
            names.sort(key=natural_key)  # stable: names that differ in case alone
        if not names:
            raise FileNotFoundError(f"no class folders in {directory}")
        return names, {name: label for label, name in enumerate(names)}

    def _is_image(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if name.startswith(METADATA_PREFIX) or not _is_visible(folder, str(self.folder)):
            return False
        extension = os.path.splitext(name)[1].lower()
        if extension in IMG_EXTENSIONS:
            return True
        if not name.startswith("."):  # .DS_Store and its like
            self.skipped[extension or "without extension"] += 1
        return False

    def describe_skipped(self) -> list[str]:
        """A line that counts the files that are not images by their extension; none without such files."""
        if not self.skipped:
            return []
        counts = ", ".join(f"{count} {extension}" for extension, count in self.skipped.most_common(8))
        return [f"{self.folder}: files skipped by their extension: {counts}; images end in {', '.join(IMG_EXTENSIONS)}"]


def is_class_name(name: str) -> bool:
    """Whether a folder of this name is a class, rather than a hidden folder or one that a system made."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


@cache
def _is_visible(folder: str, root: str) -> bool:
    """Whether no folder from `root` down to `folder` is hidden or a system's."""
    if len(folder) <= len(root):
        return True
    parent, name = os.path.split(folder)
    return is_class_name(name) and _is_visible(parent, root)


def list_classes(folder: str | Path) -> list[str]:
    """The class folders of a split, in no order."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and is_class_name(entry.name)]


def check_several_classes(folder: Path, classes: list[str]) -> None:
    """Refuse a single class, most often the one folder that an archive was unpacked into.

    Raises:
        ValueError: names the folders that are likely to be the classes.
    """
    if len(classes) > 1:
        return
    inner = sorted(list_classes(folder / classes[0]))
    if inner:
        names = ", ".join(inner[:3]) + (", …" if len(inner) > 3 else "")
        advice = f"its folders ({names}) are likely to be the classes: move them up into {folder}"
    else:
        advice = f"two or more are needed: {folder.name}/<class>/*.jpg"
    raise ValueError(f"{folder}: holds one class only, {classes[0]}; {advice}")


def find_folder(root: Path, train: bool) -> Path:
    """The folder of the training or the evaluation images in that of a dataset.

    Raises:
        ValueError: it has no such folder.
    """
    folders = [root / "train"] if train else [root / "val", root / "validation"]
    folder = next((p for p in folders if p.is_dir()), None)
    if folder is None:
        wanted = " or ".join(p.name for p in folders)
        raise ValueError(f"{root} has no folder {wanted}: train/<class>/*.jpg and val/<class>/*.jpg are needed")
    return folder
