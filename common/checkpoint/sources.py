"""Where weights come from: a file, an address, a folder or hub repository in timm's format, or the tag of a timm model.

Downloads go through huggingface_hub and timm: their caches, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from timm.models import list_pretrained, parse_model_name, split_model_name_tag
from timm.models._hub import download_cached_file, download_from_hf

from common.errors import is_rank_zero_from_env
from common.flag_types import MODEL_SOURCES
from common.models import check_architecture, explain_hub_errors, read_model_config

TAG = "timm"  # stands for the weights that the tag in --model names; a file of that name is ./timm
# of a folder or repository in timm's format, in timm's order
FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
SUFFIXES = (".safetensors", ".pth", ".bin")


@dataclass(frozen=True)
class WeightsSource:
    """A file with weights, and what is known of their model."""

    name: str  # as the flag has it
    path: str  # of the file
    architecture: str | None = None  # timm's name; None where only the tensors tell
    pretrained_cfg: dict[str, Any] | None = None  # of a config.json: how images are prepared, and class names

    @property
    def label(self) -> str:
        """Name the file in messages, by its repository instead of the hub's cache."""
        return self.path if self.architecture is None else f"{self.name} ({Path(self.path).name})"


def find_weights(name: str, model: str) -> WeightsSource:
    """Find the file that `--finetune` or `--resume` names, and download it where it is not in the cache.

    Args:
        name: of a file, an https:// address, hf-hub:…, local-dir:…, or "timm" for the tag's weights.
        model: the value of `--model`.

    Raises:
        ValueError: there are no such weights, they cannot be downloaded, or they are of another model.
    """
    if not is_rank_zero_from_env():
        disable_progress_bars()
    if name == TAG:
        return find_tag_weights(model)
    if not name.startswith(MODEL_SOURCES):
        return WeightsSource(name, fetch(name))
    config = read_model_config(name)
    check_architecture(model, name, config.architecture)
    source, place = parse_model_name(name)
    if source == "local-dir":
        path = str(find_file(Path(place).expanduser(), name))
    else:
        path = download_from_hub(place, FILES[:2], name)
    return WeightsSource(name, path, config.architecture, config.pretrained_cfg)


def find_tag_weights(model: str) -> WeightsSource:
    """Find the weights of a timm model's tag, such as vit_base_patch16_clip_224.openai.

    Raises:
        ValueError: the model has no such tag, or cannot be downloaded.
    """
    architecture, tag = split_model_name_tag(model)
    tags = [name for name in list_pretrained(f"{architecture}.*") if split_model_name_tag(name)[0] == architecture]
    if model not in tags:
        problem = f"it has no tag {tag}" if tag else "it names no tag"
        hint = f"timm has {', '.join(tags)}" if tags else f"timm has no weights of {architecture}"
        raise ValueError(f"--finetune {TAG} with --model {model}: {problem}; {hint}")
    cfg = timm.get_pretrained_cfg(model)
    if cfg.hf_hub_id:
        files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else FILES[:2]
        path = download_from_hub(cfg.hf_hub_id, files, f"--finetune {TAG} with --model {model}")
    else:
        with explain_hub_errors(f"--finetune {TAG} with --model {model}", cfg.url):
            path = download_cached_file(cfg.url, check_hash=False, progress=is_rank_zero_from_env())
    return WeightsSource(model, path, architecture)


def describe_unused_weights(model: str) -> list[str]:
    """What to print where training starts from scratch although `--model` names weights, by a tag or a place."""
    named = model.startswith(MODEL_SOURCES) or split_model_name_tag(model)[1]
    flag = f"--finetune {model if model.startswith(MODEL_SOURCES) else TAG}"
    return [f"weights: none, training starts from scratch; {flag} takes those of {model}"] if named else []


def download_from_hub(repository: str, files: Sequence[str], name: str) -> str:
    """Return the path, in the hub's cache, of the first of the files that a repository has.

    Args:
        repository: its name, with @REVISION behind it where it is not the newest.
        name: for the message.

    Raises:
        ValueError: it has none of them, or they cannot be downloaded.
    """
    *others, last = files
    with explain_hub_errors(name, files[0]):
        for file in others:
            with suppress(EntryNotFoundError):
                return download_from_hf(repository, file)
        return download_from_hf(repository, last)


def find_file(folder: Path, name: str) -> Path:
    """Return the file with the weights in a folder in timm's format.

    Raises:
        ValueError: there is none.
    """
    others = [path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    for path in (*(folder / file for file in FILES), *others):
        if path.is_file():
            return path
    raise ValueError(f"{name}: the folder holds no weights; expected {FILES[0]}")


def fetch(source: str) -> str:
    """Return the path of a checkpoint; downloads an https:// address to torch's cache first.

    Raises:
        ValueError: it is an http:// address, or the download failed.
    """
    if source.startswith("http://"):
        raise ValueError(f"{source}: not encrypted; use an https:// address")
    if not source.startswith("https://"):
        return source
    prefix = hashlib.sha256(source.encode()).hexdigest()[:12]  # two sites may have files of the same name
    target = Path(torch.hub.get_dir(), "checkpoints", f"{prefix}-{Path(source).name}")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(target), progress=is_rank_zero_from_env())
        except OSError as error:
            raise ValueError(f"{source}: could not be downloaded ({error})") from error
    return str(target)
