"""Commands of the package under the name that it has where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.commands import ROOT, environment


def run_installed(
    *words: str, folder: Path, processes: int = 0, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run Python with `words` in a folder where `augsub` can be imported and the repository cannot.

    Args:
        processes: started by torchrun where it is not 0.
    """
    packages = folder / "site-packages"
    packages.mkdir(exist_ok=True)
    if not (packages / "augsub").exists():
        (packages / "augsub").symlink_to(ROOT / "common", target_is_directory=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *launcher, *words]
    variables = environment(PYTHONPATH=str(packages))
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
