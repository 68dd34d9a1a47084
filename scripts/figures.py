"""What the benchmark's tables are made of: the spread of a sample, and columns of text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and size of a sample."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartile_1": low, "quartile_3": high, "count": len(values)}


def shown(value: dict[str, float], digits: int = 0) -> str:
    """Median ± half the distance of the quartiles, which one value does not have."""
    around = f" ± {(value['quartile_3'] - value['quartile_1']) / 2:.{digits}f}" if value["count"] > 1 else ""
    return f"{value['median']:.{digits}f}{around}"


def aligned(rows: list[list[str]]) -> str:
    """A table of text, its first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    padded = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def short(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin and end with."""
    words = [name.split("_") for name in names]
    if len(names) < 2:
        return list(names)
    while all(len(own) > 1 for own in words) and len({own[0] for own in words}) == 1:
        words = [own[1:] for own in words]
    while all(len(own) > 1 for own in words) and len({own[-1] for own in words}) == 1:
        words = [own[:-1] for own in words]
    return ["_".join(own) for own in words]
