"""Models in timm's hub format, for `timm.create_model("local-dir:FOLDER", pretrained=True)` in other people's code.

    config.json        the model's name in timm and its arguments, class names, preprocessing
    model.safetensors  the weights
    README.md          model card

Each file is replaced atomically, in this order, so that a kill in between leaves a folder that timm loads. timm's own
`save_for_hf` writes the weights in place, and takes them from a model rather than from a copy of its state dict.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import is_model, model_entrypoint
from timm.models._hub import generate_readme, save_config_for_hf
from torch import Tensor, nn

from common.checkpoint.weights import diff_state_dicts
from common.models import CONFIG
from common.run_dir import BEST_MODEL, LAST_MODEL, atomic_path, atomic_write, flush_to_disk

WEIGHTS, CARD = "model.safetensors", "README.md"
# what timm's pretrained_cfg says of the weights that timm offers, not of ours
ABOUT_TIMMS_WEIGHTS = set(
    "tag license description origin_url paper_name paper_ids notes label_names label_descriptions".split()
)


@dataclass(frozen=True)
class Export:
    """A folder to write when a checkpoint is saved.

    Args:
        folder: in timm's hub format.
        part: of the checkpoint: "model" or "model_ema".
        card: for timm's `generate_readme`, with the model's "name" besides.
    """

    folder: Path
    part: str
    card: dict[str, Any]


def hub_config(
    model: nn.Module,
    architecture: tuple[str, dict[str, Any]] | None,
    class_names: Sequence[str] | None,
    preprocessing: dict[str, Any],
) -> bytes:
    """Return the content of config.json, as timm writes it.

    Args:
        model: with the names and shapes of the weights; a mask token of AugSub's does not count.
        architecture: name in timm of a model of this shape, and its arguments; None where timm built `model`.
        class_names: in the order of the labels; may be fewer than the model's classes.
        preprocessing: the fields of `Preprocessing`.

    Raises:
        ValueError: timm itself has no such model, as where other code has registered it.
    """
    described = copy.copy(model) if architecture is None else build_stock_model(model, *architecture)
    pretrained_cfg = getattr(described, "pretrained_cfg", None)
    if not pretrained_cfg or not is_stock(pretrained_cfg.get("architecture", "")):
        raise ValueError("the model is not one of timm's own")
    described.pretrained_cfg = {  # type: ignore[assignment]
        name: value for name, value in pretrained_cfg.items() if name not in ABOUT_TIMMS_WEIGHTS
    }
    labels = list(class_names or [])
    # timm takes a list of all classes, or a dict of those that have a name
    complete = len(labels) == model.num_classes
    names = labels if complete else {str(label): name for label, name in enumerate(labels)}
    size = preprocessing["input_size"]
    data_config = {
        "input_size": (3, size, size),
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
        "interpolation": preprocessing["interpolation"],
        "crop_pct": preprocessing["crop_ratio"],
        "crop_mode": preprocessing["crop_mode"],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, CONFIG)
        save_config_for_hf(described, str(path), model_config={"label_names": names}, data_config=data_config)
        return path.read_bytes()


def build_stock_model(model: nn.Module, name: str, model_args: dict[str, Any]) -> nn.Module:
    """Build timm's model of the shape of `model`, without memory for its weights."""
    with torch.device("meta"):
        stock = timm.create_model(name, num_classes=model.num_classes, **model_args)
    weights = {key: weight for key, weight in model.state_dict().items() if key != "mask_token"}
    differences = diff_state_dicts(weights, stock.state_dict())
    assert not differences, f"{name}: {differences[:3]}"
    return stock


def is_stock(name: str) -> bool:
    """Whether a model is registered by timm itself."""
    return is_model(name) and model_entrypoint(name).__module__.startswith("timm.")


def begin_folder(folder: Path, config: bytes) -> None:
    """Create a folder with its config.json, unless it holds weights already, which have their own."""
    folder.mkdir(exist_ok=True)
    if not (folder / WEIGHTS).exists():
        with atomic_write(folder / CONFIG) as file:
            file.write(config)


def write_folder(folder: Path, config: bytes, weights: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Replace what a folder holds, the model card last.

    Args:
        config: from `hub_config`.
        weights: on the CPU, no two of them in the same memory.
        card: as `Export.card`.

    Raises:
        OSError, safetensors.SafetensorError: the folder is not writable or the disk is full.
    """
    folder.mkdir(exist_ok=True)
    path = folder / CONFIG
    (folder / CARD).unlink(missing_ok=True)  # it describes the weights before
    if not path.exists() or path.read_bytes() != config:
        (folder / WEIGHTS).unlink(missing_ok=True)  # never under the description of others
        with atomic_write(path) as file:
            file.write(config)
    with atomic_path(folder / WEIGHTS) as tmp:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp, metadata={"format": "pt"})
        shutil.copymode(path, tmp)  # safetensors' file is readable by its owner alone
        flush_to_disk(tmp)
    with atomic_write(folder / CARD) as file:
        file.write(generate_readme(card, card["name"]).encode("utf-8", "surrogateescape"))


def is_current(folder: Path, checkpoint: Path) -> bool:
    """Whether a folder was completed after a checkpoint was written."""
    try:
        return (folder / CARD).stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns
    except OSError:
        return False


def archive_folders(output_dir: Path) -> None:
    """Rename the folders of a run that is not continued to earlier_*, in place of those of the run before it."""
    for name in (BEST_MODEL, LAST_MODEL):
        if (output_dir / name / WEIGHTS).exists():
            earlier = output_dir / f"earlier_{name}"
            shutil.rmtree(earlier, ignore_errors=True)
            (output_dir / name).rename(earlier)
