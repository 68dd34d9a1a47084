"""Reproduces the paper's tables: one job a stage, on Slurm or here.

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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from common.args import KINDS as DROPS  # noqa: E402
from common.args import Parser, hyphenated, parse  # noqa: E402
from common.folder import LAST  # noqa: E402
from scripts.command import complaining  # noqa: E402
from scripts.stage import STATUS, STOPPED, read  # noqa: E402
from scripts.submit import (  # noqa: E402
    UNDER_WAY,
    Cluster,
    add_cluster_flags,
    check_cluster,
    locked,
    queue,
    run_here,
    state_of,
    submit,
)
from scripts.table import (  # noqa: E402
    KINDS,
    MAE_WEIGHTS,
    MINI,
    MINI_OUTPUT,
    OUTPUT,
    RATIO,
    RECIPES,
    ROWS,
    STAGE_BEFORE,
    Row,
    Stage,
    fit,
    folder_of,
    select,
)

WEIGHTS = "mae_pretrain_vit_{}.pth"  # as they are published: base, large, huge


@dataclass(frozen=True)
class Task:
    """A stage of a row with a drop: what it runs, and where."""

    row: Row
    kind: str
    stage: Stage  # on the processes that it gets here
    flags: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.id}-{self.kind}/{self.stage.name}"


def create_parser() -> argparse.ArgumentParser:
    """The flags of the table: rows, drops, data, and the cluster's."""
    parser = Parser(description=__doc__, prog="reproduce_table.sh")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("rows", nargs="*", help="such as deit/small_400, or swin for all of a recipe; all rows where none is named")
    add("--augsub", default=",".join(KINDS), help="drops, with commas between them; none is the plain recipe")
    add("--augsub-ratio", type=float, default=RATIO, help="drop probability of the sub-model")
    add("--data-path", default=None, help="ImageNet, with train/ and val/")
    add("--mae-weights", default=None, help=f"folder with {WEIGHTS.format('base')}, … large and … huge")
    add("--output", type=Path, default=None, help=f"folder of the runs; {OUTPUT}, or {MINI_OUTPUT} with --mini")
    add("--mini", action="store_true", help="the same on the embedded digits with small models, in minutes")
    add("--plan", action="store_true", help="submit nothing; print what would run, and what it costs")
    add("--gpu", default="a100", help="the GPU that --plan reckons with: v100, a100, h100, h200")
    add("--utilisation", type=float, default=0.35, help="share of that GPU's peak rate that --plan reckons with")
    add("--append", nargs=argparse.REMAINDER, default=[], help="flags for every run; comes last")
    add_cluster_flags(parser)
    return parser


def main() -> None:
    """Submits, runs or plans the table."""
    parser = create_parser()
    words = sys.argv[1:]
    cut = words.index("--append") if "--append" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.append = words[cut + 1 :]
    args.cpu = args.cpu or (args.mini and args.gpus_per_node is None)
    with complaining(parser):
        sys.exit(carry_out(args))


def carry_out(args: argparse.Namespace) -> int:
    """Does what is asked for → the status to leave with: 1 where a run has failed, 3 where one was asked to stop.

    Raises:
        ValueError, OSError: something that is asked for cannot be done.
    """
    check_cluster(args)
    tasks = tasks_of(args)
    if args.plan:
        from scripts.plan import print_plan

        print_plan(tasks, args.gpu, args.utilisation)
        return 0
    check_inputs(args, tasks)
    slurm, stopped = begin(args, tasks)
    if stopped:
        print("stopped on request; the same command goes on")
        return STOPPED
    failed = False
    if args.mini or not slurm:
        failed = "failed" in wait(tasks, slurm)
    if args.mini:
        from scripts.collect import table

        rows = select(MINI, args.rows)
        print(table(root_of(args), rows, args.augsub_ratio, args.append, None if slurm else {}))
    return int(failed)


def root_of(args: argparse.Namespace) -> Path:
    """Folder of all runs."""
    found: Path = args.output or (MINI_OUTPUT if args.mini else OUTPUT)
    return found.absolute()


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """All stages that are asked for, each after those it needs.

    Raises:
        ValueError: an unknown row or drop, or processes that do not divide a row's batch.
    """
    kinds = list(dict.fromkeys(kind.strip() for kind in args.augsub.split(",")))
    for kind in kinds:
        if kind not in DROPS:
            raise ValueError(f"--augsub {kind}: choose from {', '.join(DROPS)}")
    tasks = []
    for row in select(MINI if args.mini else ROWS, args.rows):
        for kind in kinds:
            before = Path()
            for published in row.stages:
                nodes = args.nodes or published.nodes
                stage, flags = fit(published, nodes, args.gpus_per_node or published.gpus)
                folder = folder_of(root_of(args), row, kind, args.augsub_ratio, args.append) / stage.name
                flags = [*flags, *stage.flags, "--augsub", kind]
                if kind != "none" and args.augsub_ratio != RATIO:
                    flags += ["--augsub-ratio", str(args.augsub_ratio)]
                if stage.variant is not None:
                    flags = ["--variant", stage.variant, *flags, "--data-path", str(args.data_path or "DATA_PATH")]
                if stage.start == STAGE_BEFORE:
                    flags += ["--finetune", str(before / LAST)]
                elif stage.start == MAE_WEIGHTS:
                    flags += ["--finetune", str(weights_of(args, stage))]
                flags += ["--output-dir", str(folder), *args.append]
                tasks.append(Task(row, kind, stage, tuple(flags), folder))
                before = folder
    return tasks


