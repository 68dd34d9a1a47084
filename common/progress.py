"""How far an epoch has come: kept by the training loop, stored in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FILE_KEYS = {"step": "update", "lr_sum": "rates", "totals": "total", "interval_totals": "window"}  # field → key


@dataclass
class EpochProgress:
    """State between two optimizer steps of an epoch.

    Args:
        step: optimizer steps done in this epoch.
        lr_sum: of the learning rates of these steps.
        totals: images, then the sum of each loss over them, of all ranks up to the last report.
        interval_totals: the same since the last report, of this rank alone.
    """

    step: int = 0
    lr_sum: float = 0.0
    totals: list[float] = field(default_factory=list)
    interval_totals: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the keys that checkpoints have."""
        return {key: getattr(self, name) for name, key in FILE_KEYS.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochProgress:
        """Reverse `to_dict`; does not check the values. Raises KeyError on an unknown key."""
        names = {key: name for name, key in FILE_KEYS.items()}
        return cls(**{names[key]: value for key, value in values.items()})
