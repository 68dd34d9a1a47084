"""One checkpoint file: written atomically with a digest of its content, read without running code."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.checkpoint.arrays import SAFE_GLOBALS, PickledArray, replace_arrays
from common.checkpoint.untrusted import PICKLED_CODE, Refused, check_before_loading, check_loaded
from common.run_dir import BEST, LAST, atomic_write

DIGEST = "digest"  # key of a file that `write` made
TORCH = (b"PK", b"\x80")  # what a file in torch's format begins with: an archive, or before torch 1.6 a pickle
MAX_STAND_INS = 100  # classes and functions in one file


class _WriteErrorRecorder:
    """File that keeps the OSError of a failed write, because torch.save raises a RuntimeError without errno instead."""

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


def write(path: Path, content: dict[str, Any], before_rename: Callable[[], None]) -> None:
    """Write tensors and plain values in torch's format, with their digest; `path` is complete or unchanged.

    Args:
        path: of the file.
        content: on the CPU.
        before_rename: called when the temporary file is complete and flushed to the disk.

    Raises:
        OSError: the folder is not writable or the disk is full.
    """
    with atomic_write(path, before_rename) as file:
        recorder: Any = _WriteErrorRecorder(file)
        try:
            torch.save(content | {DIGEST: digest(content)}, recorder)
        except RuntimeError as error:
            raise recorder.error or error from error


def digest(content: Any) -> str:
    """SHA-256 of the values in nested dicts, lists and tuples; does not depend on the file's layout."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(f"dict{len(value)}".encode())
            for key, item in value.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            sha.update(f"{type(value).__name__}{len(value)}".encode())
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(content)
    return sha.hexdigest()


def load(path: str | Path, stand_ins: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU: tensors and plain values in torch's format, or safetensors, whatever its name.

    Args:
        path: of the file.
        stand_ins: take the tensors of a file that holds objects too, with an empty dict in place of each object.

    Raises:
        ValueError: no such file, truncated, corrupt, not a checkpoint, or hostile. Nothing in it was run.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a checkpoint; {name_weights_in(path)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path}: the file is empty")
    try:
        content = _read(path, size, stand_ins)
        if not isinstance(content, dict):
            raise Refused(f"not a checkpoint: expected a dict, found {type(content).__name__}")
        if stand_ins:
            content = _keep_tensors(content)
        check_loaded(content, size)
        content = replace_arrays(content)
        written = content.pop(DIGEST, None)
        if written is not None and written != digest(content):
            raise Refused("corrupt: SHA-256 does not match")
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def name_weights_in(folder: Path) -> str:
    """What to pass in place of a folder."""
    if (folder / "config.json").is_file():
        return f"local-dir:{folder} takes its weights"
    names = [folder / name for name in (BEST, LAST) if (folder / name).is_file()]
    return f"pass {names[0]}" if names else "pass the file in it"


def _read(path: Path, size: int, stand_ins: bool) -> Any:
    with open(path, "rb") as file:
        head = file.read(512)
    problem = _recognize(head)
    if problem is not None:
        raise Refused(problem)
    try:
        if _is_safetensors(head) or (path.suffix == ".safetensors" and not head.startswith(TORCH)):
            return load_file(path)
        check_before_loading(path, size)
        return _unpickle(path, stand_ins)
    except Refused:
        raise
    except Exception as error:  # garbage can make an unpickler raise anything
        raise Refused("truncated, or not a checkpoint") from error


def _recognize(head: bytes) -> str | None:
    """What a file is that people take for a checkpoint, by its first bytes, and what to do; None for all others."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, not a checkpoint; fetch the file with git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a checkpoint; download the file that the page links to, and delete this one"
    return None


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: eight bytes with the length of a JSON object, and the object."""
    return head[8:9] == b"{" and not head.startswith(TORCH[0])


def _unpickle(path: Path, stand_ins: bool) -> Any:
    """Read torch's format with torch's own restricted unpickler, which takes no classes and functions but those below.

    Args:
        stand_ins: take any class and function, as `StandIn`; torch refuses those of os and sys nevertheless.
    """
    taken = [argparse.Namespace, *SAFE_GLOBALS]  # a Namespace is the "args" of upstream's files
    for _ in range(MAX_STAND_INS):
        try:
            # an open file, since torch goes by the name of one that is not
            with torch.serialization.safe_globals(taken), open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found is None:
                raise
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            if not stand_ins or "is blocked" in str(error):
                hint = "" if stand_ins else "; scripts/convert.py takes the weights out"
                raise Refused(f"refused: {PICKLED_CODE.format(argument=name)}{hint}") from error
            taken.append((StandIn, name))
    raise Refused(f"refused: names more than {MAX_STAND_INS} classes and functions")


class StandIn:
    """Stands for any class or function: calling it gives an empty dict, whatever the arguments and the state.

    The dict is a Counter, since torch's unpickler adds items to none but the classes that it knows.
    """

    def __new__(cls, *_: Any) -> Any:
        empty: Any = Counter()
        empty.__setstate__ = lambda state: None
        return empty


def _keep_tensors(content: dict[Any, Any]) -> dict[str, Any]:
    """The tensors and the state dicts at the top of a checkpoint."""
    kept = {}
    for name, value in content.items():
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if isinstance(key, str) and _is_tensor(item)}
        if isinstance(name, str) and (_is_tensor(value) or isinstance(value, dict)):
            kept[name] = value
    return kept


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, PickledArray))
