"""Numbers measured on the published trainers, and the fixed weights and images that they were measured with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def reference(recipe: str) -> dict[str, Any]:
    """The numbers of a recipe's published trainer."""
    return json.loads((Path(__file__).parent / "reference" / f"{recipe}.json").read_text())


def tensor_for(name: str, shape: list[int]) -> Tensor:
    """The fixed weight of that name."""
    n = math.prod(shape)
    phase = (sum(map(ord, name)) % 97) / 97 * 2 * math.pi
    w = np.sin(0.5113 * np.arange(n) + phase)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        w = 1 + 0.5 * w
    elif last in ("running_mean", "bias"):
        w = 0.05 * w
    elif last in ("gamma_1", "gamma_2"):
        w = 0.1 + 0.05 * w
    elif len(shape) <= 1:
        w = 1 + 0.2 * w
    else:
        w = w * math.sqrt(2 / (n / shape[0]))
    return torch.from_numpy(w.reshape(shape).astype(np.float32))


def image(batch: int, size: int) -> Tensor:
    """The fixed images, (B, 3, size, size)."""
    i = np.arange(3 * batch * size * size)
    pixels = np.cos(0.0171 * i + 0.2 * np.sin(0.0009 * i))
    return torch.from_numpy(pixels.reshape(batch, 3, size, size).astype(np.float32))
