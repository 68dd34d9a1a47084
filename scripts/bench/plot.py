"""Plots how training time per image grows: four panels, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from common.run_dir import atomic_write
from scripts.bench.report import strip_common_words

# Okabe and Ito's palette, for any colour vision, and markers for print in grey
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P")]
INK, FAINT = "#333333", "#888888"
TITLES = {
    "batch size": ("Batch size", "images in a step"),
    "image size": ("Image size", "pixels a side"),
    "model size": ("Model size", "10⁹ multiply-adds of an image's forward pass"),
    "processes": ("Processes", "processes, a batch each"),
}


def draw_sweeps(path: Path, sweeps: Sequence[dict[str, Any]], caption: str) -> None:
    """Plot the sweeps of `growth` into a file of the type that its suffix names.

    Raises:
        ValueError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = {"font.size": 10, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
             "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
             "axes.titleweight": "bold", "axes.titlesize": 11}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9, 7), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        for axes, sweep in zip(figure.subplots(2, 2).flat, sweeps):
            draw_panel(axes, sweep)
        lines, labels = figure.axes[0].get_legend_handles_labels()
        order = [*range(1, len(lines)), 0]  # matplotlib lists plain lines before those with error bars
        figure.legend([lines[i] for i in order], [labels[i] for i in order], loc="outside upper center",
                      ncols=len(lines), frameon=False)  # fmt: skip
        figure.supxlabel(caption, fontsize=8, color=FAINT)
        try:
            with atomic_write(path.resolve()) as file:
                figure.savefig(file, format=path.suffix[1:])
        except OSError as error:
            raise ValueError(f"--plot {path}: not writable ({error.strerror or error})") from error


def draw_panel(axes: Any, sweep: dict[str, Any]) -> None:
    """Plot a sweep, with error bars from quartile to quartile; dashed the time of the arithmetic alone."""
    points = sweep["points"]
    by_model = sweep["name"] == "model size"
    if by_model:
        points = sorted(points, key=giga_multiply_adds)
    x = [giga_multiply_adds(point) if by_model else point["at"] for point in points]
    modes = [figure["name"] for figure in points[0]["figures"]]
    for place, (name, (colour, marker)) in enumerate(zip(modes, cycle(STYLES))):
        results = [point["figures"][place] for point in points]
        times = [result["ms_per_image"] for result in results]
        medians = [time["median"] for time in times]
        below = [time["median"] - time["quartile_1"] for time in times]
        above = [time["quartile_3"] - time["median"] for time in times]
        axes.plot(x, [result["arithmetic_ms"] for result in results], "--", color=colour, linewidth=1.2, alpha=0.75)
        axes.errorbar(x, medians, [below, above], color=colour, marker=marker, markersize=5.5, linewidth=1.8, capsize=3,
                      elinewidth=1.2, label=name)  # fmt: skip
    axes.plot([], [], "--", color=FAINT, linewidth=1.2, label="arithmetic alone (processes: ideal scaling)")
    title, label = TITLES[sweep["name"]]
    axes.set(title=title, xlabel=label, ylabel="ms per image")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    set_scales(axes, sweep["name"], x)
    if by_model:  # names below the lowest line, where rising lines leave room
        for at, name, point in zip(x, strip_common_words([str(point["at"]) for point in points]), points):
            low = min(min(f["ms_per_image"]["quartile_1"], f["arithmetic_ms"]) for f in point["figures"])
            axes.annotate(name, (at, low), (5, -6), textcoords="offset points", va="top", fontsize=9)
    if sweep["name"] == "processes" and len(points) > 1:
        for first, last in zip(points[0]["figures"], points[-1]["figures"]):
            median = last["ms_per_image"]["median"]
            speed = f"{first['ms_per_image']['median'] / median:.2f}x speed"
            axes.annotate(speed, (x[-1], median), (9, 0), textcoords="offset points", va="center", fontsize=9)


def giga_multiply_adds(point: dict[str, Any]) -> float:
    """Return the multiply-adds of a point's model, in 10⁹ per image and forward pass."""
    return point["figures"][0]["multiply_adds"]["main"] / 1e9


def set_scales(axes: Any, name: str, x: Sequence[float]) -> None:
    """Set logarithmic scales to compare proportions, or a scale from 0 to compare sizes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    if name in ("image size", "model size"):
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=plain, minor_locator=NullLocator())
        axes.margins(x=0.08, y=0.14)
    else:
        axes.margins(x=0.25 if name == "processes" else 0.05, y=0.1)
        axes.set_ylim(bottom=0)
    if name == "batch size":
        axes.set_xscale("log", base=2)
    if name == "model size":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_xticks(x)
    if len(x) == 1:  # matplotlib would choose decades
        axes.set(xlim=(x[0] / 2, 2 * x[0]), xticks=x)
    axes.xaxis.set(major_formatter=plain, minor_locator=NullLocator())
