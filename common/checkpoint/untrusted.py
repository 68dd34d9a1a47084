"""Checks against files made to harm whoever loads them: `ATTACKS` has a row for each.

`torch.load(weights_only=True)` calls no function and builds no class but those of tensors. What is checked here: that a
file cannot take more memory or time than its size tells, and holds nothing that later code does not expect.
"""

from __future__ import annotations

import argparse
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint.arrays import PickledArray, PickledDtype

MAX_ITEMS, MAX_DEPTH = 2_000_000, 32  # of nested containers
MAX_DIMENSIONS = 32  # of an array
MAX_SHARING = 8  # bytes of all tensors, as a multiple of the file's size: tied weights are stored once
PICKLED_CODE = "contains pickled code ({argument}); only tensors and plain values are loaded"
NESTED = f"nests more than {MAX_ITEMS:,} items or {MAX_DEPTH} levels"


class Refused(Exception):
    """The file is not loaded; the message says why."""


class Archive(NamedTuple):
    """torch's zip archive, before anything of it is read."""

    members: list[zipfile.ZipInfo]
    file_size: int


class Opcode(NamedTuple):
    """An instruction of a pickle, before it is executed."""

    name: str
    argument: Any
    depth: int  # nesting of the tuple that it builds; 0 if it builds another value
    items: int  # in that tuple, counted as often as they are reached
    copied: int  # characters in the arguments of all calls so far, which a call may copy
    file_size: int


class Operand(NamedTuple):
    """What is known of a value on a pickle's stack."""

    depth: int = 0
    items: int = 1
    characters: int = 0  # of the strings in a tuple, counted as often as they are reached
    text: str = ""  # if it is a string


class Value(NamedTuple):
    """A value in what was loaded."""

    value: Any
    depth: int
    items: int  # values so far, counted as often as they are reached
    tensor_bytes: int  # of all tensors so far, as if none shared memory
    file_size: int


def is_compressed(archive: Archive) -> bool:
    return any(member.compress_type != zipfile.ZIP_STORED for member in archive.members)


def unpacks_beyond_file(archive: Archive) -> bool:
    return sum(member.file_size for member in archive.members) > archive.file_size


def allocates_bytes(opcode: Opcode) -> bool:
    return opcode.name in ("GLOBAL", "INST") and "bytearray" in str(opcode.argument)


def loads_computed_global(opcode: Opcode) -> bool:
    return opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4")


def copies_text_often(opcode: Opcode) -> bool:
    return opcode.copied > MAX_SHARING * opcode.file_size


def is_nested(subject: Opcode | Value) -> bool:
    return subject.depth > MAX_DEPTH or subject.items > MAX_ITEMS


def has_odd_layout(value: Value) -> bool:
    x = value.value
    return isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_quantized or x.is_conj() or x.is_neg())


def exceeds_storage(value: Value) -> bool:
    x = value.value
    if not isinstance(x, Tensor):
        return False
    return x.device.type != "cpu" or x.numel() * x.element_size() > x.untyped_storage().nbytes()


def shares_memory_often(value: Value) -> bool:
    return value.tensor_bytes > MAX_SHARING * value.file_size


def is_not_numeric(value: Value) -> bool:
    x = value.value
    if not isinstance(x, PickledArray):
        return isinstance(x, PickledDtype)
    return not (isinstance(x.dtype, PickledDtype) and x.dtype.is_numeric and isinstance(x.data, bytes))


def exceeds_its_bytes(value: Value) -> bool:
    x = value.value
    if not isinstance(x, PickledArray):
        return False
    if not isinstance(x.shape, tuple) or len(x.shape) > MAX_DIMENSIONS:
        return True
    if not all(type(length) is int and length >= 0 for length in x.shape):
        return True
    return math.prod(x.shape) * x.dtype.itemsize != len(x.data)


def has_odd_keys(value: Value) -> bool:
    return isinstance(value.value, dict) and not all(type(key) in (str, int) for key in value.value)


