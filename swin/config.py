"""Swin's configuration files and `--opts`: their keys, and the flags of this trainer that they stand for."""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
FLOAT, INT, TEXT, SWITCH, NUMBERS = float, int, str, bool, list

# key → (the setting's name, its type); a setting of None is checked and has no effect here
KEYS: dict[str, tuple[str | None, type]] = {
    "DATA.BATCH_SIZE": ("batch_size", INT),
    "DATA.DATA_PATH": ("data_path", TEXT),
    "DATA.DATASET": (None, TEXT),
    "DATA.IMG_SIZE": ("input_size", INT),
    "DATA.INTERPOLATION": ("train_interpolation", TEXT),
    "DATA.ZIP_MODE": ("zip", SWITCH),
    "DATA.CACHE_MODE": (None, TEXT),
    "DATA.PIN_MEMORY": ("pin_mem", SWITCH),
    "DATA.NUM_WORKERS": ("num_workers", INT),
    "MODEL.TYPE": ("model_type", TEXT),
    "MODEL.NAME": ("model", TEXT),
    "MODEL.PRETRAINED": ("finetune", TEXT),
    "MODEL.RESUME": ("resume", TEXT),
    "MODEL.NUM_CLASSES": ("nb_classes", INT),
    "MODEL.DROP_RATE": ("drop", FLOAT),
    "MODEL.DROP_PATH_RATE": ("drop_path", FLOAT),
    "MODEL.LABEL_SMOOTHING": ("smoothing", FLOAT),
    "MODEL.SWIN.PATCH_SIZE": ("patch_size", INT),
    "MODEL.SWIN.IN_CHANS": ("in_chans", INT),
    "MODEL.SWIN.EMBED_DIM": ("embed_dim", INT),
    "MODEL.SWIN.DEPTHS": ("depths", NUMBERS),
    "MODEL.SWIN.NUM_HEADS": ("num_heads", NUMBERS),
    "MODEL.SWIN.WINDOW_SIZE": ("window_size", INT),
    "MODEL.SWIN.MLP_RATIO": ("mlp_ratio", FLOAT),
    "MODEL.SWIN.QKV_BIAS": ("qkv_bias", SWITCH),
    "TRAIN.START_EPOCH": ("start_epoch", INT),
    "TRAIN.EPOCHS": ("epochs", INT),
    "TRAIN.WARMUP_EPOCHS": ("warmup_epochs", INT),
    "TRAIN.WEIGHT_DECAY": ("weight_decay", FLOAT),
    "TRAIN.BASE_LR": ("lr", FLOAT),
    "TRAIN.WARMUP_LR": ("warmup_lr", FLOAT),
    "TRAIN.MIN_LR": ("min_lr", FLOAT),
    "TRAIN.CLIP_GRAD": ("clip_grad", FLOAT),
    "TRAIN.AUTO_RESUME": ("auto_resume", SWITCH),
    "TRAIN.ACCUMULATION_STEPS": ("accum_iter", INT),
    "TRAIN.USE_CHECKPOINT": ("use_checkpoint", SWITCH),
    "TRAIN.LR_SCHEDULER.NAME": ("sched", TEXT),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": ("decay_epochs", INT),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": ("decay_rate", FLOAT),
    "TRAIN.OPTIMIZER.NAME": ("opt", TEXT),
    "TRAIN.OPTIMIZER.EPS": ("opt_eps", FLOAT),
    "TRAIN.OPTIMIZER.BETAS": ("opt_betas", NUMBERS),
    "TRAIN.OPTIMIZER.MOMENTUM": ("momentum", FLOAT),
    "AUG.COLOR_JITTER": ("color_jitter", FLOAT),
    "AUG.AUTO_AUGMENT": ("aa", TEXT),
    "AUG.REPROB": ("reprob", FLOAT),
    "AUG.REMODE": ("remode", TEXT),
    "AUG.RECOUNT": ("recount", INT),
    "AUG.MIXUP": ("mixup", FLOAT),
    "AUG.CUTMIX": ("cutmix", FLOAT),
    "AUG.CUTMIX_MINMAX": ("cutmix_minmax", NUMBERS),
    "AUG.MIXUP_PROB": ("mixup_prob", FLOAT),
    "AUG.MIXUP_SWITCH_PROB": ("mixup_switch_prob", FLOAT),
    "AUG.MIXUP_MODE": ("mixup_mode", TEXT),
    "AUG.AUGSUB": ("augsub", TEXT),
    "AUG.AUGSUB_RATIO": ("augsub_ratio", FLOAT),
    "TEST.CROP": ("test_crop", SWITCH),
    "AMP_ENABLE": ("amp_enable", SWITCH),
    "OUTPUT": ("output_dir", TEXT),
    "TAG": ("tag", TEXT),
    "SAVE_FREQ": ("save_freq", INT),
    "PRINT_FREQ": ("log_interval", INT),
    "SEED": ("seed", INT),
    "EVAL_MODE": ("eval", SWITCH),
    "THROUGHPUT_MODE": ("throughput", SWITCH),
}
# keys that may hold null or "none", and what that stands for
NULLABLE = {"MODEL.PRETRAINED": "", "MODEL.RESUME": "", "TRAIN.CLIP_GRAD": None, "TRAIN.OPTIMIZER.BETAS": None,
            "AUG.COLOR_JITTER": None, "AUG.AUTO_AUGMENT": None, "AUG.CUTMIX_MINMAX": None, "AUG.AUGSUB": "none",
            "OUTPUT": ""}  # fmt: skip


def read(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that `--cfg` and `--opts` stand for; `--opts` comes second.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    settings: dict[str | None, Any] = {}
    if args.cfg:
        path = find(args.cfg)
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds no settings: MODEL: … is expected")
        try:
            settings |= dict(setting(key, value, str(path)) for key, value in flat(content))
        except RecursionError as error:
            raise ValueError(f"{path} holds itself") from error
    if args.opts:
        if len(args.opts) % 2:
            raise ValueError(f"--opts takes pairs of KEY VALUE, and {args.opts[-1]!r} has no value")
        for key, text in zip(args.opts[::2], args.opts[1::2]):
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError) as error:
                raise ValueError(f"--opts: {key} cannot be {text!r}, which is not YAML") from error
            settings |= [setting(key, value, "--opts")]
    return {name: value for name, value in settings.items() if name is not None}


def find(name: str) -> Path:
    """The configuration file, as named from here or from this folder."""
    for place in (Path(name), HERE / name):
        if place.is_file():
            return place
    known = ", ".join(sorted(str(path.relative_to(HERE)) for path in HERE.glob("configs/**/*.yaml")))
    raise ValueError(f"--cfg {name}: there is no such file; {known} are here")


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted key and a value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs


def setting(key: str, value: Any, source: str) -> tuple[str | None, Any]:
    """A key of upstream's and its value as a setting of this trainer, with the type checked."""
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS, n=1)
        raise ValueError(f"{source}: unknown key {key}" + (f": did you mean {close[0]}?" if close else ""))
    name, kind = KEYS[key]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML takes 5e-4 for a string
    if key in NULLABLE and value in ("", "none", None):
        return name, NULLABLE[key]
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if kind is list and fits:
        fits = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value)
    if not fits:
        raise ValueError(f"{source}: {key} must be {_named(kind)}, not {value!r}")
    return name, value


def _named(kind: type) -> str:
    return {FLOAT: "a number", INT: "a whole number", TEXT: "text", SWITCH: "true or false",
            NUMBERS: "a list of numbers"}[kind]  # fmt: skip
