"""Checkpoints: complete or absent, loaded without running code, from us, from upstream and from timm.

Ours hold `model`, `model_ema`, `optimizer`, `scaler`, `epoch`, `best` and `args`, with weights under timm's own names,
so `timm.create_model(name, checkpoint_path=…)` takes them as they are. AugSub's mask token, which timm's models do not
have, stands apart under `mask_tokens`.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"
MASK_TOKENS = "mask_tokens"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint aside, flushes it to disk and renames it, so that `path` is never half a file.

    Raises:
        OSError: the folder is not writable or the disk is full; what was at `path` before is still there.
        FloatingPointError: a weight is not finite.
    """
    for part in ("model", "model_ema"):
        for name, weight in (state.get(part) or {}).items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise FloatingPointError(f"{name} of the {part} holds values that are not finite")
    with replacing(path) as file:
        written: Any = _Written(file)
        try:
            torch.save(without_mask_token(state), written)
        except RuntimeError as error:  # torch's own word for a write that failed
            raise written.error or error from error


class _Written:
    """A file that remembers what a write failed with."""

    def __init__(self, file: Any):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Gives a file to write and puts it in `path`'s place at the end; if the body raises, `path` stays as it was."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        aside.unlink(missing_ok=True)


def keep_as(path: Path, other: Path) -> None:
    """Makes `other` a second name of the file at `path`, or a copy where the file system has no second names."""
    aside = other.with_name(f".{other.name}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)
        os.replace(aside, other)
    finally:
        aside.unlink(missing_ok=True)


def without_mask_token(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint with the mask tokens of its models moved to an entry of their own."""
    tokens, moved = {}, dict(state)
    for part in ("model", "model_ema"):
        if state.get(part) and "mask_token" in state[part]:
            moved[part] = {name: weight for name, weight in state[part].items() if name != "mask_token"}
            tokens[part] = state[part]["mask_token"]
    return moved | {MASK_TOKENS: tokens}


def load(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU: torch's format with tensors and plain values only, or safetensors.

    Raises:
        ValueError: there is no such file, it is cut short, no checkpoint, or carries code. Nothing of it was run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return {"model": load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage can make an unpickler raise anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # names a function or a class
            raise ValueError(
                f"{path}: refused, since it carries code to run on loading, where a checkpoint needs tensors and "
                "plain values only"
            ) from error
        what = "empty" if path.stat().st_size == 0 else "cut short, or no checkpoint"
        raise ValueError(f"{path}: the file is {what}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: this is no checkpoint, but a {type(content).__name__} of other things")
    return content


def weights(content: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
    """The state dict in a checkpoint of ours, of upstream, of timm's, or in a bare one."""
    for key in (part, "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = clean_state_dict({k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)})
    if any(weight.layout is not torch.strided or weight.is_quantized for weight in state.values()):
        raise ValueError("its weights are sparse or quantized")
    if not state:
        raise ValueError("it holds no weights")
    return state


def load_weights(
    model: nn.Module,
    path: str | Path,
    adapt: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    part: str = "model",
    new_head: bool = False,
    head_std: float | None = None,
    content: dict[str, Any] | None = None,
) -> None:
    """Puts a checkpoint's weights into a model.

    Args:
        model: the bare model, changed in place.
        path: file to load, or to name in errors where `content` is given.
        adapt: turns upstream's names and shapes into the model's.
        part: "model" or "model_ema".
        new_head: leave the classifier as it is where the checkpoint's has another shape.
        head_std: draws the classifier's weights anew with this standard deviation where the file has none that fit.
        content: what `load` returned for it.

    Raises:
        ValueError: the checkpoint is of another architecture; names the tensors that differ.
    """
    content = load(path) if content is None else content
    try:
        state = adapt(weights(content, part), model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = model.state_dict()
    if "mask_token" in own:  # AugSub's, which a plain run's checkpoint does not have
        state.setdefault("mask_token", content.get(MASK_TOKENS, {}).get(part, own["mask_token"]))
    else:
        state.pop("mask_token", None)
    if new_head:
        classifier = tuple(_classifier_names(model))
        for name in [n for n in own if n.startswith(classifier)]:
            if name not in state or state[name].shape != own[name].shape:
                state[name] = own[name].clone()
                if head_std is not None:
                    nn.init.trunc_normal_(state[name], std=head_std) if own[name].ndim > 1 else state[name].zero_()
    differences = [f"{name} {tuple(state[name].shape)} where the model has {tuple(own[name].shape)}"
                   for name in own if name in state and state[name].shape != own[name].shape]  # fmt: skip
    differences += [f"{name} is missing" for name in own if name not in state]
    differences += [f"{name} is none of the model's" for name in state if name not in own]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path} is of another architecture: {'; '.join(differences[:3])}{more}")
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        raise ValueError(f"{path} holds weights that are not finite")
    model.load_state_dict(state)


def _classifier_names(model: nn.Module) -> list[str]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ["head", "head_dist"]
    return [f"{name}." for name in ([names] if isinstance(names, str) else names)]
