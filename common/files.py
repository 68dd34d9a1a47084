"""Files of tensors: written with a digest of their content, and read without running code, however they came to be.

What is read may come from a stranger or from a disk that fails. Nothing is unpickled but tensors and plain values
(`weights_only=True`); memory is bounded by the size of the file; and a file of ours carries a digest of its content.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.folder import replacing

DIGEST = "digest"  # entry of a file of ours
MOST_ITEMS, DEEPEST = 2_000_000, 32  # of a checkpoint's content
MOST_VIEWS = 8  # bytes of all tensors, as multiples of the file's: tied weights are more than once in it


class _Written:
    """A file that remembers what a write failed with."""

    def __init__(self, file: Any):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, content: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
    """Writes tensors and plain values, with a digest of them, in torch's format.

    Args:
        path: is the whole file in the end, or what it was before.
        content: on the CPU.
        before: is called when all is written and on the disk, just before it takes its place.

    Raises:
        OSError: the folder is not writable or the disk is full.
    """
    with replacing(path, before) as file:
        written: Any = _Written(file)
        try:
            torch.save(content | {DIGEST: digest(content)}, written)
        except RuntimeError as error:  # torch's own word for a write that failed
            raise written.error or error from error


def digest(content: Any) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values: of what is in them, not of how it is
    laid out."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(f"dict{len(value)}".encode())
            for key, part in value.items():
                sha.update(repr(key).encode())
                add(part)
        elif isinstance(value, (list, tuple)):
            sha.update(f"{type(value).__name__}{len(value)}".encode())
            for part in value:
                add(part)
        else:
            sha.update(repr(value).encode())

    add(content)
    return sha.hexdigest()


def load(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: torch's format with tensors and plain values only, or safetensors.

    Raises:
        ValueError: there is no such file, it is cut short, damaged, no checkpoint, larger than it seems, or carries
            code. Nothing of it was run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path}: the file is empty")
    try:
        if path.suffix == ".safetensors":
            content: Any = {"model": load_file(path)}
        else:
            _check_pickles(path, size)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # garbage can make an unpickler raise anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # names a function or a class
            raise ValueError(
                f"{path}: refused, since it carries code to run on loading, where a checkpoint needs tensors and "
                "plain values only"
            ) from error
        raise ValueError(f"{path}: the file is cut short, or no checkpoint") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: this is no checkpoint, but a {type(content).__name__} of other things")
    try:
        _check_content(content, size)
        written = content.pop(DIGEST, None)
        if written is not None and written != digest(content):
            raise Refused("the file is damaged: its content is not what was written")
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    return content


class Refused(Exception):
    """A file is not what it should be; the message says why."""


def _check_pickles(path: Path, size: int) -> None:
    """Looks at a file before it is unpickled: refuses an archive that unpacks to more than it is, and what would take
    memory or time beyond the file's size while it is built."""
    if not zipfile.is_zipfile(path):  # of torch before 1.6: five pickles, and then the weights
        with open(path, "rb") as file:
            for _ in range(5):
                _check_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Refused("refused, since its content is compressed, which that of a checkpoint is not")
        if sum(entry.file_size for entry in entries) > size:
            raise Refused("refused, since it would unpack to more than the file holds")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as file:
                    _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Follows a pickle without building anything. Tuples can be keys, which are hashed in depth when they are built:
    those of tuples of tuples … are bounded; and `bytearray`, which PyTorch lets through, may ask for any size."""
    stack: list[Any] = []  # of each value the depth of its tuples, and its parts; None for a mark
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(file):
        name, takes, gives = operation.name, operation.stack_before, operation.stack_after
        if name in ("GLOBAL", "INST") and "bytearray" in str(argument):
            raise Refused("refused, since it makes arrays of bytes, which a checkpoint does not need")
        if name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise Refused("refused, since it carries code to run on loading, or the like")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            continue
        if name == "MARK":
            stack.append(None)
            continue
        parts = []
        if pickletools.stackslice in takes:
            while (part := stack.pop()) is not None:
                parts.append(part)
        for _ in range(len([kind for kind in takes if kind not in (pickletools.stackslice, pickletools.markobject)])):
            parts.append(stack.pop())
        depth, count = 0, 1
        if name.startswith("TUPLE"):
            depth, count = 1 + max((d for d, _ in parts), default=0), 1 + sum(c for _, c in parts)
            if depth > DEEPEST or count > MOST_ITEMS:
                raise Refused(f"refused, since it nests more than {MOST_ITEMS:,} items, or deeper than {DEEPEST}")
        if name == "DUP":
            gives, (depth, count) = list(gives), parts[0]
        stack += [(depth, count)] * len(gives)


def _check_content(content: dict[str, Any], size: int) -> None:
    """Refuses what would take more time or memory to go through than the file's size tells, and keys that are no names
    and no numbers."""
    waiting: list[tuple[Any, int]] = [(content, 0)]
    items = spread = 0
    while waiting:
        value, depth = waiting.pop()
        items += 1
        if items > MOST_ITEMS or depth > DEEPEST:
            raise Refused(f"refused, since it nests more than {MOST_ITEMS:,} items, or deeper than {DEEPEST}")
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
                raise Refused("its weights are sparse, quantized or conjugated")
            bytes_ = value.numel() * value.element_size()
            spread += bytes_
            if value.device.type != "cpu" or bytes_ > value.untyped_storage().nbytes() or spread > MOST_VIEWS * size:
                raise Refused("refused, since its tensors are larger than what the file holds of them")
        elif isinstance(value, dict):
            if not all(type(key) in (str, int) for key in value):
                raise Refused("refused, since it has keys that are no names and no numbers")
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, argparse.Namespace):
            waiting += [(part, depth + 1) for part in vars(value).values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(part, depth + 1) for part in value]
