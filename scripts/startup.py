"""How long a user waits: for `--help`, and from the command to the end of the first training step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.pipelines import make_photographs
from scripts.table import ENTRIES, ROOT

BATCH = 8
LOOKS = ("help", "digits", "photographs")  # what is waited for: the help, and a step on either data


@dataclass
class Started:
    """A recipe's entry point.

    Args:
        seconds: one entry a round, by what was waited for.
    """

    recipe: str
    row: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {look: [] for look in LOOKS})


def measure_starts(rows: dict[str, str], flags: Sequence[str], rounds: int) -> list[Started]:
    """Starts each entry point anew for each figure, in a process of its own, without `torchrun`.

    Args:
        rows: a variant by recipe; its model is trained on a few JPEGs, in batches of `BATCH`.
        flags: of the entry points, besides.

    Raises:
        ValueError: a start ended without a step; in its own words.
    """
    found = [Started(recipe, row) for recipe, row in rows.items()]
    with tempfile.TemporaryDirectory() as folder:
        photographs = make_photographs(Path(folder, "photographs"), 4 * BATCH)
        for _ in range(rounds):
            for entry in found:
                script = str(ROOT / ENTRIES[entry.recipe])
                each = ["--epochs", "1", "--warmup-epochs", "0", "--log-interval", "1", "--output-dir", "", *flags]
                own = ["--variant", entry.row, "--data-path", str(photographs), "--batch-size", str(BATCH)]
                waits = {
                    "help": _seconds_until("usage: ", [script, "--help"]),
                    "digits": _seconds_until("epoch 1/1  step 1/", [script, *each]),
                    "photographs": _seconds_until("epoch 1/1  step 1/", [script, *own, *each]),
                }
                for look, seconds in waits.items():
                    entry.seconds[look].append(seconds)
    return found


def _seconds_until(line: str, words: Sequence[str]) -> float:
    """From the start of a script until it prints a line that begins so; for the help until it ends."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)  # fmt: skip
    assert process.stdout is not None
    said = ""
    try:
        for said in process.stdout:
            if said.startswith(line):
                break
        else:
            raise ValueError(f"{Path(words[0]).name} ended before its first step: {said.strip() or 'silently'}")
        if "--help" in words:
            process.stdout.read()
            process.wait()
        return time.perf_counter() - start
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
