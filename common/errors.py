"""Exceptions that end a run, and which process prints the message."""

from __future__ import annotations

import os


class StopTraining(Exception):
    """Training cannot go on; the message says why and what is left. A single rank may raise it."""


class CleanExit(SystemExit):
    """Ends the process with an exit code and no traceback; `message` is "" on all ranks but the one that printed it."""

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message


def is_rank_zero_from_env() -> bool:
    """Whether this is rank 0, read from torchrun's or Slurm's variables, so before the process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
