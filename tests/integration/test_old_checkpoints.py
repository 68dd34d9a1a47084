"""Runs that commit 6eaf722 has begun, one of each recipe, are resumed in the middle of an epoch and end as there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import torch

from tests.old_checkpoints import ENTRIES, REFERENCE, ROOT, RUN, command, find, log_of, norms_of

# processors round differently
LOSSES = ("train_loss", "train_sub_loss", "test_loss", "test_ema_loss")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ENTRIES)
def test_an_old_checkpoint_is_resumed(recipe, tmp_path):
    shutil.copytree(REFERENCE / recipe / RUN, tmp_path / RUN)
    expected = json.loads((REFERENCE / recipe / "expected.json").read_text())
    done = subprocess.run(command(ROOT, recipe), cwd=tmp_path, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = [line for line in done.stdout.splitlines() if re.search(r"\b(resum|continu)", line, re.IGNORECASE)]
    assert len(resumed) == 1 and re.search(rf"\bepoch 2\b.*\bstep {expected['step']}\b", resumed[0]), done.stdout

    first, second = log_of(tmp_path)
    first_expected, second_expected = expected["log"]
    assert first == first_expected
    assert second.keys() == second_expected.keys() and second["epoch"] == 1
    assert second["train_lr"] == pytest.approx(second_expected["train_lr"])
    for name in LOSSES:
        assert second[name] == pytest.approx(second_expected[name], rel=5e-3), name

    begin, end = find(REFERENCE / recipe), find(tmp_path)
    assert begin is not None and end is not None
    norms = norms_of(tmp_path, torch.load(begin, weights_only=True))
    assert norms == pytest.approx(expected["norms"], rel=1e-2)
    content = torch.load(end, weights_only=True)
    assert content["epoch"] == 1 and content["position"] is None
    for part in ("model", "model_ema"):
        assert all(weight.isfinite().all() for weight in content[part].values()), part
