"""Swin's configuration files and `--opts`: their keys, and the settings of this trainer that they set."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.train_args import TrainArgs

HERE = Path(__file__).resolve().parent

# types that a key may have, as YAML reads them, and their names in messages
TYPE_NAMES = {
    int: "an integer",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    list: "a list of finite numbers",
}

# key → (setting, type); a key without a setting is checked and has no effect
KEYS: dict[str, tuple[str | None, type]] = {
    "DATA.BATCH_SIZE": ("batch_size", int),
    "DATA.DATA_PATH": ("data_path", str),
    "DATA.DATASET": (None, str),
    "DATA.IMG_SIZE": ("input_size", int),
    "DATA.INTERPOLATION": ("train_interpolation", str),
    "DATA.ZIP_MODE": ("zip", bool),
    "DATA.CACHE_MODE": (None, str),
    "DATA.PIN_MEMORY": ("pin_mem", bool),
    "DATA.NUM_WORKERS": ("num_workers", int),
    "MODEL.TYPE": ("model_type", str),
    "MODEL.NAME": ("model", str),
    "MODEL.PRETRAINED": ("finetune", str),
    "MODEL.RESUME": ("resume", str),
    "MODEL.NUM_CLASSES": ("nb_classes", int),
    "MODEL.DROP_RATE": ("drop", float),
    "MODEL.DROP_PATH_RATE": ("drop_path", float),
    "MODEL.LABEL_SMOOTHING": ("smoothing", float),
    "MODEL.SWIN.PATCH_SIZE": ("patch_size", int),
    "MODEL.SWIN.IN_CHANS": ("in_chans", int),
    "MODEL.SWIN.EMBED_DIM": ("embed_dim", int),
    "MODEL.SWIN.DEPTHS": ("depths", list),
    "MODEL.SWIN.NUM_HEADS": ("num_heads", list),
    "MODEL.SWIN.WINDOW_SIZE": ("window_size", int),
    "MODEL.SWIN.MLP_RATIO": ("mlp_ratio", float),
    "MODEL.SWIN.QKV_BIAS": ("qkv_bias", bool),
    "TRAIN.START_EPOCH": ("start_epoch", int),
    "TRAIN.EPOCHS": ("epochs", int),
    "TRAIN.WARMUP_EPOCHS": ("warmup_epochs", int),
    "TRAIN.WEIGHT_DECAY": ("weight_decay", float),
    "TRAIN.BASE_LR": ("lr", float),
    "TRAIN.WARMUP_LR": ("warmup_lr", float),
    "TRAIN.MIN_LR": ("min_lr", float),
    "TRAIN.CLIP_GRAD": ("clip_grad", float),
    "TRAIN.AUTO_RESUME": ("auto_resume", bool),
    "TRAIN.ACCUMULATION_STEPS": ("accum_iter", int),
    "TRAIN.USE_CHECKPOINT": ("use_checkpoint", bool),
    "TRAIN.LR_SCHEDULER.NAME": ("sched", str),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": ("decay_epochs", int),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": ("decay_rate", float),
    "TRAIN.OPTIMIZER.NAME": ("opt", str),
    "TRAIN.OPTIMIZER.EPS": ("opt_eps", float),
    "TRAIN.OPTIMIZER.BETAS": ("opt_betas", list),
    "TRAIN.OPTIMIZER.MOMENTUM": ("momentum", float),
    "AUG.COLOR_JITTER": ("color_jitter", float),
    "AUG.AUTO_AUGMENT": ("aa", str),
    "AUG.REPROB": ("reprob", float),
    "AUG.REMODE": ("remode", str),
    "AUG.RECOUNT": ("recount", int),
    "AUG.MIXUP": ("mixup", float),
    "AUG.CUTMIX": ("cutmix", float),
    "AUG.CUTMIX_MINMAX": ("cutmix_minmax", list),
    "AUG.MIXUP_PROB": ("mixup_prob", float),
    "AUG.MIXUP_SWITCH_PROB": ("mixup_switch_prob", float),
    "AUG.MIXUP_MODE": ("mixup_mode", str),
    "AUG.AUGSUB": ("augsub", str),
    "AUG.AUGSUB_RATIO": ("augsub_ratio", float),
    "TEST.CROP": ("test_crop", bool),
    "AMP_ENABLE": ("amp_enable", bool),
    "OUTPUT": ("output_dir", str),
    "TAG": ("tag", str),
    "SAVE_FREQ": ("save_freq", int),
    "PRINT_FREQ": ("log_interval", int),
    "SEED": ("seed", int),
    "EVAL_MODE": ("eval", bool),
    "THROUGHPUT_MODE": ("throughput", bool),
}

# keys that may hold null, "none" or "", and the setting's value then
NULLABLE = {
    "MODEL.PRETRAINED": "",
    "MODEL.RESUME": "",
    "TRAIN.CLIP_GRAD": None,
    "TRAIN.OPTIMIZER.BETAS": None,
    "AUG.COLOR_JITTER": None,
    "AUG.AUTO_AUGMENT": None,
    "AUG.CUTMIX_MINMAX": None,
    "AUG.AUGSUB": "none",
    "OUTPUT": "",
}

# settings that only a configuration sets, at Swin-T's values
DEFAULTS_WITHOUT_FLAG = {
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "model_type": "swin",
    "test_crop": True,
    "amp_enable": True,
}


# settings of the model's shape; `--finetune hf-hub:…` brings a shape where none of them is set
SHAPE = {"patch_size", "in_chans", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias"}


class SwinArgs(TrainArgs):
    cfg: str | None
    opts: Sequence[str] | None
    tag: str
    use_checkpoint: bool
    disable_amp: bool
    optim: str | None
    cache_mode: str
    amp_opt_level: str | None
    fused_window_process: bool
    fused_layernorm: bool

    # set by a configuration only
    patch_size: int
    in_chans: int
    embed_dim: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    window_size: int
    mlp_ratio: float
    qkv_bias: bool
    model_type: str
    test_crop: bool
    amp_enable: bool


def read(cfg: str | None, opts: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the settings of a configuration file and of `--opts`, which overrides it.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    settings: dict[str | None, Any] = {}
    if cfg:
        path = find(cfg)
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path}: no settings; expected MODEL: …")
        try:
            settings |= dict(convert(key, value, str(path)) for key, value in flatten(content))
        except RecursionError as error:
            raise ValueError(f"{path}: a setting contains itself") from error
    if opts:
        if len(opts) % 2:
            raise ValueError(f"--opts: {opts[-1]!r} has no value; expected KEY VALUE …")
        for key, text in zip(opts[::2], opts[1::2]):
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError) as error:
                raise ValueError(f"--opts: {key} {text!r} is not YAML") from error
            settings |= [convert(key, value, "--opts")]
    if settings.get("train_interpolation", "random") != "random":  # upstream's key holds for evaluation too
        settings["interpolation"] = settings["train_interpolation"]
    return {name: value for name, value in settings.items() if name is not None}


def find(cfg: str) -> Path:
    """Return the path of a configuration file, relative to the working directory or to this folder."""
    for path in (Path(cfg), HERE / cfg):
        if path.is_file():
            return path
    known = ", ".join(sorted(str(path.relative_to(HERE)) for path in HERE.glob("configs/**/*.yaml")))
    raise ValueError(f"--cfg {cfg}: no such file; {known} exist")


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as pairs of a dotted key and a value."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def convert(key: str, value: Any, source: str) -> tuple[str | None, Any]:
    """Return the setting that a key sets, and its value with the type checked.

    Raises:
        ValueError: an unknown key, or a value of another type; `source` is named in the message.
    """
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS, n=1)
        raise ValueError(f"{source}: unknown key {key}" + (f": did you mean {close[0]}?" if close else ""))
    name, kind = KEYS[key]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 5e-4 as a string
    if key in NULLABLE and value in ("", "none", None):
        return name, NULLABLE[key]
    if not has_type(value, kind):
        raise ValueError(f"{source}: {key} must be {TYPE_NAMES[kind]}, not {value!r}")
    return name, value


def has_type(value: Any, kind: type) -> bool:
    """Whether a value is of one of the types in `TYPE_NAMES`."""
    if isinstance(value, bool):  # Python counts it as an int
        return kind is bool
    if kind is list:
        return isinstance(value, list) and all(has_type(item, int) or has_type(item, float) for item in value)
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))
