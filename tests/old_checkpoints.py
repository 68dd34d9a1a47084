"""Writes the checkpoints in tests/reference/checkpoints/, which every later version has to resume.

    python tests/old_checkpoints.py FOLDER

trains a small model of each recipe with the code in a folder until a checkpoint is saved in the middle of epoch 2, and
kills it; then lets the run go on to its end, whose losses and norms are stored beside. The files were written by commit
6eaf722, and are to be written anew only where a version may refuse those of the versions before it. Swin's
expected.json is of a later version, which goes on with the same checkpoint at the published rates, an update later than
6eaf722.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
REFERENCE = ROOT / "tests" / "reference" / "checkpoints"
RUN = "run"  # the output folder, beside which the command is started
ENTRIES = {
    "deit": "deit/main.py",
    "mae": "mae/main_finetune.py",
    "swin": "swin/main.py",
    "resnet_rsb": "resnet_rsb/train.py",
}
# 10 or 11 steps an epoch, 6 for MAE
FLAGS = (
    "--epochs 2 --warmup-epochs 0 --batch-size 128 --log-interval 3 --save-every 4 --keep-last 1 --num-workers 0 "
    "--amp off --augsub masking --drop-path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --model-ema "
    f"--model-ema-decay 0.9 --output-dir {RUN}"
)
RECIPE_FLAGS = {
    "deit": "--model small_vit --drop 0.1 --ThreeAugment --color-jitter 0.3 --repeated-aug",
    "mae": "--model small_vit --drop 0.1 --aa rand-m9-mstd0.5-inc1 --layer-decay 0.75 --accum-iter 2",
    "swin": "--aa rand-m9-mstd0.5-inc1 --clip-grad 5 --opts MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,1]",
    "resnet_rsb": "--model small_resnet --aa rand-m7-mstd0.5 --aug-repeats 3 --train-interpolation random",
}


def command(tree: Path, recipe: str) -> list[str]:
    """What starts and resumes the run, in the folder that holds its output folder."""
    small_models = str(ROOT / "tests" / "small_models.py")
    return [sys.executable, small_models, str(tree / ENTRIES[recipe]), *FLAGS.split(), *RECIPE_FLAGS[recipe].split()]


def find(folder: Path) -> Path | None:
    """The checkpoint; Swin's is in <output>/<model name>/<tag>."""
    return next((folder / RUN).rglob("checkpoint.pth"), None)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.txt."""
    path = next((folder / RUN).rglob("log.txt"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def norms_of(folder: Path, begin: dict[str, Any]) -> dict[str, float]:
    """Of a finished run, since its checkpoint `begin`: how far the weights and their average have moved, and how large
    the optimizer's averages of the gradients are."""
    path = find(folder)
    assert path is not None
    end = torch.load(path, weights_only=True)
    moved = {
        part: [end[part][name] - weight for name, weight in begin[part].items() if weight.is_floating_point()]
        for part in ("model", "model_ema")
    }
    moved["exp_avg"] = [state["exp_avg"] for state in end["optimizer"]["state"].values()]
    return {part: torch.cat([tensor.flatten() for tensor in tensors]).norm().item() for part, tensors in moved.items()}


def write(tree: Path, recipe: str, folder: Path) -> None:
    """Make a recipe's checkpoint, and the losses of its continuation by the same code."""
    words = command(tree, recipe)
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL)
    while True:
        assert process.poll() is None, "it ended before it could be killed"
        path = find(folder)
        content = torch.load(path, weights_only=True) if path is not None else {"epoch": -1}
        if content["epoch"] == 0 and content["position"] is not None:
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    path = find(folder)
    assert path is not None
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == 0 and content["position"] is not None, "it was killed too late"
    target = REFERENCE / recipe
    shutil.rmtree(target, ignore_errors=True)
    for name in ("checkpoint.pth", "log.txt"):
        kept = target / path.with_name(name).relative_to(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.with_name(name), kept)
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    expected = {"step": content["position"]["update"], "log": log_of(folder), "norms": norms_of(folder, content)}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    """Write all of them."""
    tree = Path(sys.argv[1]).resolve()
    for recipe in ENTRIES:
        with tempfile.TemporaryDirectory() as folder:
            write(tree, recipe, Path(folder))


if __name__ == "__main__":
    main()
