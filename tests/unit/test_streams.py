"""Standard output and error that are closed, full, gone or of a narrow encoding, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.launch.registry import ENTRY_POINTS
from scripts.launch.status import JOB_FILE, STATUS_FILE, find_state, read_json, update_status, write_json
from tests.commands import ROOT, environment

NAME = "caf\udce9 名"  # with a byte that is not UTF-8, as Python decodes names of files
# prints lines, and writes what became of them to a file
PRINT = f"""
import contextlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.streams import output_error, protect_output
lines = int(sys.argv[1])
protect_output()
sys.stdin and sys.stdin.read()
with open("file", "w") as file:
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.write(number, b"from C\\n")
    for _ in range(lines):
        print({NAME!r}, flush=True)
        print({NAME!r}, file=sys.stderr)
    file.write(str(output_error()))
"""
FULL = "No space left on device"
COMMANDS = [*ENTRY_POINTS.values(), *(
    str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("scripts/**/*.py"))
    if "__main__" in path.read_text() and "Parser(" in path.read_text()
)]  # fmt: skip


def start(cwd: Path, lines: int = 3, **kwargs: Any) -> subprocess.Popen[bytes]:
    """Start PRINT in a folder; it prints when its standard input is closed."""
    words = [sys.executable, "-c", PRINT, str(lines)]
    return subprocess.Popen(words, cwd=cwd, env=environment(), stdin=subprocess.PIPE, **kwargs)


def outcome(process: subprocess.Popen[bytes], cwd: Path) -> tuple[int, str]:
    """The exit code, and what is in the file."""
    process.communicate(timeout=60)
    return process.returncode, (cwd / "file").read_text()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("redirection", "stdout", "stderr", "error"), [
    ("", True, True, None),
    (">&-", False, True, None),
    ("2>&-", True, False, None),
    ("<&- >&- 2>&-", False, False, None),
    (">/dev/full", False, True, FULL),
    ("2>/dev/full", True, False, None),
    (">/dev/full 2>&1", False, False, FULL),
    (">&- 2>/dev/full", False, False, None),
])  # fmt: skip
def test_printing_fails_nowhere(redirection, stdout, stderr, error, unbuffered, tmp_path):
    """Nor does a file get the number of a stream that is closed, and with it what C prints."""
    (tmp_path / "print.py").write_text(PRINT)
    words = f"{sys.executable} print.py 3 </dev/null {redirection}"
    env = environment(PYTHONUNBUFFERED=unbuffered, PYTHONIOENCODING="")
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    printed = b"from C\n" + 3 * "caf\\udce9 名\n".encode()
    assert (done.returncode, done.stdout, done.stderr) == (0, printed if stdout else b"", printed if stderr else b"")
    assert (tmp_path / "file").read_text() == str(error)


@pytest.mark.parametrize(("encoding", "printed"), [
    ("ascii", rb"caf\udce9 \u540d"), ("latin-1", rb"caf\udce9 \u540d"), ("utf-8:strict", "caf\\udce9 名".encode()),
])  # fmt: skip
def test_what_an_encoding_lacks_is_escaped(encoding, printed, tmp_path):
    words = [sys.executable, "-c", PRINT, "1"]
    env = environment(PYTHONIOENCODING=encoding)
    done = subprocess.run(words, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout == done.stderr == b"from C\n" + printed + b"\n"


def test_a_terminal_that_is_gone(tmp_path):
    main, terminal = os.openpty()
    process = start(tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(main)
    assert outcome(process, tmp_path) == (0, "Input/output error")


def test_a_full_pipe_that_does_not_wait(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = start(tmp_path, lines=20_000, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    assert outcome(process, tmp_path) == (0, "None")
    os.close(reader)


def test_readers_that_leave(tmp_path):
    """That of standard error is not missed; without that of standard output a program ends."""
    for stream, code in (("stderr", 0), ("stdout", 1)):
        reader, writer = os.pipe()
        process = start(tmp_path, **({"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: writer}))
        os.close(reader)
        os.close(writer)
        assert outcome(process, tmp_path)[0] == code, stream


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    """With characters that the terminal has not, and to a disk that is full."""
    for redirection in ("", ">/dev/full", "2>&-"):
        words = f"{sys.executable} {ROOT / command} --help {redirection}"
        env = environment(PYTHONIOENCODING="ascii")
        done = subprocess.run(["bash", "-c", words], env=env, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b""), redirection
        assert done.stdout.startswith(b"" if "full" in redirection else b"usage: ")


def test_the_launchers_files_in_folders_of_any_name(tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    write_json(folder / JOB_FILE, {"flags": ["--output-dir", str(folder)]})
    update_status(folder, state="failed", reason=f"{folder}: wrong")
    assert read_json(folder / JOB_FILE) == {"flags": ["--output-dir", str(folder)]}
    assert find_state(folder, {}) == ("failed", f"{folder}: wrong")
    assert (folder / STATUS_FILE).read_bytes().isascii()
