"""Results of a table's runs: state and log of each stage, and the tables in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.run_dir import LOG, read_log
from scripts.launch.paper_tables import KINDS, SHORT, Row, Stage
from scripts.launch.planner import Table
from scripts.launch.slurm import query_queue
from scripts.launch.status import STATUS_FILE, find_state, read_json


@dataclass(frozen=True)
class StageRun:
    """A stage of a row with a drop, and what its folder holds."""

    row: Row
    kind: str
    stage: Stage
    folder: Path
    state: str
    reason: str
    starts: int
    log: list[dict[str, Any]]  # an entry per epoch

    @property
    def best(self) -> float | None:
        return max((entry["test_acc1"] for entry in self.log), default=None)

    @property
    def last(self) -> float | None:
        return self.log[-1]["test_acc1"] if self.log else None


def query_queue_or_warn() -> dict[str, str] | None:
    """Slurm's queue; None with a warning where Slurm does not answer, and states are those in status.json."""
    try:
        return query_queue()
    except ValueError as error:
        print(f"Slurm does not answer; states are those written last ({error})", file=sys.stderr)
        return None


def read_runs(table: Table, row: Row, queue: dict[str, str] | None) -> Iterator[StageRun]:
    """Stages of a row with the drops of the paper's tables, and with others that have a folder."""
    for kind in SHORT:
        row_folder = table.folder(row, kind)
        if kind not in KINDS and not row_folder.is_dir():
            continue
        for stage in row.stages:
            folder = row_folder / stage.name
            try:
                state, reason = find_state(folder, queue)
                starts = read_json(folder / STATUS_FILE).get("starts", 0)
            except ValueError as error:
                state, reason, starts = "unknown", str(error), 0
            # the Swin recipe makes subfolders in the run's folder
            log = [entry for path in folder.rglob(LOG) for entry in read_log(path.parent)]
            yield StageRun(row, kind, stage, folder, state, reason, starts, log)


def markdown_tables(table: Table, queue: dict[str, str] | None) -> str:
    """A table a recipe: the paper's accuracy, ours and the difference; ours is empty until a run is done."""
    lines = []
    for recipe in dict.fromkeys(row.recipe for row in table.rows):
        title = next(row.title for row in table.rows if row.recipe == recipe)
        runs = {row: list(read_runs(table, row, queue)) for row in table.rows if row.recipe == recipe}
        kinds = [kind for kind in SHORT if any(run.kind == kind for row_runs in runs.values() for run in row_runs)]
        heads = [f"{SHORT[kind]}: {column}" for kind in kinds for column in ("paper", "ours", "difference")]
        lines += [f"**{title}**, top-1 in %", "", f"| model | epochs | {' | '.join(heads)} |"]
        lines += ["|---" * (2 + len(heads)) + "|"]
        for row, row_runs in runs.items():
            last_stages = {run.kind: run for run in row_runs}
            cells = [cell for kind in kinds for cell in _cells(row.paper.get(kind), last_stages.get(kind))]
            lines.append(f"| {row.model} | {row.epochs} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cells(paper: float | None, run: StageRun | None) -> tuple[str, str, str]:
    """Cells of a row for one drop: paper, ours, difference."""
    ours = run.last if run is not None and run.state == "done" else None
    difference = "" if paper is None or ours is None else f"{ours - paper:+.2f}"
    return "" if paper is None else f"{paper:.1f}", "" if ours is None else f"{ours:.2f}", difference
