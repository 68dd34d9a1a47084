"""Shows where the table's rows stand, and writes the tables.

    python scripts/collect.py                   a line a row: state, epoch, accuracy, images/s, time left
    python scripts/collect.py --markdown        the tables, paper | ours | difference
    python scripts/collect.py --plot table.png  accuracy and losses over epochs, plain against AugMask

With --mini it is about the small tables on the digits.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from common.args import Parser  # noqa: E402
from common.folder import CURVES, LOG, duration, entries  # noqa: E402
from scripts.command import complaining  # noqa: E402
from scripts.stage import JOB, STATUS, read  # noqa: E402
from scripts.submit import queue, state_of  # noqa: E402
from scripts.table import KINDS, MINI, MINI_OUTPUT, OUTPUT, RATIO, ROWS, SHORT, TITLES, Row, Stage, folder_of, select  # noqa: E402


def main() -> None:
    """Prints what is asked for."""
    parser = Parser(description=__doc__, prog="collect.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", nargs="*", help="such as deit/small_400, or swin for all of a recipe")
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the runs; {OUTPUT}, or {MINI_OUTPUT}")
    parser.add_argument("--mini", action="store_true", help="the table of the digits")
    parser.add_argument("--augsub-ratio", type=float, default=RATIO, help="of the runs to show")
    parser.add_argument("--append", nargs=argparse.REMAINDER, default=[], help="of the runs to show; comes last")
    parser.add_argument("--markdown", action="store_true", help="write the tables")
    parser.add_argument("--plot", type=Path, default=None, metavar="PNG", help="draw the curves")
    words = sys.argv[1:]
    cut = words.index("--append") if "--append" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.append = words[cut + 1 :]
    root = args.output or (MINI_OUTPUT if args.mini else OUTPUT)
    with complaining(parser):
        rows = select(MINI if args.mini else ROWS, args.rows)
        if not root.is_dir():
            raise ValueError(f"{root}: there is no such folder; scripts/reproduce_table.sh makes it")
        what = root, rows, args.augsub_ratio, args.append
        if args.plot is not None:
            plot(args.plot, *what)
            print(f"drawn: {args.plot}")
        elif args.markdown:
            print(table(*what))
        else:
            show(*what)


@dataclass(frozen=True)
class Run:
    """A stage's folder, and what is in it."""

    row: Row
    kind: str
    stage: Stage
    folder: Path
    state: str
    reason: str
    starts: int
    log: list[dict[str, Any]]  # an entry an epoch

    @property
    def best(self) -> float | None:
        return max((entry["test_acc1"] for entry in self.log), default=None)

    @property
    def last(self) -> float | None:
        return self.log[-1]["test_acc1"] if self.log else None


def runs_of(root: Path, row: Row, jobs: dict[str, str] | None, ratio: float, more: Sequence[str]) -> Iterator[Run]:
    """The stages of a row with each of its drops, of runs with that ratio and those flags beside the row's."""
    for kind in SHORT:
        place = folder_of(root, row, kind, ratio, more)
        if kind not in KINDS and not place.is_dir():
            continue
        for stage in row.stages:
            folder = place / stage.name
            try:
                state, reason = state_of(folder, jobs)
                starts = read(folder / STATUS).get("starts", 0)
            except ValueError as error:
                state, reason, starts = "unknown", str(error), 0
            log = [entry for file in folder.rglob(LOG) for entry in entries(file.parent)]
            yield Run(row, kind, stage, folder, state, reason, starts, log)


def jobs_now() -> dict[str, str] | None:
    """Slurm's queue; None where Slurm does not answer, and states are those written last."""
    try:
        return queue()
    except ValueError as error:
        print(
            f"collect.py: Slurm does not answer, so states are as the runs wrote them last ({error})", file=sys.stderr
        )
        return None


def show(root: Path, rows: Sequence[Row], ratio: float, more: Sequence[str]) -> None:
    """A line a stage."""
    jobs = jobs_now()
    lines: list[tuple[str, ...]] = [("run", "state", "epoch", "acc@1", "best", "images/s", "left", "")]
    for row in rows:
        for run in runs_of(root, row, jobs, ratio, more):
            speed, left = pace(run) if run.state == "running" else ("", "")
            state = run.state + (f", {run.starts - 1}x restarted" if run.starts > 1 else "")
            done = f"{len(run.log)}/{epochs_of(run)}"
            scores = [f"{score:.2f}" if score is not None else "" for score in (run.last, run.best)]
            lines.append(
                (f"{row.id} {SHORT[run.kind]} {run.stage.name}", state, done, *scores, speed, left, run.reason)
            )
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    for line in lines:
        print("  ".join([*(word.ljust(width) for word, width in zip(line, widths)), line[7]]).rstrip())


