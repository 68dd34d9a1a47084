"""State of the random number generators: python's, numpy's and torch's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(*parts: int) -> None:
    """Seed python's, numpy's and torch's generators from several numbers, e.g. (seed, rank, epoch)."""
    state = np.random.SeedSequence(parts).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]))


def get_rng_state() -> dict[str, Any]:
    """The generators' states as tensors and plain values, for a checkpoint."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.tensor(np.asarray(keys).tolist()), *rest),
        "torch": torch.random.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `get_rng_state` returned.

    Raises:
        ValueError: a value is out of range.
    """
    random.setstate(state["python"])
    kind, keys, position, *rest = state["numpy"]
    if keys.shape != (624,) or not 0 <= position <= 624:  # numpy would read beyond them
        raise ValueError("a generator's state is out of range")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
