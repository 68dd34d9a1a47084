"""The rows of the paper's tables (arXiv 2306.11339), and others: what each runs, on how many GPUs, published accuracy.

Hyper-parameters live in the recipes' variants; here stands only what a variant does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from common.args import parse
from common.train_args import TrainArgs
from scripts.launch.registry import ENTRY_POINTS, RECIPES

PREVIOUS_STAGE, MAE_WEIGHTS = "previous stage", "MAE weights"  # what `--finetune` of a stage names
RATIO = 0.5  # the paper's
KINDS = ("none", "masking")  # columns of the tables: plain, AugMask
SHORT = {"none": "plain", "masking": "AugMask", "dropout": "AugDrop", "droppath": "AugPath"}
TITLES = {"deit": "DeiT-III", "mae": "MAE finetuning", "swin": "Swin", "resnet_rsb": "ResNet strikes back"}


@dataclass(frozen=True)
class Stage:
    """One run of an entry point."""

    name: str  # "train", "pretrain" or "finetune"
    recipe: str
    variant: str | None  # None for the recipe's settings on the digits
    nodes: int = 1  # of the published run
    gpus: int = 8  # of each node, with a process on each
    start: str = ""  # weights that `--finetune` names: "" for none, PREVIOUS_STAGE or MAE_WEIGHTS
    flags: tuple[str, ...] = ()  # override the variant's settings

    @property
    def entry(self) -> str:
        return ENTRY_POINTS[self.recipe]

    @cached_property
    def settings(self) -> TrainArgs:
        """Settings of the variant as the entry point parses them, without `flags`."""
        flags = [] if self.variant is None else ["--variant", self.variant, "--data-path", "unused"]
        return parse(RECIPES[self.recipe], flags)

    @property
    def global_batch(self) -> int:
        """Images in an optimizer step."""
        return int(self.nodes * self.gpus * self.settings.batch_size * self.settings.accum_iter)


@dataclass(frozen=True)
class Row:
    """A row of the paper's tables, or of `EXTRA`."""

    recipe: str
    name: str  # unique within the recipe; command lines take recipe/name, such as deit/small_400
    model: str  # the paper's name for it
    epochs: int  # the paper's count
    paper: dict[str, float] = field(hash=False)  # published top-1 in % by kind of drop
    stages: tuple[Stage, ...]  # runs in sequence; the row's accuracy is that of the last
    table: str = ""  # title, if not the recipe's

    @property
    def title(self) -> str:
        return self.table or TITLES[self.recipe]

    @property
    def id(self) -> str:
        return f"{self.recipe}/{self.name}"


def _deit(size: str, epochs: int, model: str, plain: float, masked: float) -> Row:
    nodes = 8 if size in ("large", "huge") else 1
    variant = f"{size}_{epochs}"
    paper = {"none": plain, "masking": masked}
    if size == "small":
        return Row("deit", variant, model, epochs, paper, (Stage("train", "deit", variant),))
    stages = (
        Stage("pretrain", "deit", variant, nodes),
        Stage("finetune", "deit", f"{size}_finetune", nodes, start=PREVIOUS_STAGE),
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

FT_CLIP = "CLIP finetuning"
# Outside the paper's tables: FT-CLIP (arXiv 2212.06138), whose accuracy is of plain finetuning.
EXTRA = tuple(
    Row("mae", f"clip_{size}", model, epochs, {"none": plain}, (Stage("train", "mae", f"clip_{size}"),), FT_CLIP)
    for size, model, epochs, plain in (("base", "CLIP ViT-B/16", 50, 85.7), ("large", "CLIP ViT-L/14", 30, 88.0))
)


# One row a recipe on the embedded digits, in minutes: fewer epochs than the recipes' default on the digits.
def _mini(recipe: str, model: str, epochs: int) -> Row:
    flags = ("--epochs", str(epochs), "--warmup-epochs", "1")
    return Row(recipe, "digits", model, epochs, {}, (Stage("train", recipe, None, gpus=1, flags=flags),))


_PRETRAIN = ("--epochs", "25", "--warmup-epochs", "2")
_FINETUNE = ("--epochs", "5", "--warmup-epochs", "0", "--lr", "1e-3", "--opt", "adamw")
_DEIT_STAGES = (
    Stage("pretrain", "deit", None, gpus=1, flags=_PRETRAIN),
    Stage("finetune", "deit", None, gpus=1, flags=_FINETUNE, start=PREVIOUS_STAGE),
)
MINI = (
    Row("deit", "digits", "small ViT", 30, {}, _DEIT_STAGES),
    _mini("mae", "small ViT", 25),
    _mini("swin", "small Swin", 30),
    _mini("resnet_rsb", "ResNet-10", 5),
)


def rows_of(mini: bool, extra: bool) -> tuple[Row, ...]:
    """The rows to choose from: the paper's, the small ones on the digits, or those outside the paper's tables.

    Raises:
        ValueError: both of the latter.
    """
    if mini and extra:
        raise ValueError("--extra: has no rows on the digits; leave out --mini")
    return MINI if mini else EXTRA if extra else ROWS


def select(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Rows by recipe/name, or all of a recipe by its name; all rows without names.

    Raises:
        ValueError: no row has such a name.
    """
    unknown = [name for name in names if not any(name in (row.recipe, row.id) for row in rows)]
    if unknown:
        known = ", ".join(row.id for row in rows)
        raise ValueError(f"unknown row {unknown[0]!r}: choose from {known}, or a recipe's name for all of its rows")
    return [row for row in rows if not names or row.recipe in names or row.id in names]
