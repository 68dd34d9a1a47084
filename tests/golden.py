"""Golden losses: the first five steps of a recipe on the digits, which a refactoring must not change.

`python -m tests.golden` writes them anew; a change of them needs a reason in the commit's message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common import rng
from common.args import parse
from common.distributed import Process
from common.engine import LossMeter, train_epoch
from common.recipe import Recipe
from common.run import build_run

GOLDEN = Path(__file__).with_name("reference") / "golden.json"


FLAGS = {
    "deit": ["--drop-path", "0.1", "--ThreeAugment", "--color-jitter", "0.3", "--mixup", "0.8"],
    "mae": ["--drop-path", "0.1", "--layer-decay", "0.75", "--accum-iter", "2", "--mixup", "0.8"],
    # within a steep warm-up, so that a schedule which is an update ahead gives other losses
    "swin": ["--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1.0", "--warmup-epochs", "1", "--lr", "5"],
    # in the memory format that they were written in, since batch norm and LAMB let another order of sums grow
    "resnet_rsb": [
        "--drop-path",
        "0.05",
        "--mixup",
        "0.1",
        "--aug-repeats",
        "3",
        "--aa",
        "rand-m7-mstd0.5",
        "--no-channels-last",
    ],
}


def five_steps(recipe: Recipe, kind: str) -> list[list[float]]:
    """Losses of the main model, and of the sub-model where there is one, of five steps on one thread in float32."""
    args = parse(recipe, ["--augsub", kind, "--batch-size", "16", "--amp", "off", "--num-workers", "0",
                          "--warmup-epochs", "0", *FLAGS[recipe.name]])  # fmt: skip
    args.output_dir = ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = build_run(recipe, args, Process(torch.device("cpu")))
        rng.seed_everything(args.seed, 0, 0)
        assert run.train_loader is not None
        meter = LossMeter(run.trainer, 0, 5)
        steps = train_epoch(run.trainer, run.train_loader, 5 * args.accum_iter, meter, run.bad_train_samples, 1)
        reports = [step.report for step in steps if step.report is not None]
    finally:
        torch.set_num_threads(threads)
    return [[loss for loss in (report.loss, report.sub_loss) if loss is not None] for report in reports]


def check_golden(recipe: Recipe, kind: str) -> None:
    """Compares with the file. Processors round differently, and five steps let that grow a little."""
    golden: Any = json.loads(GOLDEN.read_text())
    if not torch.__version__.startswith(golden["torch"]):
        pytest.skip(f"golden losses are of torch {golden['torch']}: other releases draw other initial weights")
    expected = golden[recipe.name][kind]
    losses = five_steps(recipe, kind)
    assert len(losses) == 5
    for step, (got, wanted) in enumerate(zip(losses, expected)):
        assert got == pytest.approx(wanted, rel=5e-4), f"step {step}"
    assert losses[0] != losses[4]


def main() -> None:
    """Write the file."""
    from deit.recipe import RECIPE as DEIT
    from mae.recipe import RECIPE as MAE
    from resnet_rsb.recipe import RECIPE as RESNET_RSB
    from swin.recipe import RECIPE as SWIN

    all_drops = ("none", "masking", "dropout", "droppath")
    offered = {DEIT.name: all_drops, MAE.name: all_drops, SWIN.name: all_drops,
               RESNET_RSB.name: ("none", "masking", "droppath")}  # fmt: skip
    golden = {
        recipe.name: {kind: five_steps(recipe, kind) for kind in offered[recipe.name]}
        for recipe in (DEIT, MAE, SWIN, RESNET_RSB)
    }
    head = {"comment": json.loads(GOLDEN.read_text())["comment"], "torch": ".".join(torch.__version__.split(".")[:2])}
    GOLDEN.write_text(json.dumps(head | golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
