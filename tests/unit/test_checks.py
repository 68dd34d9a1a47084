"""Settings that do not go together, told before training starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm

from common.args import parse
from common.model_checks import check_batch_norm
from common.optim import check_learning_rates
from scripts.launch.paper_tables import MINI, ROWS
from scripts.launch.registry import RECIPES
from tests.runs import ONE_PROCESS

DATA = ["--data-path", "x"]
STAGES = [stage for row in (*ROWS, *MINI) for stage in row.stages]


def notes(recipe: str, global_batch: int, *flags: str) -> list[str]:
    """What is said of the learning rates of a run."""
    args = parse(RECIPES[recipe], flags)
    return check_learning_rates(args, RECIPES[recipe].scale_lr(args, global_batch), global_batch)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.recipe}-{stage.variant}-{stage.name}")
def test_nothing_is_said_of_the_papers_rows_and_of_the_digits(stage):
    flags = ["--variant", stage.variant, *DATA] if stage.variant is not None else stage.flags
    assert notes(stage.recipe, stage.global_batch, *flags) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_said_of_a_recipes_defaults(recipe):
    for flags in ([], DATA):
        args = parse(RECIPES[recipe], flags)
        assert notes(recipe, args.batch_size * args.accum_iter, *flags) == []


def test_a_rate_below_the_lowest_that_a_small_batch_leads_to_is_said():
    below = "--lr: 3.91e-06 in force at 4 images a step, below the 1e-05 of --min-lr; the schedule rises"
    assert notes("deit", 4, *DATA) == [below]
    assert notes("deit", 4, *DATA, "--sched", "step") == [], "which does not fall to --min-lr"
    assert notes("swin", 4, *DATA) == [], "whose three rates are scaled alike"
    assert notes("mae", 1, *DATA, "--blr", "1e-5")[0].startswith("--lr: 3.91e-08 in force at 1 images a step, below ")


def test_a_rate_below_the_lowest_as_given_is_refused():
    sentence = r"--lr: 1e-06 in force at 512 images a step, below the 1e-05 of --min-lr; raise --lr or lower --min-lr"
    for flags in (["--lr", "1e-6"], ["--lr", "1e-6", "--unscale-lr"]):
        with pytest.raises(ValueError, match=sentence):
            notes("deit", 512, *DATA, *flags)
    assert notes("deit", 8192, *DATA, "--lr", "1e-6") == [], "16 times as much for this batch"
    assert notes("deit", 512, *DATA, "--lr", "1e-6", "--min-lr", "0", "--warmup-lr", "0") == []


def test_a_warm_up_that_falls_or_lasts_to_the_end_is_said():
    falls = "--warmup-lr: 0.01 in force, above the 0.0005 of --lr; the warm-up falls"
    assert notes("deit", 512, *DATA, "--warmup-lr", "0.01") == [falls]
    assert notes("deit", 512, *DATA, "--warmup-lr", "0.01", "--warmup-epochs", "0") == []
    lasts = "--warmup-epochs 5: not below --epochs 3, --lr is never reached; use fewer"
    assert notes("deit", 512, *DATA, "--epochs", "3") == notes("deit", 64, "--epochs", "3") == [lasts]


def resnet(size: int):
    """A model whose last feature map is of `size` / 32 pixels, and its flags."""
    flags = [*DATA, "--model", "resnet10t", "--img-size", str(size), "--mixup", "0", "--cutmix", "0"]
    return timm.create_model("resnet10t", num_classes=2), flags


def test_one_image_a_batch_with_one_value_per_channel_is_refused():
    model, flags = resnet(32)
    check = lambda *more: check_batch_norm(model, parse(RECIPES["resnet_rsb"], [*flags, *more]), ONE_PROCESS)  # noqa: E731
    sentence = (
        "--batch-size 1: batch norm layer4.0.bn1 has one value per channel at --input-size 32; use --batch-size 2"
    )
    with pytest.raises(ValueError, match=sentence):
        check("--batch-size", "1")
    with pytest.raises(ValueError, match=sentence):
        check("--batch-size", "1", "--accum-iter", "8")
    check("--batch-size", "2")
    check("--batch-size", "1", "--eval")
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    two = replace(ONE_PROCESS, world_size=2)
    with pytest.raises(ValueError, match=sentence):  # each process has statistics of its own
        check_batch_norm(model, parse(RECIPES["resnet_rsb"], [*flags, "--batch-size", "1"]), two)
    check_batch_norm(model, parse(RECIPES["resnet_rsb"], [*flags, "--batch-size", "1", "--sync-bn"]), two)


def test_one_image_a_batch_will_do_with_more_values_per_channel():
    model, flags = resnet(64)
    check_batch_norm(model, parse(RECIPES["resnet_rsb"], [*flags, "--batch-size", "1"]), ONE_PROCESS)
