"""Reproduce the paper's tables: one job a stage, on Slurm or here.

    sbatch scripts/reproduce_table.sh --data-path /data/imagenet --mae-weights /data/mae --partition gpu --account x
    bash scripts/reproduce_table.sh deit/small_400 swin --augsub masking --data-path /data/imagenet --plan
    bash scripts/reproduce_table.sh --mini

A second call submits what is missing or failed, and nothing that is queued, running or done. scripts/collect.py shows
where the rows stand.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.args import parse  # noqa: E402
from common.flag_types import above_zero_to_one, below_one, nonempty_path  # noqa: E402
from common.parser import Parser, normalize_flag  # noqa: E402
from common.run_dir import LAST  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import cli_errors  # noqa: E402
from scripts.launch.job import EXIT_STOPPED  # noqa: E402
from scripts.launch.paper_tables import KINDS, MAE_WEIGHTS, PREVIOUS_STAGE, RATIO  # noqa: E402
from scripts.launch.planner import (  # noqa: E402
    MINI_OUTPUT,
    OUTPUT,
    WEIGHTS,
    Table,
    Task,
    mae_weights_file,
    plan_tasks,
)
from scripts.launch.registry import RECIPES  # noqa: E402
from scripts.launch.results import markdown_tables, query_queue_or_warn  # noqa: E402
from scripts.launch.slurm import Cluster, add_cluster_flags, query_queue  # noqa: E402
from scripts.launch.status import IN_PROGRESS, STATUS_FILE, find_state, read_json  # noqa: E402
from scripts.launch.submission import lock_submissions, run_here, submit_job  # noqa: E402

POLL_INTERVAL_S = 2.0


def create_parser() -> argparse.ArgumentParser:
    """Flags of the table: rows, drops, data, and the cluster's."""
    parser = Parser(description=__doc__, prog="reproduce_table.sh", raw_description=True)
    add = parser.add_argument
    add("rows", nargs="*", help="such as deit/small_400, or swin for all of a recipe; all rows where none is named")
    add("--augsub", default=",".join(KINDS), help="drops, with commas between them; none is the plain recipe")
    add("--augsub-ratio", type=below_one, default=RATIO, help="drop probability of the sub-model")
    add("--data-path", type=nonempty_path, default=None, help="ImageNet, with train/ and val/")
    add(
        "--mae-weights",
        type=nonempty_path,
        default=None,
        help=f"folder with {WEIGHTS.format('base')}, … large and … huge",
    )
    add(
        "--output", type=nonempty_path, default=None, help=f"folder of the runs; {OUTPUT}, or {MINI_OUTPUT} with --mini"
    )
    add("--mini", action="store_true", help="the same on the embedded digits with small models, in minutes")
    add("--extra", action="store_true", help="rows outside the paper's tables: CLIP finetuning, by mae/clip_base, …")
    add("--plan", action="store_true", help="submit nothing; print what would run, and what it costs")
    add("--gpu", default="a100", help="the GPU of --plan's estimate: v100, a100, h100, h200")
    add("--utilisation", type=above_zero_to_one, default=0.35, help="share of that GPU's peak rate in the estimate")
    add("--append", nargs=argparse.REMAINDER, default=[], help="flags for every run; comes last")
    add_cluster_flags(parser)
    return parser


def main() -> None:
    """Submit, run or plan the table."""
    protect_output()
    parser = create_parser()
    argv = sys.argv[1:]
    separator = argv.index("--append") if "--append" in argv else len(argv)
    args = parser.parse_args(argv[:separator])
    args.append = argv[separator + 1 :]
    args.cpu = args.cpu or (args.mini and args.gpus_per_node is None)
    with cli_errors(parser):
        exit_code = reproduce(args)
        if not args.plan:  # whose product is what it prints
            sys.exit(exit_code)


def reproduce(args: argparse.Namespace) -> int:
    """Do what the flags say → exit code: 1 where a run failed, 3 where one was stopped.

    Raises:
        ValueError, OSError: bad input.
    """
    table = Table.select(args.rows, args.mini, args.output, args.augsub_ratio, args.append, args.extra)
    kinds = list(dict.fromkeys(kind.strip() for kind in args.augsub.split(",")))
    tasks = plan_tasks(table, kinds, args.nodes, args.gpus_per_node, args.data_path, args.mae_weights)
    if args.plan:
        from scripts.launch.cost import print_plan  # here, as it imports torch

        print_plan(tasks, args.gpu, args.utilisation)
        return 0
    check_inputs(args, table, tasks)
    slurm = Cluster.from_args(args, args.nodes or 1, args.gpus_per_node or 1).slurm
    with lock_submissions(table.root):
        stopped = start_tasks(args, tasks, slurm)
    if stopped:
        print("stopped; run the same command to resume")
        return EXIT_STOPPED
    failed = (args.mini or not slurm) and "failed" in wait_for_tasks(tasks, slurm)
    if args.mini:
        print(markdown_tables(table, query_queue_or_warn() if slurm else {}))
    return int(failed)


