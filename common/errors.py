"""What ends a run."""

from __future__ import annotations


class StopTraining(Exception):
    """Training cannot go on; the message says why, and what is left. One process alone may raise it."""