ATTACKS: dict[str, list[tuple[str, Callable[[Any], bool], str]]] = {
    # attack, check, message; in each stage the first check that holds refuses the file
    "archive": [
        ("zip bomb", is_compressed, "compressed, which torch.save's files are not"),
        ("one member under a thousand names", unpacks_beyond_file, "would unpack to more than the file holds"),
    ],
    "pickle": [
        ("bytearray(n) takes n bytes, and torch allows it", allocates_bytes, "allocates arrays of bytes"),
        ("function named by computed strings or a number", loads_computed_global, PICKLED_CODE),
        ("string that is encoded a thousand times", copies_text_often, "copies its strings again and again"),
        ("tuple of tuples as a key, hashed in depth", is_nested, NESTED),
    ],
    "value": [
        ("list that holds itself, lists of lists", is_nested, NESTED),
        ("tensor whose operations fail or are slow", has_odd_layout, "its weights are sparse, quantized or conjugated"),
        ("expanded or meta tensor", exceeds_storage, "its tensors are larger than what the file holds"),
        ("array of objects, which NumPy unpickles", is_not_numeric, "its arrays are not of numbers"),
        ("array of 3 GB in 1.4 kB", exceeds_its_bytes, "its arrays are larger than what the file holds"),
        ("a thousand views of one tensor", shares_memory_often, "its tensors are larger than what the file holds"),
        ("key that only looks like a name", has_odd_keys, "has keys that are neither names nor numbers"),
    ],
}


def refuse(stage: str, subject: Any) -> None:
    """Raise Refused if a check of the stage holds."""
    for _, check, message in ATTACKS[stage]:
        if check(subject):
            raise Refused(f"refused: {message.format(**subject._asdict())}")


def check_before_loading(path: Path, size: int) -> None:
    """Check a file of `size` bytes in torch's format before it is unpickled; raises Refused."""
    if not zipfile.is_zipfile(path):  # of torch before 1.6: five pickles, then the weights
        with open(path, "rb") as file:
            for _ in range(5):
                _check_pickle(file, size)
        return
    with zipfile.ZipFile(path) as archive:
        refuse("archive", Archive(archive.infolist(), size))
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                with archive.open(member) as file:
                    _check_pickle(file, size)


def _check_pickle(file: IO[bytes], size: int) -> None:
    """Follow a pickle's stack without building a value; raises Refused.

    Handles the opcodes that torch's unpickler takes; that one refuses all others.
    """
    stack: list[Any] = []  # of operands; None for a mark
    memo: dict[Any, Operand] = {}
    copied = 0
    for opcode, argument, _ in pickletools.genops(file):
        name, operands = opcode.name, []
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        else:
            if pickletools.stackslice in opcode.stack_before:
                while (operand := stack.pop()) is not None:
                    operands.append(operand)
            markers = (pickletools.stackslice, pickletools.markobject)
            operands += [stack.pop() for kind in opcode.stack_before if kind not in markers]
            result = Operand(text=argument, characters=len(argument)) if isinstance(argument, str) else Operand()
            if name.startswith("TUPLE"):
                depth = 1 + max((operand.depth for operand in operands), default=0)
                items = 1 + sum(operand.items for operand in operands)
                result = Operand(depth, items, sum(operand.characters for operand in operands))
            elif name == "REDUCE":
                copied += operands[0].characters
            elif name == "STACK_GLOBAL":
                argument = ".".join(operand.text for operand in reversed(operands))
            refuse("pickle", Opcode(name, argument, result.depth, result.items, copied, size))
            stack += [result] * len(opcode.stack_after)


def check_loaded(content: dict[str, Any], size: int) -> None:
    """Check all values of what was loaded from a file of `size` bytes; raises Refused."""
    waiting: list[tuple[Any, int]] = [(content, 0)]
    items = tensor_bytes = 0
    while waiting:
        value, depth = waiting.pop()
        items += 1
        if isinstance(value, Tensor) and value.layout is torch.strided:
            tensor_bytes += value.numel() * value.element_size()
        elif isinstance(value, PickledArray) and isinstance(value.data, bytes):
            tensor_bytes += len(value.data)
        refuse("value", Value(value, depth, items, tensor_bytes, size))
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, argparse.Namespace):
            waiting += [(item, depth + 1) for item in vars(value).values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(item, depth + 1) for item in value]
