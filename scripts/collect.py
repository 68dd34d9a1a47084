"""Show where the table's rows stand, and write the tables.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.flag_types import below_one, nonempty_path  # noqa: E402
from common.parser import Parser  # noqa: E402
from common.run_dir import CURVES, duration  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import check_plot, cli_errors  # noqa: E402
from scripts.launch.paper_tables import RATIO, SHORT, Row  # noqa: E402
from scripts.launch.planner import MINI_OUTPUT, OUTPUT, Table  # noqa: E402
from scripts.launch.results import StageRun, markdown_tables, query_queue_or_warn, read_runs  # noqa: E402
from scripts.launch.status import JOB_FILE, read_json  # noqa: E402


def main() -> None:
    """Print states, tables or curves."""
    protect_output()
    parser = Parser(description=__doc__, prog="collect.py", raw_description=True)
    parser.add_argument("rows", nargs="*", help="such as deit/small_400, or swin for all of a recipe")
    parser.add_argument(
        "--output", type=nonempty_path, default=None, help=f"folder of the runs; {OUTPUT}, or {MINI_OUTPUT} with --mini"
    )
    parser.add_argument("--mini", action="store_true", help="the table of the digits")
    parser.add_argument("--extra", action="store_true", help="rows outside the paper's tables: CLIP finetuning")
    parser.add_argument("--augsub-ratio", type=below_one, default=RATIO, help="of the runs to show")
    parser.add_argument("--append", nargs=argparse.REMAINDER, default=[], help="of the runs to show; comes last")
    parser.add_argument("--markdown", action="store_true", help="write the tables")
    parser.add_argument("--plot", type=nonempty_path, default=None, metavar="PNG", help="draw the curves")
    argv = sys.argv[1:]
    separator = argv.index("--append") if "--append" in argv else len(argv)
    args = parser.parse_args(argv[:separator])
    with cli_errors(parser):
        extra_flags = argv[separator + 1 :]
        table = Table.select(args.rows, args.mini, args.output, args.augsub_ratio, extra_flags, args.extra)
        if not table.root.is_dir():
            raise ValueError(f"--output {table.root}: no such folder; scripts/reproduce_table.sh creates it")
        check_plot(args.plot)
        queue = query_queue_or_warn()
        if args.plot is not None:
            plot(Path(args.plot), table, queue)
            print(f"drawn: {args.plot}")
        elif args.markdown:
            print(markdown_tables(table, queue))
        else:
            print_states(table, queue)


def print_states(table: Table, queue: dict[str, str] | None) -> None:
    """Print a line a stage, in aligned columns."""
    lines: list[tuple[str, ...]] = [("run", "state", "epoch", "acc@1", "best", "images/s", "left", "")]
    for row in table.rows:
        for run in read_runs(table, row, queue):
            speed, time_left = estimate_time_left(run) if run.state == "running" else ("", "")
            state = run.state + (f", {run.starts - 1}x restarted" if run.starts > 1 else "")
            epochs = f"{len(run.log)}/{count_epochs(run)}"
            scores = [f"{score:.2f}" if score is not None else "" for score in (run.last, run.best)]
            name = f"{row.id} {SHORT[run.kind]} {run.stage.name}"
            lines.append((name, state, epochs, *scores, speed, time_left, run.reason))
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    for line in lines:
        print("  ".join([*(word.ljust(width) for word, width in zip(line, widths)), line[7]]).rstrip())


def count_epochs(run: StageRun) -> int:
    """Epochs of the whole run: the last --epochs of its command, or its variant's."""
    try:
        flags = read_json(run.folder / JOB_FILE).get("flags", run.stage.flags)
    except ValueError:
        flags = run.stage.flags
    values = [int(value) for flag, value in itertools.pairwise(flags) if flag == "--epochs"]
    return values[-1] if values else int(run.stage.settings.epochs)


def estimate_time_left(run: StageRun) -> tuple[str, str]:
    """Images/s and the time left, from TensorBoard's curves; "" where they are too short."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted(run.folder.rglob(CURVES))
    if not folders:
        return "", ""
    curves = EventAccumulator(str(folders[0]), size_guidance={"scalars": 200}).Reload()
    tags = curves.Tags()["scalars"]
    if "speed/images_per_second" not in tags or "test/acc1" not in tags:
        return "", ""
    speeds = curves.Scalars("speed/images_per_second")[-50:]
    steps_per_epoch = curves.Scalars("test/acc1")[0].step
    step_seconds = [
        (after.wall_time - before.wall_time) / (after.step - before.step)
        for before, after in itertools.pairwise(speeds)
        if after.step > before.step
    ]
    steps_left = count_epochs(run) * steps_per_epoch - speeds[-1].step
    # the median, as the time between two starts of a job counts as one long step
    time_left = duration(steps_left * statistics.median(step_seconds)) if step_seconds else ""
    return f"{speeds[-1].value:.0f}", time_left


def plot(path: Path, table: Table, queue: dict[str, str] | None) -> None:
    """Draw accuracy and losses over epochs, with a row of axes for each row of the table.

    Raises:
        ValueError: no run has finished an epoch.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = {row: [run for run in read_runs(table, row, queue) if run.log] for row in table.rows}
    runs = {row: row_runs for row, row_runs in runs.items() if row_runs}
    if not runs:
        raise ValueError(f"{table.root}: no run has finished an epoch yet")
    figure, axes = pyplot.subplots(len(runs), 2, figsize=(10, 3.2 * len(runs)), squeeze=False, layout="constrained")
    for (row, row_runs), (accuracy_axes, loss_axes) in zip(runs.items(), axes):
        plot_row(row, row_runs, accuracy_axes, loss_axes)
    figure.savefig(path, dpi=120)


def plot_row(row: Row, runs: Sequence[StageRun], accuracy_axes: Any, loss_axes: Any) -> None:
    """Draw a row of the table; the epochs of a second stage follow those of the first."""
    colors = {kind: f"C{i}" for i, kind in enumerate(SHORT)}
    epochs_before: dict[str, int] = {}  # of the stages before, by kind
    for run in runs:
        offset = epochs_before.get(run.kind, 0)
        epochs = [offset + entry["epoch"] + 1 for entry in run.log]
        epochs_before[run.kind] = epochs[-1]
        name = SHORT[run.kind] if offset == 0 else ""  # one entry in the legend for all stages
        style = {"color": colors[run.kind], "marker": "." if len(epochs) < 20 else ""}
        accuracy_axes.plot(epochs, [entry["test_acc1"] for entry in run.log], label=name or None, **style)
        for key, model, line in (("train_loss", "main model", "-"), ("train_sub_loss", "sub-model", "--")):
            if key in run.log[0]:
                label = f"{name}, {model}" if name else None
                loss_axes.plot(epochs, [entry[key] for entry in run.log], line, label=label, **style)
    accuracy_axes.set(title=f"{row.title}, {row.model}", xlabel="epoch", ylabel="test accuracy, %")
    loss_axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for axes in (accuracy_axes, loss_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)


if __name__ == "__main__":
    main()
