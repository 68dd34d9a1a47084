"""AugSub in Lightning on two processes: gradients against the equation, and how often they are reduced."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from common.augsub import AugSub
from tests.commands import ROOT, environment
from tests.equation import assert_gradients, classification_gradients
from tests.processes import build

pytest.importorskip("lightning", reason="lightning is not installed: pip install augsub[lightning]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Of each process, by the kind of optimization."""
    folder = tmp_path_factory.mktemp("lightning")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.lightning_steps", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("kind", "reductions"), [("Automatic", 1), ("Manual", 1), ("ManualReducedTwice", 2)])
def test_two_processes_equal_the_equation(kind, reductions, results):
    model = build("swin_tiny_patch4_window7_224")
    batches = [result[kind][0] for result in results]
    assert [len(share) for share in batches] == ([2, 2] if kind == "Automatic" else [1, 1]), "micro-batches"
    expected = classification_gradients(model, AugSub(model, "masking", 0.5), batches)
    assert "mask_token" in expected
    for result in results:
        assert_gradients(result[kind][1], expected)
        assert result[kind][2] == [0] * reductions
