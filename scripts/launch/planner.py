"""Rows of a table → tasks: which command each stage runs, in which folder, on how many GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.args import KINDS as DROPS
from common.run_dir import LAST
from scripts.launch.paper_tables import MAE_WEIGHTS, PREVIOUS_STAGE, RATIO, Row, Stage, rows_of, select
from scripts.launch.registry import ROOT

OUTPUT, MINI_OUTPUT = ROOT / "output" / "table", ROOT / "output" / "mini_table"
WEIGHTS = "mae_pretrain_vit_{}.pth"  # names of the published files: base, large, huge


@dataclass(frozen=True)
class Table:
    """Rows to run or to show, and where their runs are."""

    rows: Sequence[Row]
    root: Path  # folder of all runs
    ratio: float  # drop probability of the sub-model
    extra_flags: Sequence[str]  # for every run, after its own flags

    @classmethod
    def select(
        cls,
        names: Sequence[str],
        mini: bool,
        root: str | Path | None,
        ratio: float,
        extra_flags: Sequence[str],
        extra: bool = False,
    ) -> Table:
        """Return the rows of these names, of the tables or with `extra` of those outside. Raises ValueError where a
        name is unknown."""
        root = Path(root or (MINI_OUTPUT if mini else OUTPUT))
        return cls(select(rows_of(mini, extra), names), root.absolute(), ratio, extra_flags)

    def folder(self, row: Row, kind: str) -> Path:
        """Return the folder of a row with a drop; its name tells them, and what differs from the paper's settings."""
        name = f"{row.name}-{kind}"
        if kind != "none" and self.ratio != RATIO:  # the plain recipe has no ratio
            name += f"-{self.ratio:g}"
        return self.root / row.recipe / "-".join([name, *(f.strip("-").replace("/", "_") for f in self.extra_flags)])


@dataclass(frozen=True)
class Task:
    """A stage of a row with a drop: its command and its folder."""

    row: Row
    kind: str
    stage: Stage  # fitted to the GPUs at hand
    flags: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.id}-{self.kind}/{self.stage.name}"


def plan_tasks(
    table: Table,
    kinds: Sequence[str],
    nodes: int | None,
    gpus_per_node: int | None,
    data_path: str | None,
    mae_weights: str | None,
) -> list[Task]:
    """List all stages of the rows with each drop, each after the stage that it needs.

    Args:
        nodes: of each job; None, as for `gpus_per_node`, for as many as the published run had.
        mae_weights: folder of the published pretrained weights.

    Raises:
        ValueError: an unknown drop, or a global batch that the processes do not divide.
    """
    for kind in kinds:
        if kind not in DROPS:
            raise ValueError(f"--augsub {kind}: choose from {', '.join(DROPS)}")
    tasks = []
    for row in table.rows:
        for kind in kinds:
            previous = Path()
            for published in row.stages:
                stage, batch_flags = fit_to_gpus(published, nodes or published.nodes, gpus_per_node or published.gpus)
                folder = table.folder(row, kind) / stage.name
                flags = [*batch_flags, *stage.flags, "--augsub", kind]
                if kind != "none" and table.ratio != RATIO:
                    flags += ["--augsub-ratio", str(table.ratio)]
                if stage.variant is not None:
                    flags = ["--variant", stage.variant, *flags, "--data-path", data_path or "DATA_PATH"]
                if stage.start == PREVIOUS_STAGE:
                    flags += ["--finetune", str(previous / LAST)]
                elif stage.start == MAE_WEIGHTS:
                    flags += ["--finetune", str(mae_weights_file(mae_weights or "MAE_WEIGHTS", stage))]
                flags += ["--output-dir", str(folder), *table.extra_flags]
                tasks.append(Task(row, kind, stage, tuple(flags), folder))
                previous = folder
    return tasks


def mae_weights_file(folder: str, stage: Stage) -> Path:
    """Return the path of the published pretrained weights for a stage's model size."""
    return Path(folder, WEIGHTS.format(str(stage.variant).partition("_")[0]))


def fit_to_gpus(stage: Stage, nodes: int, gpus: int) -> tuple[Stage, list[str]]:
    """Move a stage to another number of GPUs at the same global batch → the stage, and the flags that keep the batch.

    The batch of a process does not exceed the published one, whose memory use is known; with fewer processes,
    gradients are accumulated over more micro-batches.

    Raises:
        ValueError: the processes do not divide the global batch into micro-batches of an even number of images, which
            mixup needs.
    """
    batch, processes = stage.global_batch, nodes * gpus
    published = stage.settings.batch_size, stage.settings.accum_iter
    for accum_iter in range(1, batch // processes + 1):
        size, rest = divmod(batch, processes * accum_iter)
        if not rest and size <= published[0] and size % 2 == 0:
            flags = ["--batch-size", str(size), "--accum-iter", str(accum_iter)]
            return replace(stage, nodes=nodes, gpus=gpus), [] if (size, accum_iter) == published else flags
    raise ValueError(
        f"{stage.recipe} {stage.variant or 'digits'}: {nodes} x {gpus} processes do not divide the global batch of "
        f"{batch} images into even parts; change --nodes or --gpus-per-node"
    )
