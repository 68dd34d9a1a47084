"""NumPy's numbers and arrays in a pickle: held as the file has them, and turned into plain numbers and tensors.

NumPy's own functions allocate what a file asks for: an array of 3 GB takes 1.4 kB of pickle. Here nothing is allocated
before untrusted.py has compared shape and dtype with the bytes that the file holds.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

# dtypes that torch has too
NUMERIC = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
BYTE_ORDERS = ("<", ">", "=", "|")


class PickledDtype:
    """Stands for numpy.dtype while a file is read."""

    code: Any = ""  # such as "f8"
    order: Any = "="

    def __init__(self, code: Any = "", *_: Any):
        self.code = as_text(code)

    def __setstate__(self, state: Any) -> None:
        self.order = as_text(state[1])

    @property
    def is_numeric(self) -> bool:
        return self.code in NUMERIC and self.order in BYTE_ORDERS

    @property
    def itemsize(self) -> int:
        """Bytes of a numeric one."""
        return int(self.code[1:])


class PickledArray:
    """What a pickle holds of a NumPy array, or of a scalar, whose shape is ()."""

    shape: Any = ()
    dtype: Any = None  # a `PickledDtype` in a file that NumPy wrote
    fortran: Any = False
    data: Any = b""
    is_scalar = False

    def __init__(self, shape: Any = (), *_: Any):
        self.shape = shape

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, data = state
        self.data = as_bytes(data)

    def to_value(self) -> Tensor | complex:
        """A tensor, or a plain number for a scalar, of bytes that are copied; for what untrusted.py has checked."""
        array = np.frombuffer(self.data, np.dtype(self.dtype.order + self.dtype.code))
        if self.is_scalar:
            return array.item()
        ordered = array.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(ordered.astype(array.dtype.newbyteorder("="), order="C"))


def replace_arrays(value: Any) -> Any:
    """Turn the arrays in nested dicts, lists and tuples into tensors and numbers, in place where that can be."""
    if isinstance(value, PickledArray):
        return value.to_value()
    if isinstance(value, dict):
        for name, item in value.items():
            value[name] = replace_arrays(item)
    elif isinstance(value, list):
        value[:] = map(replace_arrays, value)
    elif isinstance(value, argparse.Namespace):
        replace_arrays(vars(value))
    elif type(value) in (tuple, set, frozenset):
        return type(value)(map(replace_arrays, value))
    return value


def read_array(kind: Any = None, shape: Any = (), *_: Any) -> PickledArray:
    """Stand for numpy's `_reconstruct`: an array whose content follows."""
    return PickledArray(shape)


def read_scalar(dtype: Any = None, data: Any = b"") -> PickledArray:
    """Stand for numpy's `scalar`."""
    scalar = PickledArray()
    scalar.dtype, scalar.data, scalar.is_scalar = dtype, as_bytes(data), True
    return scalar


def empty_bytes() -> bytes:
    """Stand for `bytes`, which a pickle of an empty array calls; with a number it would allocate as many."""
    return b""


def as_text(value: Any) -> Any:
    """Strings of Python 2 are read as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def as_bytes(value: Any) -> Any:
    """Bytes of Python 2 are read as strings."""
    return value.encode("latin1", "replace") if isinstance(value, str) else value


# what torch's unpickler takes for NumPy's names: those of NumPy 1 and of NumPy 2
SAFE_GLOBALS: list[Any] = [
    (PickledDtype, "numpy.dtype"),
    (PickledArray, "numpy.ndarray"),
    (empty_bytes, "builtins.bytes"),
    *((read_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((read_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
