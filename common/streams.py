"""Standard output and error: printing never ends a run, but for a closed pipe (`| head`).

Written here, since Python's own streams raise where a name has a character that the encoding lacks, where the disk is
full and where the terminal is gone, and are None after `>&-`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class OutputFile(io.FileIO):
    """A standard stream that drops what cannot be written.

    Standard output still raises BrokenPipeError, with which `| head` ends a program.

    Args:
        descriptor: 1 for standard output, 2 for standard error.

    Attributes:
        error: why the first write failed, such as "No space left on device"; not the exception, whose traceback would
            keep what the caller's frames hold, such as DataLoader workers.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.descriptor = descriptor
        self.error: str | None = None

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self.descriptor == 1:
                raise
            self.error = self.error or error.strerror
            return len(data)
        return len(data) if written is None else written  # None: a pipe that does not wait is full


def protect_output() -> None:
    """Replace standard output and error by streams on which printing does not fail; to be called first of all.

    A character that the encoding lacks is printed as an escape such as \\udce9. Streams that something else has
    replaced already, as pytest does, stay as they are.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, as by `>&-`: the next file that is opened would become standard output
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is sys.__stdout__:
        sys.stdout = open_output(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = open_output(sys.stderr, 2)


def open_output(stream: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    """Return a stream on an `OutputFile`, encoded and buffered as Python's own, which is None where it was closed."""
    encoding, lines, unbuffered = "utf-8", descriptor == 2, False
    if isinstance(stream, io.TextIOWrapper):
        encoding, lines, unbuffered = stream.encoding, stream.line_buffering, stream.write_through  # `python -u`
        with contextlib.suppress(OSError):
            stream.flush()
    file = OutputFile(descriptor)
    buffer: Any = file if unbuffered else io.BufferedWriter(file)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=lines, write_through=unbuffered)


def output_error() -> str | None:
    """Return why the first write to standard output failed; None where none has."""
    buffer: Any = getattr(sys.stdout, "buffer", None)
    return getattr(getattr(buffer, "raw", buffer), "error", None)


def silence_stdout() -> None:
    """Redirect standard output to /dev/null after a BrokenPipeError: else the interpreter would write to the closed
    pipe again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
