"""Compares two output folders to the bit: checkpoints but for their settings, models, log.txt, TensorBoard scalars."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoint.hub_format import CONFIG, WEIGHTS
from common.checkpoint.io import load
from common.run_dir import BEST, BEST_MODEL, CURVES, LAST, LAST_MODEL, LOG, read_log

TIMED_SCALARS = {"speed/images_per_second"}


def find_checkpoint(folder: Path) -> Path | None:
    """A run's newest checkpoint; the Swin recipe writes it into a subfolder."""
    return next(folder.rglob(LAST), None)


def diff_runs(first: Path, second: Path) -> list[str]:
    """Names of the entries, files and scalars in which two runs differ."""
    checkpoints = [find_checkpoint(folder) for folder in (first, second)]
    first, second = (path.parent for path in checkpoints if path is not None)
    diff = []
    for name in (LAST, BEST):
        contents = load(first / name), load(second / name)
        for content in contents:
            content.pop("args")
        diff += [f"{name}{key}" for key in diff_nested(*contents)]
    for name in (f"{model}/{file}" for model in (BEST_MODEL, LAST_MODEL) for file in (CONFIG, WEIGHTS)):
        if (first / name).exists() != (second / name).exists() or (
            (first / name).exists() and (first / name).read_bytes() != (second / name).read_bytes()
        ):
            diff.append(name)
    if (first / LOG).read_bytes() != (second / LOG).read_bytes() or not read_log(first):
        diff.append(LOG)
    return diff + [f"curve {tag}" for tag in diff_scalars(first, second)]


def diff_scalars(first: Path, second: Path) -> list[str]:
    """Tags of TensorBoard's scalars that have other points in one run than in the other."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each restart
    runs = [EventAccumulator(str(folder / CURVES), size_guidance={"scalars": 0}).Reload() for folder in (first, second)]
    points = [{tag: [(p.step, p.value) for p in run.Scalars(tag)] for tag in run.Tags()["scalars"]} for run in runs]
    tags = (points[0].keys() | points[1].keys()) - TIMED_SCALARS
    return sorted(tag for tag in tags if points[0].get(tag) != points[1].get(tag))


def diff_nested(first: Any, second: Any, path: str = "") -> list[str]:
    """Paths of the entries that differ between two checkpoints' contents."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [entry for key in first for entry in diff_nested(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [entry for i, pair in enumerate(zip(first, second)) for entry in diff_nested(*pair, f"{path}/{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    return [] if first == second else [path]
