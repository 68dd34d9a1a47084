"""What ends a run, and which process says so."""

from __future__ import annotations

import os


class StopTraining(Exception):
    """Training cannot go on; the message says why, and what is left. One process alone may raise it."""


class Leaving(SystemExit):
    """The process ends with a status; the first of several has the sentence that says why."""

    def __init__(self, sentence: str, status: int):
        super().__init__(status)
        self.sentence = sentence


def is_main_before_start() -> bool:
    """Whether this is the first process, told from the environment alone, so that one process speaks of bad input."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
