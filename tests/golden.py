"""Golden losses: the first five steps of a recipe on the digits, which a refactoring must not change.

`python -m tests.golden` writes them anew; a change of them needs a reason in the commit's message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common import dist
from common.args import parse
from common.dist import Process
from common.engine import Report, train_one_epoch
from common.recipe import Recipe
from common.train import prepare

GOLDEN = Path(__file__).with_name("reference") / "golden.json"


def five_steps(recipe: Recipe, kind: str, flags: list[str]) -> list[list[float]]:
    """Losses of the main model, and of the sub-model where there is one, of five steps on one thread in float32."""
    args = parse(recipe, ["--augsub", kind, "--batch-size", "16", "--amp", "off", "--num-workers", "0",
                          "--warmup-epochs", "0", "--eval-crop-ratio", "1.0", *flags])  # fmt: skip
    args.output_dir, losses = "", []

    def note(report: Report) -> None:
        losses.append([value for value in (report.loss, report.sub_loss) if value is not None])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        job = prepare(recipe, args, Process(torch.device("cpu")))
        dist.seed_everything(args.seed, 0, 0)
        train_one_epoch(job.trainer, job.train_loader, 5 * args.accum_iter, 0, 1, note, job.unreadable)
    finally:
        torch.set_num_threads(threads)
    return losses


def check_golden(recipe: Recipe, kind: str, flags: list[str]) -> None:
    """Compares with the file. Processors round differently, and five steps let that grow a little."""
    expected: Any = json.loads(GOLDEN.read_text())[recipe.name][kind]
    losses = five_steps(recipe, kind, flags)
    assert len(losses) == 5
    for step, (got, wanted) in enumerate(zip(losses, expected)):
        assert got == pytest.approx(wanted, rel=2e-4), f"step {step}"
    assert losses[0] != losses[4]


def main() -> None:
    """Writes the file."""
    from tests import test_deit

    flags = ["--drop-path", "0.1", "--ThreeAugment", "--color-jitter", "0.3", "--mixup", "0.8"]
    golden = {"deit": {k: five_steps(test_deit.RECIPE, k, flags) for k in ("none", "masking", "dropout", "droppath")}}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
