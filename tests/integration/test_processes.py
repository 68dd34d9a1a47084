"""Two processes equal one, with one all-reduce a step."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

import common.masking
from common.augsub import AugSub
from tests.processes import CASES, build, ddp_steps, gradients, joined_batch, same_mask_for_all


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(ddp_steps, args=(2, folder), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "parts", "one_backward"), CASES)
def test_two_processes_gradients_equal_ones_on_the_joined_batch(
    name, kind, parts, one_backward, two_processes, monkeypatch
):
    monkeypatch.setattr(common.masking, "block_mask", common.masking.block_mask)  # put back after the test
    model = build(name)
    augsub = AugSub(model, kind, 0.5)
    same_mask_for_all(model)
    expected = gradients(model, model, augsub, *joined_batch(name), parts)
    got, _ = two_processes[name, kind, parts, one_backward]
    assert got.keys() == expected.keys()
    assert kind == "none" or "mask_token" in got or not name.startswith("swin")
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize(("name", "kind", "parts", "one_backward"), CASES)
def test_a_step_costs_one_all_reduce(name, kind, parts, one_backward, two_processes):
    """DDP reduces in as many pieces as it has buckets, each of them once a step, whatever the number of passes."""
    _, rounds = two_processes[name, kind, parts, one_backward]
    assert sorted(rounds) == list(range(len(rounds)))
    assert 1 <= len(rounds) <= 2
