"""Registering models with timm, creating them by name or from a config.json, and fitting weights to their shapes."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import errors as hub_errors
from huggingface_hub.constants import HF_HUB_OFFLINE
from timm.layers import resample_abs_pos_embed
from timm.models import model_entrypoint, parse_model_name, register_model, split_model_name_tag
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn

from common.flag_types import MODEL_SOURCES
from common.train_args import TrainArgs

CONFIG = "config.json"  # of a folder or hub repository in timm's format
HUB_KWARGS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # timm passes them to every model


def register(module: str, name: str, build: Callable[..., nn.Module], **shape: Any) -> None:
    """Make `timm.create_model(name)` call `build(**shape)`, once `module` is imported.

    Args:
        module: `__name__` of the module that holds the model.
        build: builds the model from timm's keyword arguments.
        shape: keyword arguments that the name stands for; the caller of `create_model` may override them.
    """

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no pretrained weights: --finetune loads them from a file")
        return build(**shape | {key: value for key, value in kwargs.items() if key not in HUB_KWARGS})

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module
    setattr(sys.modules[module], name, register_model(entry))


@dataclass(frozen=True)
class ModelConfig:
    """What a config.json in timm's format says of a model."""

    architecture: str  # timm's name
    args: dict[str, Any]  # for `timm.create_model`
    pretrained_cfg: dict[str, Any]


@cache  # a hub that cannot be reached is asked for half a minute
def read_model_config(name: str) -> ModelConfig:
    """Read the config.json of `hf-hub:REPOSITORY[@REVISION]`, through the hub's cache, or of `local-dir:FOLDER`.

    Raises:
        ValueError: there is none, it cannot be downloaded, or it is not in timm's format.
    """
    source, place = parse_model_name(name)
    folder = Path(place).expanduser()
    if source == "local-dir" and not (folder / CONFIG).is_file():
        inner = next((path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))), None)
        hint = "expected a folder in timm's format" if inner is None else f"local-dir:{inner} has one"
        raise ValueError(f"{name}: no file {folder / CONFIG}; {hint}")
    with explain_hub_errors(name, CONFIG):
        if source == "local-dir":
            cfg, architecture, args = load_model_config_from_path(folder)
        else:
            cfg, architecture, args = load_model_config_from_hf(place)
    # rates are settings of a run, not of a model
    kept = {key: value for key, value in args.items() if not key.endswith(("drop_rate", "path_rate"))}
    return ModelConfig(architecture, kept, cfg)


@contextmanager
def explain_hub_errors(name: str, file: str) -> Iterator[None]:
    """Turn what the hub's client and timm raise for a file of `name` into a ValueError that says what to do."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: {file} is not in timm's format ({type(error).__name__}: {error})") from error
    except hub_errors.GatedRepoError as error:
        raise ValueError(f"{name}: access is restricted; request it on the hub, then run hf auth login") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ValueError(f"{name}: the hub has no such repository, or it is private; check the name") from error
    except hub_errors.RevisionNotFoundError as error:
        raise ValueError(f"{name}: the repository has no such revision; check what follows @") from error
    except hub_errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set; download it once without"
        reason = offline if HF_HUB_OFFLINE else "the hub is not reached; check the network"
        raise ValueError(f"{name}: no {file} in the cache, and {reason}") from error
    except hub_errors.EntryNotFoundError as error:
        raise ValueError(f"{name}: the repository has no {file}; expected one in timm's format") from error
    except Exception as error:  # of the operating system, and of whichever library the client speaks HTTP with
        raise ValueError(f"{name}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}") from error


def check_architecture(model: str, source: str, architecture: str) -> None:
    """Refuse weights of another architecture than `--model` names; for a name of this trainer the tensors tell.

    Args:
        model: the value of `--model`.
        source: of the weights, for the message.
        architecture: of the weights; timm's name.

    Raises:
        ValueError: they differ.
    """
    name, _ = split_model_name_tag(model)
    published = not timm.is_model(name) or not model_entrypoint(name).__module__.startswith("timm.")
    if model != source and not published and name != architecture:
        raise ValueError(f"--model {model}: {source} has weights of {architecture}; leave out --model")


def create_timm_model(args: TrainArgs, classes: int, **kwargs: Any) -> nn.Module:
    """Create the timm model `args.model`, or the one that its config.json describes; `kwargs` are timm's.

    A model that is built for one image size gets `input_size`, and `drop` in the projections and MLPs of its blocks;
    any other gets `drop` before the classifier. Rates of 0 are not passed, since not every model accepts each.

    Raises:
        ValueError: timm has no such model.
        TypeError: the model does not accept one of the rates.
    """
    settings: dict[str, Any] = {}
    name = args.model
    if name.startswith(MODEL_SOURCES):
        config = read_model_config(name)
        name = config.architecture
        settings = {**config.args, "pretrained_cfg": config.pretrained_cfg}
    if not timm.is_model(name):
        raise ValueError(f"--model {args.model}: timm has no model {name}; {suggest_models(name)}")
    cfg = timm.get_pretrained_cfg(name)
    fixed_size = cfg is None or cfg.fixed_input_size  # models registered here have no cfg
    rates = {"proj_drop_rate" if fixed_size else "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    settings |= {name: rate for name, rate in rates.items() if rate}
    if fixed_size:
        settings["img_size"] = args.input_size
    return timm.create_model(name, **settings | {"num_classes": classes} | kwargs)


def suggest_models(name: str) -> str:
    """Return what to do about a name that timm does not know."""
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"


def convert_with_timm(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights that are published for timm to the model by timm's function for its architecture: names, position
    embeddings, patch sizes."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return convert(state, model) if convert is not None else state


def resample_positions(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return the state dict with position embeddings, (1, tokens, dim), interpolated to the model's image size: bicubic
    without antialiasing, as upstream."""
    weight, target = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if weight is None or target is None or weight.shape == target.shape or not hasattr(model, "no_embed_class"):
        return state
    if weight.shape[::2] != target.shape[::2]:
        return state
    prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = weight.shape[1] - prefix_tokens
    if math.isqrt(patches) ** 2 != patches:
        return state  # no square grid: the weights are of a model with other prefix tokens
    resampled = resample_abs_pos_embed(
        weight, model.patch_embed.grid_size, num_prefix_tokens=prefix_tokens, antialias=False, align_corners=False
    )
    return state | {"pos_embed": resampled}
