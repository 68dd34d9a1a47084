"""What the scripts' command lines have in common: how they end, and what a flag's value must be."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import StopTraining
from common.folder import replacing
from common.signals import stop_printing


@contextlib.contextmanager
def complaining(
    parser: argparse.ArgumentParser, interrupted: str = "interrupted; the same command does what is left"
) -> Iterator[None]:
    """Makes what goes wrong one sentence with status 2, a Ctrl-C one with 130, and a reader that left a quiet 141."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as after >&-
                sys.stdout.flush()  # else a reader's leaving would be noticed when it is too late to be quiet
    except BrokenPipeError:
        stop_printing()
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENOSPC and sys.stdout is not None:
            stop_printing()  # in case that it is standard output's, which would be tried again at exit
        parser.error(str(error) if error.filename else error.strerror or str(error))
    except ValueError as error:
        parser.error(str(error))
    except StopTraining as stop:
        parser.error(f"training stopped: {stop}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: {interrupted}\n")


def check_writable(flag: str, path: str | Path | None) -> None:
    """Refuses a file that could not be written once all is measured.

    Raises:
        ValueError: it is a folder, or nothing can be written where it lies.
    """
    if path is None:
        return
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
        if Path(path).is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise ValueError(f"{flag} {path}: not writable ({error.strerror or error})") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent; what is no file, such as a pipe, is written to as it is.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(path.resolve()) as file:
        file.write(content)


def file(value: str) -> str:
    """A file's name."""
    if not value:
        raise argparse.ArgumentTypeError("a file's name is missing, as where a script names one that is not set")
    return value


def names(value: str) -> list[str]:
    """Names with commas between them, each once."""
    if not all(value.split(",")):
        raise argparse.ArgumentTypeError(f"{value!r}: names with commas between them are needed")
    return list(dict.fromkeys(value.split(",")))


def counts(value: str) -> list[int]:
    """Numbers of at least 1 with commas between them, in order, each once."""
    return sorted({count(number) for number in value.split(",")})


def count(value: str) -> int:
    """A number of at least 1."""
    if not (value.isascii() and value.isdigit() and int(value)):
        raise argparse.ArgumentTypeError(f"{value!r}: a whole number of at least 1 is needed")
    return int(value)