def epochs_of(run: Run) -> int:
    """Epochs that a run is to have: what its command says last, else its variant."""
    try:
        flags = read(run.folder / JOB).get("flags", run.stage.flags)
    except ValueError:
        flags = run.stage.flags
    said = [int(value) for flag, value in itertools.pairwise(flags) if flag == "--epochs"]
    return said[-1] if said else int(run.stage.settings.epochs)


def pace(run: Run) -> tuple[str, str]:
    """Images/s and the time left, from the newest curves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted(run.folder.rglob(CURVES))
    if not folders:
        return "", ""
    curves = EventAccumulator(str(folders[0]), size_guidance={"scalars": 200}).Reload()
    tags = curves.Tags()["scalars"]
    if "speed/images_per_second" not in tags or "test/acc1" not in tags:
        return "", ""
    points, tests = curves.Scalars("speed/images_per_second"), curves.Scalars("test/acc1")
    epoch = tests[0].step  # steps of an epoch
    recent = points[-min(len(points), 50) :]
    paces = [(b.wall_time - a.wall_time) / (b.step - a.step)
             for a, b in itertools.pairwise(recent) if b.step > a.step]  # fmt: skip
    # the median passes over the time between two starts
    left = duration((epochs_of(run) * epoch - recent[-1].step) * statistics.median(paces)) if paces else ""
    return f"{recent[-1].value:.0f}", left


def table(
    root: Path,
    rows: Sequence[Row],
    ratio: float = RATIO,
    more: Sequence[str] = (),
    jobs: dict[str, str] | None = None,
) -> str:
    """The tables in Markdown: the paper's accuracy, ours and the difference, ours empty where a run is not done.

    Args:
        jobs: what `queue` gave; None asks it.
    """
    jobs, parts = jobs_now() if jobs is None else jobs, []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        ours = [row for row in rows if row.recipe == recipe]
        there = {run.kind for row in ours for run in runs_of(root, row, jobs, ratio, more)}
        kinds = [kind for kind in SHORT if kind in there]
        heads = [f"{SHORT[kind]}: {column}" for kind in kinds for column in ("paper", "ours", "difference")]
        parts += [f"**{TITLES[recipe]}**, top-1 in %", "", f"| model | epochs | {' | '.join(heads)} |"]
        parts += ["|---" * (2 + len(heads)) + "|"]
        for row in ours:
            ends = {run.kind: run for run in runs_of(root, row, jobs, ratio, more)}  # the last stage of each
            cells = []
            for kind in kinds:
                paper, run = row.paper.get(kind), ends.get(kind)
                got = run.last if run is not None and run.state == "done" else None
                cells += ["" if paper is None else f"{paper:.1f}", "" if got is None else f"{got:.2f}"]
                cells += ["" if paper is None or got is None else f"{got - paper:+.2f}"]
            parts.append(f"| {row.model} | {row.epochs} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip()


def plot(path: Path, root: Path, rows: Sequence[Row], ratio: float, more: Sequence[str]) -> None:
    """Draws accuracy and losses over epochs, a row of the table in a row of axes.

    Raises:
        ValueError: nothing has been trained yet.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    jobs = jobs_now()
    drawn = [(row, [run for run in runs_of(root, row, jobs, ratio, more) if run.log]) for row in rows]
    drawn = [(row, runs) for row, runs in drawn if runs]
    if not drawn:
        raise ValueError(f"{root}: no run has finished an epoch yet")
    figure, axes = pyplot.subplots(len(drawn), 2, figsize=(10, 3.2 * len(drawn)), squeeze=False, layout="constrained")
    colours = {kind: f"C{i}" for i, kind in enumerate(SHORT)}
    for (row, runs), (left, right) in zip(drawn, axes):
        offset: dict[str, int] = {}
        for run in runs:
            start = offset.get(run.kind, 0)
            epochs = [start + entry["epoch"] + 1 for entry in run.log]
            offset[run.kind] = epochs[-1]
            name = SHORT[run.kind] if start == 0 else ""
            style = {"color": colours[run.kind], "marker": "." if len(epochs) < 20 else ""}
            left.plot(epochs, [entry["test_acc1"] for entry in run.log], label=name or None, **style)
            for loss, model, line in (("train_loss", "main model", "-"), ("train_sub_loss", "sub-model", "--")):
                if loss in run.log[0]:
                    label = f"{name}, {model}" if name else None
                    right.plot(epochs, [entry[loss] for entry in run.log], line, label=label, **style)
        left.set(title=f"{TITLES[row.recipe]}, {row.model}", xlabel="epoch", ylabel="test accuracy, %")
        right.set(xlabel="epoch", ylabel="training loss", yscale="log")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
        left.legend(frameon=False)
        right.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
