"""`python -m augsub.integrations.timm_train`: a loop in the order of timm's train.py, and timm's own where it is given."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.commands import ROOT
from tests.installed import run_installed

LOOP = str(ROOT / "tests" / "timm_loop.py")
pytestmark = pytest.mark.slow


def train(folder: Path, *words: str, script: str = LOOP, processes: int = 0) -> subprocess.CompletedProcess[str]:
    output = folder / "output"
    output.mkdir(exist_ok=True)
    module = ["-m", "augsub.integrations.timm_train", script, "--output", str(output), *words]
    return run_installed(*module, folder=folder, processes=processes)


def printed(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_flags_of_both_are_told_apart(tmp_path):
    result = printed(train(tmp_path, "--augsub", "droppath", "--opt", "sgd", "--augsub-ratio=0.3"))
    assert {"main_loss", "sub_loss"} <= set(result["results"]) and result["isinstance"]


def test_none_is_the_plain_script(tmp_path):
    plain = run_installed(LOOP, "--output", str(tmp_path), folder=tmp_path)
    assert printed(train(tmp_path, "--augsub", "none"))["losses"] == printed(plain)["losses"]


def test_two_processes_and_resuming(tmp_path):
    words = ("--augsub", "masking", "--model", "swin_tiny_patch4_window7_224")
    done = train(tmp_path, *words, processes=2)
    result = printed(done)
    assert done.stdout.count("ClassificationTask: AugSub(masking, ratio=0.5, mask token") == 1, "rank 0 says it"
    assert result["processes"] == 2 and result["task_state"] == ["mask_token"]
    assert "mask_token" not in result["weights"]
    assert printed(train(tmp_path, *words, "--resume", str(tmp_path / "output" / "last.pth.tar")))


def test_an_optimizer_made_too_early_is_told(tmp_path):
    words = ("--augsub", "masking", "--model", "swin_tiny_patch4_window7_224", "--optimizer-first")
    done = train(tmp_path, *words)
    assert done.returncode == 1 and "optimizer: does not hold the mask token" in done.stderr


@pytest.mark.parametrize(("words", "script", "message"), [
    ((), "missing.py", "missing.py: no such file; pass the path of timm's train.py"),
    ((), "plain.py", "plain.py: does not use timm.task, where AugSub is put in"),
    (("--augsub-ratio", "1.5"), LOOP, "--augsub masking: drop ratio 1.5 is outside"),
])  # fmt: skip
def test_mistakes_end_with_one_sentence(words, script, message, tmp_path):
    (tmp_path / "plain.py").write_text("import timm\n")
    done = train(tmp_path, *words, script=script)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN does not name timm's train.py")
@pytest.mark.parametrize(("model", "sizes"), [
    ("vit_tiny_patch16_224", ["patch_size=8", "embed_dim=24", "depth=2", "num_heads=2"]),
    ("swin_tiny_patch4_window7_224", ["embed_dim=8", "depths=(1,1)", "num_heads=(1,2)", "window_size=8"]),
])  # fmt: skip
@pytest.mark.parametrize("processes", [0, 2])
def test_the_script_of_timm(model, sizes, processes, tmp_path):
    for split in ("train", "validation"):
        for label in range(2):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (64, 64), (30 * i, 200 * label, 0)).save(folder / f"{i}.png")
    words = ["--data-dir", str(tmp_path / "data"), "--model", model, "--num-classes", "2", "--img-size", "64"]
    words += ["--model-kwargs", *sizes, "--epochs", "1", "--warmup-epochs", "0", "-b", "4", "-j", "1", "--opt", "adamw"]
    words += ["--lr", "1e-3", "--device", "cpu", "--no-prefetcher", "--model-ema", "--experiment", "run"]
    done = train(tmp_path, "--augsub", "masking", *words, script=os.environ["TIMM_TRAIN"], processes=processes)
    assert done.returncode == 0, done.stderr
    assert "ClassificationTask: AugSub(masking, ratio=0.5" in done.stdout
    saved = torch.load(tmp_path / "output" / "run" / "last.pth.tar", weights_only=False)
    assert "mask_token" not in saved["state_dict"]
    assert ("mask_token" in saved.get("task_state", {})) == model.startswith("swin")
