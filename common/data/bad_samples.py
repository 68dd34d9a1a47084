"""Images that cannot be read: which errors they raise, how they are counted, and when training stops over them."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.distributed import all_union
from common.errors import StopTraining

# raised by PIL and the readers for files that are no image, truncated, or too large to be one; zipfile raises
# RuntimeError for what is encrypted
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
NO_IMAGE = -1  # label of an item without an image
MAX_REPLACEMENTS = 100  # images tried in place of one that cannot be read
UNREADABLE_SHARE = 0.01  # of the training images; training stops above it
MIN_UNREADABLE = 10  # and from so many on
NAMED = 5  # unreadable images that are named; those after them are counted by reason
CONSEQUENCE = {"training": "replaced by another image", "evaluation": "not counted"}


class UnreadableSampleError(OSError):
    """An image or its label cannot be read; for a dataset whose files are not named after their images.

    Args:
        name: of the image.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.reason = reason


class BadSampleCounter:
    """Counts the images that could not be read; the first ones are named with the reason, later ones counted by it.

    Args:
        images: size of the dataset.
        kind: "training" or "evaluation".
        warn: called with each line.
    """

    def __init__(self, images: int, kind: str, warn: Callable[[str], None]):
        self.images, self.kind, self.warn = images, kind, warn
        self.known: dict[str, str] = {}  # name → reason
        self.new: dict[str, str] = {}  # of this process, since the last check

    def add(self, samples: Iterable[tuple[str, str]]) -> None:
        """Add names and reasons."""
        for name, reason in samples:
            self.new.setdefault(name, reason)

    def check(self, max_share: float = 1.0) -> None:
        """Join the counts of all processes; raises StopTraining on all of them where `MIN_UNREADABLE` images or more,
        and more than `max_share` of the dataset, could not be read."""
        unreported = dict(sorted(all_union({sample for sample in self.new.items() if sample[0] not in self.known})))
        self.new.clear()
        names = list(unreported)[: max(NAMED - len(self.known), 0)]
        for name in names:
            self.warn(f"{name}: unreadable {self.kind} image ({unreported[name]}); {CONSEQUENCE[self.kind]}")
        if len(unreported) > len(names):
            reasons = summarize_reasons(reason for name, reason in unreported.items() if name not in names)
            self.warn(f"{len(unreported) - len(names)} more unreadable {self.kind} images: {reasons}")
        self.known |= unreported
        if len(self.known) >= MIN_UNREADABLE and len(self.known) > max_share * self.images:
            raise StopTraining(
                f"{len(self.known)} of {self.images} {self.kind} images could not be read, more than "
                f"{100 * max_share:g} %: {summarize_reasons(self.known.values())}"
            )


def summarize_reasons(reasons: Iterable[str]) -> str:
    """Count reasons that differ in their numbers only as one."""
    counts = Counter(re.sub(r"\d+", "…", reason) for reason in reasons)
    return ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(NAMED))


def explain_read_error(error: Exception) -> str:
    """The reason for which an image could not be read, in a few words."""
    if isinstance(error, UnreadableSampleError):
        return error.reason
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError):
        return error.strerror or str(error).partition("\n")[0] or type(error).__name__
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def check_replaced(labels: Tensor, samples: list[tuple[str, str]]) -> None:
    """Raise StopTraining where a batch lacks an image because all its replacements were unreadable too.

    Args:
        labels: (B,), on the host.
        samples: names and reasons of the batch's unreadable images.
    """
    if samples and (labels.numpy() == NO_IMAGE).any():
        name, reason = samples[-1]
        raise StopTraining(
            f"gave up after {MAX_REPLACEMENTS} unreadable replacements for {name}, which is unreadable too ({reason})"
        )
