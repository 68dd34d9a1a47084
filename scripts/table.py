"""The rows of the paper's tables (arXiv 2306.11339): what each one runs, on how many GPUs, and the paper's accuracy.

Hyper-parameters live in the recipes' variants; here stands only what a variant does not say.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import deit.recipe
import mae.recipe
import resnet_rsb.recipe
import swin.recipe
from common.args import parse
from common.recipe import Recipe

STAGE_BEFORE, MAE_WEIGHTS = "stage before", "MAE weights"
ROOT = Path(__file__).resolve().parents[1]
OUTPUT, MINI_OUTPUT = ROOT / "output" / "table", ROOT / "output" / "mini_table"
RATIO = 0.5  # the paper's
KINDS = ("none", "masking")  # the table's columns: plain, AugMask
SHORT = {"none": "plain", "masking": "AugMask", "dropout": "AugDrop", "droppath": "AugPath"}
ENTRIES = {
    "deit": "deit/main.py",
    "mae": "mae/main_finetune.py",
    "swin": "swin/main.py",
    "resnet_rsb": "resnet_rsb/train.py",
}
RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (deit.recipe, mae.recipe, swin.recipe, resnet_rsb.recipe)
}


@cache
def settings_of(recipe: str, variant: str | None) -> argparse.Namespace:
    """A variant's settings, or with None those for the digits, as the entry point has them."""
    return parse(RECIPES[recipe], ["--variant", variant, "--data-path", "unseen"] if variant is not None else [])


@dataclass(frozen=True)
class Stage:
    """One run of an entry point.

    Args:
        name: "train", "pretrain" or "finetune".
        recipe: folder of the recipe.
        variant: of the recipe; None for its settings on the digits.
        nodes: of the published run, of `gpus` GPUs each, a process on each.
        start: what `--finetune` starts from: "", STAGE_BEFORE or MAE_WEIGHTS.
        flags: over the variant's settings.
    """

    name: str
    recipe: str
    variant: str | None
    nodes: int = 1
    gpus: int = 8
    start: str = ""
    flags: tuple[str, ...] = ()

    @property
    def entry(self) -> str:
        return ENTRIES[self.recipe]

    @property
    def settings(self) -> argparse.Namespace:
        """The variant over the recipe over the common defaults."""
        return settings_of(self.recipe, self.variant)

    @property
    def global_batch(self) -> int:
        """Images of an optimizer step."""
        return int(self.nodes * self.gpus * self.settings.batch_size * self.settings.accum_iter)


@dataclass(frozen=True)
class Row:
    """A result of the paper.

    Args:
        recipe: folder of the recipe.
        name: of the row, unique in its recipe; with the recipe it is how a row is asked for, deit/small_400.
        model: as the paper names it.
        epochs: as the paper counts them.
        paper: top-1 in % by kind.
        stages: runs, one after the other; the last one's accuracy is the row's.
    """

    recipe: str
    name: str
    model: str
    epochs: int
    paper: dict[str, float] = field(hash=False)
    stages: tuple[Stage, ...]

    @property
    def id(self) -> str:
        return f"{self.recipe}/{self.name}"


TITLES = {"deit": "DeiT-III", "mae": "MAE finetuning", "swin": "Swin", "resnet_rsb": "ResNet strikes back"}


def _deit(size: str, epochs: int, model: str, plain: float, masked: float) -> Row:
    nodes = 8 if size in ("large", "huge") else 1
    variant = f"{size}_{epochs}"
    paper = {"none": plain, "masking": masked}
    if size == "small":
        return Row("deit", variant, model, epochs, paper, (Stage("train", "deit", variant),))
    stages = (
        Stage("pretrain", "deit", variant, nodes),
        Stage("finetune", "deit", f"{size}_finetune", nodes, start=STAGE_BEFORE),
    )
    return Row("deit", variant, model, epochs, paper, stages)


def _single(recipe: str, variant: str, model: str, plain: float, masked: float, **kwargs: Any) -> Row:
    stage = Stage("train", recipe, variant, **kwargs)
    return Row(recipe, variant, model, stage.settings.epochs, {"none": plain, "masking": masked}, (stage,))