def weights_of(args: argparse.Namespace, stage: Stage) -> Path:
    """The published pretrained weights of a stage's size."""
    return Path(args.mae_weights or "MAE_WEIGHTS", WEIGHTS.format(str(stage.variant).partition("_")[0]))


def check_inputs(args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Looks for data and weights, and at every run's flags, before anything is submitted.

    Raises:
        ValueError: something is missing, or the output folder cannot be written.
    """
    if any(hyphenated(word).partition("=")[0] in ("--output-dir", "--output") for word in args.append):
        raise ValueError("--append --output-dir: each run has a folder of its own; --output names the folder of all")
    if any(task.stage.variant is not None for task in tasks):
        if args.data_path is None:
            raise ValueError("--data-path is needed: the folder of ImageNet, with train/ and val/")
        from common.data import find_folder

        for train in (True, False):
            find_folder(Path(args.data_path), train)
    for task in tasks:
        if task.stage.start == MAE_WEIGHTS:
            if args.mae_weights is None:
                raise ValueError(f"{task.row.id} needs --mae-weights, the folder of the published pretrained files")
            if not weights_of(args, task.stage).is_file():
                raise ValueError(f"--mae-weights: there is no {weights_of(args, task.stage)}")
    for task in tasks:
        parse(RECIPES[task.row.recipe], task.flags)
    try:
        with locked(root_of(args)):
            pass
    except OSError as error:
        raise ValueError(f"--output {root_of(args)}: not a folder that can be written to ({error.strerror})") from error


def begin(args: argparse.Namespace, tasks: Sequence[Task]) -> tuple[bool, bool]:
    """Submits what is missing or failed, or runs it here, one after the other → whether Slurm has it, and whether a
    run here was asked to stop."""
    held = set()  # rows of which a stage has failed here
    fresh = set()  # rows of which a stage is not done before this call
    jobs: dict[Path, str] = {}
    with locked(root_of(args)):
        slurm = Cluster.of(args, args.nodes or 1, args.gpus_per_node or 1).slurm
        known = queue() if slurm else {}
        for task in tasks:
            row = task.folder.parent
            cluster = Cluster.of(args, task.stage.nodes, task.stage.gpus)
            state, reason = state_of(task.folder, known)
            if state not in UNDER_WAY and row in fresh and task.stage.start == STAGE_BEFORE:
                put_aside(task)
                state = "missing"
            if state == "done":
                print(f"{task.name}: done", flush=True)
                continue
            fresh.add(row)
            if state in UNDER_WAY:
                print(f"{task.name}: {state}" + (f" ({reason})" if reason else ""), flush=True)
                jobs[row] = job_of(task.folder)
                continue
            if row in held:
                print(f"{task.name}: not begun, since the stage before it failed", flush=True)
                continue
            after = jobs.get(row) if task.stage.start == STAGE_BEFORE else None
            said = submit(task.stage.entry, task.flags, task.folder, cluster, f"augsub-{task.name}", after)
            print(f"{task.name}: {said}", flush=True)
            if slurm:
                jobs[row] = job_of(task.folder)
                continue
            status = run_here(task.folder, cluster)
            if status == STOPPED:
                return slurm, True
            if status:
                held.add(row)
    return slurm, False


def put_aside(task: Task) -> None:
    """Takes away what a stage has made from a stage before it that was not at its end."""
    if any(task.folder.rglob(LAST)):
        number = len(list(task.folder.parent.glob(f"{task.folder.name}.before-*"))) + 1
        aside = task.folder.with_name(f"{task.folder.name}.before-{number}")
        os.rename(task.folder, aside)
        print(f"{task.name}: what it made of an unfinished stage before it is put aside as {aside.name}", flush=True)


def wait(tasks: Sequence[Task], slurm: bool, seconds: float = 2.0) -> list[str]:
    """Waits until no stage is queued or running, and says what has come of each → their states."""
    left, states = list(tasks), []
    while left:
        known = queue() if slurm else {}
        for task in list(left):
            state, reason = state_of(task.folder, known)
            if state not in UNDER_WAY or not slurm:
                print(f"{task.name}: {state}" + (f": {reason}" if reason else ""), flush=True)
                left.remove(task)
                states.append(state)
        if left:
            time.sleep(seconds)
    return states


def job_of(folder: Path) -> str:
    """The id of a folder's job."""
    return str(read(folder / STATUS)["job"])


if __name__ == "__main__":
    main()
