"""AugSub for any model and training loop; in a clone also everything that the four recipes share.

Installed, this package is called `augsub` and holds the method alone. `from augsub import AugSub` imports PyTorch,
`import augsub` does not: `--help` of the recipes is answered without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augsub import AugSub
    from .drops import find_drops

__all__ = ["AugSub", "find_drops"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import augsub, drops

    return getattr(drops if name == "find_drops" else augsub, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
