"""What ends a run."""

from __future__ import annotations


class StopTraining(Exception):
    """Training cannot go on; the message says why, and what is left. One process alone may raise it."""


class Leaving(SystemExit):
    """The process ends with a status; the first of several has the sentence that says why."""

    def __init__(self, sentence: str, status: int):
        super().__init__(status)
        self.sentence = sentence
