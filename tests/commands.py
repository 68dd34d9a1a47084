"""The entry points as commands, run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(**env: str) -> dict[str, str]:
    """A child process's variables: none of a launcher, one thread, and those given."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return inherited | {"OMP_NUM_THREADS": "1"} | env


def command(*args: str, entry: str = "deit/main.py", processes: int = 0) -> list[str]:
    """The command line of an entry point, under torchrun where `processes` is not 0."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(ROOT / entry), *args]


def run(
    *args: str, cwd: Path, entry: str = "deit/main.py", processes: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run an entry point to its end, from the folder `cwd`."""
    words = command(*args, entry=entry, processes=processes)
    return subprocess.run(words, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=240)
