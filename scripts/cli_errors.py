"""How the scripts' command lines end on an error, and how they write the files that their flags name."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import StopTraining
from common.run_dir import atomic_write
from common.streams import output_error, silence_stdout

PLOT_SUFFIXES = (".pdf", ".png", ".svg")


@contextlib.contextmanager
def cli_errors(
    parser: argparse.ArgumentParser, interrupted: str = "interrupted; run the same command to do the rest"
) -> Iterator[None]:
    """Turn exceptions into exit codes: 2 and one line on bad input, 130 on Ctrl-C, a silent 141 on a closed pipe
    (`| head`).

    Where standard output cannot be written otherwise, as on a full disk, the block goes on to its end; then exit with
    status 2 and a line on standard error.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here a closed pipe can still be handled; at exit Python would print a traceback
    except BrokenPipeError:
        silence_stdout()
        sys.exit(141)
    except OSError as error:
        parser.error(str(error) if error.filename else error.strerror or str(error))
    except ValueError as error:
        parser.error(str(error))
    except StopTraining as stop:
        parser.error(f"training stopped: {stop}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: {interrupted}\n")
    lost = output_error()
    if lost is not None:
        parser.error(f"standard output: could not be written ({lost})")


def check_writable(flag: str, path: str | Path | None) -> None:
    """Fail before a long measurement if its result could not be written.

    Raises:
        ValueError: `path` is a folder, or its folder cannot be written.
    """
    if path is None:
        return
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
        if Path(path).is_dir():
            raise IsADirectoryError(0, "it is a folder")
    except OSError as error:
        raise ValueError(f"{flag} {path}: not writable ({error.strerror or error})") from error


def check_plot(path: str | None) -> None:
    """Fail before a long measurement if its picture could not be drawn.

    Raises:
        ValueError: matplotlib is missing, the file is of no type that it draws, or it cannot be written.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is missing; pip install matplotlib")
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot {path}: unknown file type; use one of {', '.join(PLOT_SUFFIXES)}")
    check_writable("--plot", path)


def write_output(path: Path, content: bytes) -> None:
    """Write a file atomically; a pipe or a device is written directly.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with atomic_write(path.resolve()) as file:
        file.write(content)