ROWS = (
    _deit("small", 400, "ViT-S/16", 80.4, 81.1),
    _deit("small", 800, "ViT-S/16", 81.4, 81.7),
    _deit("base", 400, "ViT-B/16", 83.5, 84.1),
    _deit("base", 800, "ViT-B/16", 83.8, 84.2),
    _deit("large", 400, "ViT-L/16", 84.5, 85.2),
    _deit("large", 800, "ViT-L/16", 84.9, 85.3),
    _deit("huge", 400, "ViT-H/14", 85.1, 85.7),
    _deit("huge", 800, "ViT-H/14", 85.2, 85.7),
    _single("mae", "base_100", "ViT-B/16", 83.6, 83.9, start=MAE_WEIGHTS),
    _single("mae", "large_50", "ViT-L/16", 85.9, 86.1, start=MAE_WEIGHTS),
    _single("mae", "huge_50", "ViT-H/14", 86.9, 87.2, start=MAE_WEIGHTS, nodes=8),
    _single("swin", "tiny", "Swin-T", 81.3, 81.4),
    _single("swin", "small", "Swin-S", 83.0, 83.4),
    _single("swin", "base", "Swin-B", 83.5, 83.9),
    _single("resnet_rsb", "resnet50", "ResNet-50", 79.7, 80.0),
    _single("resnet_rsb", "resnet101", "ResNet-101", 81.4, 82.1),
    _single("resnet_rsb", "resnet152", "ResNet-152", 81.8, 82.8),
)


# The same machinery on the embedded digits, in minutes: fewer epochs than the recipes' own runs on them.
def _mini(recipe: str, model: str, epochs: int) -> Row:
    flags = ("--epochs", str(epochs), "--warmup-epochs", "1")
    return Row(recipe, "digits", model, epochs, {}, (Stage("train", recipe, None, gpus=1, flags=flags),))


MINI = (
    Row("deit", "digits", "small ViT", 30, {}, (
        Stage("pretrain", "deit", None, gpus=1, flags=("--epochs", "25", "--warmup-epochs", "2")),
        Stage("finetune", "deit", None, gpus=1, start=STAGE_BEFORE, flags=(
            "--epochs", "5", "--warmup-epochs", "0", "--lr", "1e-3", "--opt", "adamw")),
    )),
    _mini("mae", "small ViT", 25),
    _mini("swin", "small Swin", 30),
    _mini("resnet_rsb", "ResNet-10", 5),
)  # fmt: skip


def folder_of(root: Path, row: Row, kind: str, ratio: float = RATIO, more: Sequence[str] = ()) -> Path:
    """The folder of a row with a drop: named by both, and by what differs from the paper's settings.

    Args:
        root: of all rows.
        kind: drop technique; "none" has no ratio.
        ratio: drop probability.
        more: flags beside the row's own.
    """
    name = f"{row.name}-{kind}" + (f"-{ratio:g}" if kind != "none" and ratio != RATIO else "")
    return root / row.recipe / (name + "".join(f"-{word.strip('-').replace('/', '_')}" for word in more))


def select(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows that are asked for, all of them where none is: `deit` is all of a recipe, `deit/small_400` one.

    Raises:
        ValueError: there is no such row; names those that there are.
    """
    unknown = [name for name in names if not any(_asked(row, name) for row in rows)]
    if unknown:
        raise ValueError(
            f"unknown row {unknown[0]!r}: there are {', '.join(row.id for row in rows)}, and a recipe's all by its name"
        )
    return [row for row in rows if not names or any(_asked(row, name) for name in names)]


def _asked(row: Row, name: str) -> bool:
    return name in (row.recipe, row.id)


def fit(stage: Stage, nodes: int, gpus: int) -> tuple[Stage, list[str]]:
    """A stage on another number of GPUs, at the same global batch → it, and the flags that keep it so.

    No process gets more images at a time than the published run's, whose memory they are known to fit; where there
    are fewer processes, gradients are accumulated.

    Raises:
        ValueError: the processes do not divide the global batch so that each micro-batch holds an even number of
            images, as mixup needs.
    """
    batch, processes = stage.global_batch, nodes * gpus
    own = stage.settings.batch_size, stage.settings.accum_iter
    for accumulate in _divisors(batch, processes):
        size = batch // (processes * accumulate)
        if size <= own[0] and size % 2 == 0:
            flags = [] if (size, accumulate) == own else ["--batch-size", str(size), "--accum-iter", str(accumulate)]
            return replace(stage, nodes=nodes, gpus=gpus), flags
    raise ValueError(
        f"{stage.recipe} {stage.variant or 'digits'}: {nodes} x {gpus} processes do not divide the global batch of "
        f"{batch} images into even parts; change --nodes or --gpus-per-node"
    )


def _divisors(batch: int, processes: int) -> Iterator[int]:
    """Numbers of micro-batches, fewest first."""
    return (parts for parts in range(1, batch // processes + 1) if batch % (processes * parts) == 0)
