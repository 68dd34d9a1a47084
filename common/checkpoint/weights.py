"""Weights of a checkpoint of any origin: this trainer's, upstream's, timm's, or a bare state dict."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor, nn

from common.checkpoint.io import load
from common.checkpoint.report import LoadReport, report_load
from common.checkpoint.sources import WeightsSource, find_weights

MASK_TOKENS = "mask_tokens"
RAW, AVERAGES = ("model", "state_dict"), ("model_ema", "state_dict_ema", "teacher")  # keys of state dicts
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")
ENCODERS = ("encoder.", "backbone.")
HEADS = ("decoder", "head", "mask_token")  # what stands beside an encoder in a pretraining
AdaptWeights = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


@dataclass(frozen=True)
class InitialWeights:
    """The file that `--finetune` names, read."""

    source: WeightsSource
    content: dict[str, Any]


def read_initial_weights(name: str, model: str) -> InitialWeights:
    """Find and read the file that `--finetune` names; arguments and errors as those of `find_weights` and `load`."""
    source = find_weights(name, model)
    return InitialWeights(source, load(source.path))


def move_mask_tokens(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's content with AugSub's mask tokens under a key of their own: timm takes no other keys."""
    tokens, moved = {}, dict(state)
    for part in ("model", "model_ema"):
        if state.get(part) and "mask_token" in state[part]:
            moved[part] = {name: weight for name, weight in state[part].items() if name != "mask_token"}
            tokens[part] = state[part]["mask_token"]
    return moved | {MASK_TOKENS: tokens}


def find_state_dict(content: dict[str, Any], part: str = "model") -> tuple[dict[str, Tensor], str]:
    """Return the state dict in a checkpoint, without the prefixes of DDP and torch.compile, and its key there.

    Args:
        part: "model", or "model_ema" for an average of the weights. A file with nothing but an average gives it as its
            "model".

    Raises:
        ValueError: there is none.
    """
    # This trainer and upstream's (DeiT, MAE, Swin) write "model" and "model_ema", timm's CheckpointSaver and most
    # others "state_dict" and "state_dict_ema", DINO "teacher". A file with none of them is a state dict itself.
    keys = AVERAGES if part == "model_ema" else (*RAW, *AVERAGES)
    key = next((key for key in keys if isinstance(content.get(key), dict)), "")
    if key:
        content = content[key]
    state = clean_state_dict({k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)})
    if not state:
        raise ValueError("holds no weights")
    return state, key


def has_average(content: dict[str, Any]) -> bool:
    """Whether a checkpoint holds an average of the weights."""
    return any(isinstance(content.get(key), dict) for key in AVERAGES)


def strip_prefix(state: dict[str, Tensor], expected: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Remove the prefix that all names have, and the heads of a pretraining that stand beside an encoder.

    Args:
        expected: names in the model, of which none may have the prefix.

    Returns:
        The state dict, and what was removed from its names.
    """
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        others = [name for name in state if not name.startswith(prefix)]
        beside = prefix in ENCODERS and all(name.startswith(HEADS) for name in others)
        if inside and (not others or beside) and not any(name.startswith(prefix) for name in expected):
            if others:
                inside.pop("mask_token", None)  # of the pretraining, not AugSub's
            state, removed = strip_prefix(inside, expected)
            return state, prefix + removed
    return state, ""


def load_weights(
    model: nn.Module,
    path: str | Path,
    adapt: AdaptWeights,
    part: str = "model",
    new_head: bool = False,
    keep_head: bool = True,
    head_std: float | None = None,
    content: dict[str, Any] | None = None,
) -> LoadReport:
    """Load a checkpoint's weights into a model, and report what was taken.

    Args:
        model: neither compiled nor in DDP; unchanged if the weights do not fit.
        path: of the file; only named in errors if `content` is given.
        adapt: (state dict in upstream's names and shapes, model) → in the model's.
        part: "model" or "model_ema".
        new_head: keep the model's classifier where the checkpoint has none of its shape.
        keep_head: with `new_head`, take a classifier of the same shape from the checkpoint.
        head_std: with `new_head`, draw such a classifier anew with this standard deviation.
        content: what `load` returned for `path`.

    Raises:
        ValueError: the weights are of another architecture, or not finite.
    """
    content = load(path) if content is None else content
    expected = model.state_dict()
    try:
        weights, key = find_state_dict(content, part)
        stripped, prefix = strip_prefix(weights, expected)
        state = dict(adapt(stripped, model))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # shapes of no architecture
        raise ValueError(f"{path}: {error}") from error
    if "mask_token" in expected:  # a run without AugSub stored none: the model keeps its own
        tokens = content.get(MASK_TOKENS)
        token = tokens.get(part) if isinstance(tokens, dict) else None
        state.setdefault("mask_token", token if isinstance(token, Tensor) else expected["mask_token"])
    else:
        state.pop("mask_token", None)
    head = fit_head(state, model, head_std, keep_head) if new_head else []
    differences = diff_state_dicts(state, expected)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path}: another architecture: {'; '.join(differences[:3])}{more}")
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        raise ValueError(f"{path}: weights are not finite")
    first = next(iter(weights))
    originals = (name for name in (content[key] if key else content) if isinstance(name, str))
    wrapper = next(name for name in originals if name.endswith(first)).removesuffix(first)  # DDP's or torch.compile's
    report = report_load(str(path), key, prefix, weights, state, model, head)
    report = replace(report, prefix=wrapper + prefix)
    model.load_state_dict(state)
    return report


def fit_head(state: dict[str, Tensor], model: nn.Module, std: float | None = None, keep: bool = True) -> list[str]:
    """Put the model's classifier into `state` where it has none of its shape, and return the names put there.

    Args:
        std: draw weights from a truncated normal distribution with it, and biases 0; None keeps the model's own.
        keep: one of its shape; False replaces that too.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ["head", "head_dist"]
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    new = []
    for name, value in model.state_dict().items():
        if name.startswith(prefixes) and (not keep or name not in state or state[name].shape != value.shape):
            new.append(name)
            state[name] = value.clone()
            if std is not None:
                nn.init.trunc_normal_(state[name], std=std) if value.ndim > 1 else state[name].zero_()
    return new


def diff_state_dicts(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """List how a state dict differs from a model's: shapes, dtype families, missing and unexpected keys."""
    shared = [name for name in expected if name in state]
    return [
        *(
            f"{name} {tuple(state[name].shape)} where the model has {tuple(expected[name].shape)}"
            for name in shared
            if state[name].shape != expected[name].shape
        ),
        *(
            f"{name} of {state[name].dtype} where the model has {expected[name].dtype}"
            for name in shared
            if dtype_family(state[name]) != dtype_family(expected[name])
        ),
        *(f"missing key {name}" for name in expected if name not in state),
        *(f"unexpected key {name}" for name in state if name not in expected),
    ]


def dtype_family(weight: Tensor) -> tuple[bool, bool]:
    """(floating point, complex); within a family `load_state_dict` converts without loss of meaning."""
    return weight.is_floating_point(), weight.is_complex()
