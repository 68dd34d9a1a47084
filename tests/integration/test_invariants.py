"""A training step of each recipe family, through its trainer: one all-reduce, and no wait for the device between
reports. The stand-in for the published trainers has as many of both as they have, so the counters can see them."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from scripts.launch.registry import RECIPES
from tests.counters import count_all_reduces, count_host_waits, modes_of

NAMES = ("plain", "AugMask")
STEPS = 3
ACCUMULATED = ["--model", "test_vit", "--input-size", "160", "--augsub", "none,dropout,masking", "--batch-size", "2",
               "--accum-iter", "2", "--opt", "adamw"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_host_does_not_wait_between_reports(recipe, name):
    assert count_host_waits(recipe, modes_of(recipe)[name], STEPS) == 0


@pytest.mark.parametrize("name", ["plain", "AugDrop", "AugMask"])
def test_the_host_does_not_wait_in_accumulated_steps_of_any_timm_model(name):
    assert count_host_waits("deit", modes_of("deit", *ACCUMULATED)[name], STEPS) == 0


@pytest.mark.parametrize(("name", "reads"), [("reference plain", 1), ("reference AugMask", 2)])
def test_the_reference_reads_every_loss(name, reads):
    assert count_host_waits("swin", modes_of("swin", "--reference")[name], STEPS) == reads * STEPS


@pytest.fixture(scope="module")
def reductions(tmp_path_factory):
    """What each mode of each recipe all-reduces in a step of two processes, by recipe and name."""
    folder = tmp_path_factory.mktemp("reductions")
    flags = {"swin": ["--reference"]}
    cases = {
        (recipe, name): (recipe, mode)
        for recipe in RECIPES
        for name, mode in modes_of(recipe, "--batch-size", "2", *flags.get(recipe, [])).items()
    }
    cases["accumulated", "AugMask"] = "deit", modes_of("deit", *ACCUMULATED)["AugMask"]
    mp.spawn(count_all_reduces, args=(2, folder, list(cases.values())), nprocs=2)
    return dict(zip(cases, torch.load(folder / "reductions.pt")))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_sends_each_gradient_once(recipe, name, reductions):
    sent = reductions[recipe, name]
    assert sent["all_reduces"] == 1 and sent["bytes"] == sent["parameters"] > 0


def test_an_accumulated_step_sends_each_gradient_once(reductions):
    sent = reductions["accumulated", "AugMask"]
    assert sent["all_reduces"] == 1 and sent["bytes"] == sent["parameters"] > 0


def test_the_reference_sends_each_gradient_once_a_pass(reductions):
    plain, masked = reductions["swin", "plain"], reductions["swin", "AugMask"]
    assert masked["parameters"] == plain["parameters"] + 4 * 48, "a mask token"
    sent = reductions["swin", "reference AugMask"]
    assert sent["all_reduces"] == 2 and sent["bytes"] == 2 * masked["parameters"]
    assert reductions["swin", "reference plain"] == plain
