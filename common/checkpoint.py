"""Checkpoints: the newest, those before it and the best; from us, from upstream and from timm.

Ours hold `model`, `model_ema`, `optimizer`, `scaler`, `epoch`, `best` and `args`, with weights under timm's own names,
so `timm.create_model(name, checkpoint_path=…)` takes them as they are. AugSub's mask token, which timm's models do not
have, stands apart under `mask_tokens`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor, nn

from common.files import load, write
from common.folder import BEFORE, BEST, LAST, keep_as

MASK_TOKENS = "mask_tokens"


def save(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Writes a checkpoint; `path` is never half a file.

    Args:
        path: of the newest.
        state: on the CPU.
        keep: how many of the last ones there are to be, the newest included.

    Raises:
        OSError: the folder is not writable or the disk is full; what was at `path` before is still there.
        FloatingPointError: a weight is not finite.
    """
    for part in ("model", "model_ema"):
        for name, weight in (state.get(part) or {}).items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise FloatingPointError(f"{name} of the {part} holds values that are not finite")
    write(path, without_mask_token(state), lambda: make_way(path, keep))


def make_way(path: Path, keep: int) -> None:
    """Gives the checkpoint at `path` the name of the one before, and that one's the one before it, up to `keep`.

    Killed at any moment it leaves each of them under some name, and doing it again makes it good.
    """
    names = [path, *(path.with_name(BEFORE.format(number)) for number in range(1, keep))]
    if path.exists() and len(names) > 1 and not (names[1].exists() and names[1].samefile(path)):
        for number in range(len(names) - 1, 1, -1):
            if names[number - 1].exists():
                os.replace(names[number - 1], names[number])
        keep_as(path, names[1])
    for beyond in set(path.parent.glob(BEFORE.format("*"))) - set(names):
        beyond.unlink(missing_ok=True)


def generations(folder: Path) -> Iterator[Path]:
    """The checkpoints to go on from that a run's folder has, the newest first and the best last."""
    before = sorted(folder.glob(BEFORE.format("*")), key=lambda path: (len(path.name), path.name))
    yield from (path for path in (folder / LAST, *before, folder / BEST) if path.exists())


def without_mask_token(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint with the mask tokens of its models moved to an entry of their own."""
    tokens, moved = {}, dict(state)
    for part in ("model", "model_ema"):
        if state.get(part) and "mask_token" in state[part]:
            moved[part] = {name: weight for name, weight in state[part].items() if name != "mask_token"}
            tokens[part] = state[part]["mask_token"]
    return moved | {MASK_TOKENS: tokens}


def weights(content: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
    """The state dict in a checkpoint of ours, of upstream, of timm's, or in a bare one."""
    for key in (part, "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = clean_state_dict({k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)})
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
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # of shapes that no architecture has
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
    differences += [f"{name} of {state[name].dtype} where the model has {own[name].dtype}"
                    for name in own if name in state and kind_of(state[name]) != kind_of(own[name])]  # fmt: skip
    differences += [f"{name} is missing" for name in own if name not in state]
    differences += [f"{name} is none of the model's" for name in state if name not in own]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path} is of another architecture: {'; '.join(differences[:3])}{more}")
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        raise ValueError(f"{path} holds weights that are not finite")
    model.load_state_dict(state)


def kind_of(weight: Tensor) -> tuple[bool, bool]:
    """Whether the values are real, and whether complex; what is neither counts something."""
    return weight.is_floating_point(), weight.is_complex()


def _classifier_names(model: nn.Module) -> list[str]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ["head", "head_dist"]
    return [f"{name}." for name in ([names] if isinstance(names, str) else names)]