def check_inputs(args: argparse.Namespace, table: Table, tasks: Sequence[Task]) -> None:
    """Check data, weights, each run's flags and the output folder before anything is submitted.

    Raises:
        ValueError: one of them is missing or wrong.
    """
    if any(normalize_flag(word).partition("=")[0] in ("--output-dir", "--output") for word in args.append):
        raise ValueError("--append --output-dir: each run has its own folder; --output sets the folder of all runs")
    if any(task.stage.variant is not None for task in tasks):
        from common.data.datasets import find_folder  # here, as it imports torch

        if args.data_path is None:
            raise ValueError("--data-path is missing: the folder of ImageNet, with train/ and val/")
        for train in (True, False):
            find_folder(Path(args.data_path), train)
    for task in tasks:
        if task.stage.start == MAE_WEIGHTS:
            if args.mae_weights is None:
                raise ValueError(f"--mae-weights is missing: {task.row.id} starts from the published pretrained files")
            if not mae_weights_file(args.mae_weights, task.stage).is_file():
                raise ValueError(f"--mae-weights: no file {mae_weights_file(args.mae_weights, task.stage)}")
        parse(RECIPES[task.row.recipe], task.flags)
    try:
        with lock_submissions(table.root):
            pass
    except OSError as error:
        raise ValueError(f"--output {table.root}: not a writable folder ({error.strerror})") from error


def start_tasks(args: argparse.Namespace, tasks: Sequence[Task], slurm: bool) -> bool:
    """Submit the tasks that are missing or failed, or run them here one after the other → whether one was stopped.

    A row is known by its folder, which its stages share.
    """
    clusters = [Cluster.from_args(args, task.stage.nodes, task.stage.gpus) for task in tasks]
    queue = query_queue() if slurm else {}
    jobs: dict[Path, str] = {}  # newest job of each row
    unfinished_rows, failed_rows = set(), set()
    for task, cluster in zip(tasks, clusters):
        row = task.folder.parent
        state, reason = find_state(task.folder, queue)
        if state not in IN_PROGRESS and row in unfinished_rows and task.stage.start == PREVIOUS_STAGE:
            archive_result(task)  # of weights that the previous stage is about to replace
            state = "missing"
        if state == "done":
            print(f"{task.name}: done", flush=True)
            continue
        unfinished_rows.add(row)
        if state in IN_PROGRESS:
            print(f"{task.name}: {state}" + (f" ({reason})" if reason else ""), flush=True)
            jobs[row] = str(read_json(task.folder / STATUS_FILE)["job"])
        elif row in failed_rows:
            print(f"{task.name}: not started, as the stage before it failed", flush=True)
        else:
            after = jobs.get(row) if task.stage.start == PREVIOUS_STAGE else None
            job, exit_code = start_task(task, cluster, after)
            if job is not None:
                jobs[row] = job
            if exit_code == EXIT_STOPPED:
                return True
            if exit_code:
                failed_rows.add(row)
    return False


def start_task(task: Task, cluster: Cluster, after: str | None) -> tuple[str | None, int]:
    """Submit a task after another job, or run it here → its job's id, or None and the exit code."""
    job = submit_job(task.stage.entry, task.flags, task.folder, cluster, f"augsub-{task.name}", after)
    if job is None:
        print(f"{task.name}: runs here", flush=True)
        return None, run_here(task.folder, cluster.gpus)
    print(f"{task.name}: submitted as job {job}" + (f", after job {after}" if after else ""), flush=True)
    return job, 0


def archive_result(task: Task) -> None:
    """Rename a task's folder with a checkpoint in it, out of the way of a new run."""
    if any(task.folder.rglob(LAST)):
        number = len(list(task.folder.parent.glob(f"{task.folder.name}.before-*"))) + 1
        archive = task.folder.with_name(f"{task.folder.name}.before-{number}")
        os.rename(task.folder, archive)
        print(f"{task.name}: renamed to {archive.name}, as the stage before it was unfinished", flush=True)


def wait_for_tasks(tasks: Sequence[Task], slurm: bool) -> list[str]:
    """Wait until no task is queued or running and print each one's end → their states."""
    pending, states = list(tasks), []
    while pending:
        queue = query_queue() if slurm else {}
        for task in list(pending):
            state, reason = find_state(task.folder, queue)
            if state not in IN_PROGRESS or not slurm:
                print(f"{task.name}: {state}" + (f": {reason}" if reason else ""), flush=True)
                pending.remove(task)
                states.append(state)
        if pending:
            time.sleep(POLL_INTERVAL_S)
    return states


if __name__ == "__main__":
    main()
