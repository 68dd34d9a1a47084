"""Model card of a trained model: how it was made and how accurate it is, for the README.md in timm's hub format."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from common.train_args import TrainArgs

AVERAGE, RAW = "model_ema", "model"  # parts of a checkpoint
CITATION = """@inproceedings{heo2025masksub,
  title     = {Masking meets Supervision: A Strong Learning Alliance},
  author    = {Heo, Byeongho and Kim, Taekyung and Yun, Sangdoo and Han, Dongyoon},
  booktitle = {CVPR},
  year      = {2025},
  note      = {arXiv:2306.11339}
}"""
USAGE = """```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER holds this file
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.no_grad():
    probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None]).softmax(-1)[0]
label = int(probabilities.argmax())
print(model.pretrained_cfg.get("label_names", range(model.num_classes))[label], float(probabilities[label]))
```"""

LogEntry = dict[str, Any]  # a line of log.txt


def best_accuracy(entry: LogEntry) -> float:
    """Top-1 accuracy after an epoch in %, the higher one of the model's and of the average of its weights."""
    return max(entry["test_acc1"], entry.get("test_ema_acc1", -1.0))


def best_part(entry: LogEntry | None) -> str:
    """Which weights are the more accurate after an epoch: the model's, or their average."""
    return AVERAGE if entry is not None and best_accuracy(entry) > entry["test_acc1"] else RAW


def best_epoch(entries: Sequence[LogEntry]) -> int | None:
    """The first epoch of the highest accuracy, counted from 0; None before the first."""
    return max(entries, key=best_accuracy)["epoch"] if entries else None


def describe_run(
    args: TrainArgs, classes: int, preprocessing: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, str]:
    """Return what a card says of the run as a whole.

    Args:
        preprocessing: the fields of `Preprocessing`.
        metadata: content of the run's args.json, or nothing where it is not known.
    """
    values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in preprocessing.items())
    settings = "none, the plain recipe"
    if args.augsub != "none":
        settings = (
            f"--augsub {args.augsub} --augsub-ratio {args.augsub_ratio:g} --augsub-block {args.augsub_block} "
            f"--augsub-bn {args.augsub_bn}"
        )
    return {
        "Architecture": f"{args.model}, trained by the {args.recipe} recipe",
        "AugSub": settings,
        "Data": f"{args.data_set} {args.data_path or ''}".strip() + f", {classes} classes",
        "Images": values,
        "Command": f"`{shlex.join(metadata['command'])}`, {metadata['processes']} x {metadata['device']}"
        if "command" in metadata
        else "not known",
        "Commit": metadata.get("commit") or "not known",
    }


def model_card(run: dict[str, str], part: str, entry: LogEntry | None, position: str, name: str) -> dict[str, Any]:
    """Return a card for timm's `generate_readme`.

    Args:
        run: from `describe_run`.
        part: `RAW` or `AVERAGE`, the weights in the file.
        entry: of the last epoch that was evaluated.
        position: of these weights, such as "epoch 3 of 80".
        name: of the model.
    """
    weights = "the model's" if part == RAW else "the average of the model's (--model-ema)"
    details = {"Weights": f"{weights}, {position}"}
    for key, title in (("test_", "the model"), ("test_ema_", "the average of its weights")):
        if entry is not None and f"{key}acc1" in entry:
            accuracy = f"{entry[f'{key}acc1']:.2f} % top-1, {entry[f'{key}acc5']:.2f} % top-5"
            details[f"Accuracy of {title} after epoch {entry['epoch'] + 1}"] = accuracy
    return {
        "name": name,
        "tags": ["image-classification", "timm"],
        "license": "unknown",  # of weights, which hangs on the data; without this line timm's function names one
        "description": "Trained with AugSub's reference implementation (arXiv 2306.11339; CVPR 2025 as MaskSub).",
        "details": details | run,
        "usage": USAGE,
        "citation": CITATION,
    }
