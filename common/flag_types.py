"""Types for argparse's `type=`: each converts the text after a flag, or states in one clause what is wrong with it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import re
from collections.abc import Callable
from typing import TypeVar

DIGITS, MNIST5K = "DIGITS", "MNIST5K"
EMBEDDED = (DIGITS, MNIST5K)  # data sets that come in a package, without a folder
DATA_SETS = ("IMNET", "CIFAR10", "CIFAR", "INAT", "INAT19", *EMBEDDED)
TIMM_READERS = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")  # prefixes of data sets that timm reads
KEYED_DATA_SETS = ("wds/", "hfds/", "hfids/", "tfds/")  # those in which image and label have names
LOCAL_DIR = "local-dir:"  # timm's prefix of a folder in its hub format
MODEL_SOURCES = ("hf-hub:", "hf_hub:", LOCAL_DIR)  # timm's prefixes: a hub repository, or such a folder
POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m7-mstd0.5", "3a")  # of the recipes; for others timm is imported and tried

Number = TypeVar("Number", int, float)


def number(
    convert: Callable[[str], Number], accepts: Callable[[Number], bool], expected: str
) -> Callable[[str], Number]:
    """Return a type for the numbers that `accepts` holds for; `expected` describes them."""

    def converted(text: str) -> Number:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return converted


positive_int = number(int, lambda value: value >= 1, "an integer of at least 1")
non_negative_int = number(int, lambda value: value >= 0, "an integer of at least 0")
seed = number(int, lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)")  # what NumPy's generator takes
finite_float = number(float, math.isfinite, "a finite number")
positive_float = number(float, lambda value: 0 < value < math.inf, "a finite number above 0")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
probability = number(float, lambda value: 0 <= value <= 1, "a number in [0, 1]")
below_one = number(float, lambda value: 0 <= value < 1, "a number in [0, 1)")
above_zero_to_one = number(float, lambda value: 0 < value <= 1, "a number in (0, 1]")


def positive_ints(text: str) -> list[int]:
    """Integers of at least 1 separated by commas, without duplicates, sorted."""
    return sorted({positive_int(item) for item in text.split(",")})


def csv(text: str) -> list[str]:
    """Names separated by commas, without duplicates, in the order given."""
    if not all(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names separated by commas")
    return list(dict.fromkeys(text.split(",")))


def file_path(text: str) -> str:
    """Path of a file or folder, or ""; `~` becomes the home folder, as the shell leaves it alone in `--flag=~/x`."""
    return os.path.expanduser(text)


def weights_source(text: str) -> str:
    """Path of a checkpoint, or an address that is left alone: https://…, hf-hub:…, local-dir:… (whose `~` is the home
    folder too)."""
    prefix = LOCAL_DIR if text.startswith(LOCAL_DIR) else ""
    return prefix + file_path(text.removeprefix(prefix))


def nonempty_path(text: str) -> str:
    """Path of a file or folder, with `~` as in `file_path`."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty (unset variable in a script?)")
    return file_path(text)


def device_name(text: str) -> str:
    """Accept cpu, cuda and cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: unknown device; use cuda or cpu")
    return text


def data_set_name(text: str) -> str:
    """Accept the data sets that are read here and timm's names, which start with one of `TIMM_READERS`."""
    if text not in DATA_SETS and not text.lower().startswith(TIMM_READERS):
        close = difflib.get_close_matches(text.upper(), DATA_SETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use {', '.join(DATA_SETS)} or a timm name such as wds/…"
        raise argparse.ArgumentTypeError(f"{text!r}: unknown data set; {hint}")
    return text


def optimizer_name(text: str) -> str:
    """Accept every name but those of second-order optimizers; timm checks the name when the optimizer is built."""
    if "adahessian" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: second-order optimizers are not supported")
    return text


def schedule_name(text: str) -> str:
    """Accept schedules that depend on the epoch alone, since a resumed run must find the same learning rates."""
    if text == "plateau":
        raise argparse.ArgumentTypeError(
            "'plateau': depends on past results; use a schedule that depends on the epoch alone"
        )
    return text


def augmentation_policy(text: str) -> str | None:
    """Accept a policy that timm can build, such as rand-m9-mstd0.5-inc1; "none" and "" become None."""
    if text.lower() in ("", "none"):
        return None
    if text in POLICIES:
        return text
    from timm.data import create_transform

    try:
        create_transform(32, is_training=True, auto_augment=text)
    except (AssertionError, LookupError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: timm has no such policy ({error or type(error).__name__}); "
            "use rand-m9-mstd0.5-inc1, original, v0, augmix-m3 or 3a"
        ) from error
    return text
