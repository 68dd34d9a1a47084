"""The settings of a run, with their types."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self


class TrainArgs(argparse.Namespace):
    """What `common.args.parse` returns, as used by all recipes; flags of one recipe are annotated in its subclass.

    `vars(args)` is what goes into checkpoints and args.json.
    """

    if TYPE_CHECKING:
        # argparse.Namespace's would let mypy accept every name
        __getattr__: None  # type: ignore[misc, assignment]
        __setattr__: None  # type: ignore[misc, assignment]

    recipe: str

    # run
    variant: str | None
    batch_size: int
    epochs: int
    accum_iter: int
    output_dir: str
    resume: str
    start_epoch: int
    eval: bool
    throughput: bool
    save_freq: int
    dist_eval: bool
    save_every: int
    keep_last: int
    seed: int
    deterministic: bool
    device: str | None
    amp: str | None
    compile: bool
    channels_last: bool
    log_interval: int

    # AugSub
    augsub: str
    augsub_ratio: float
    augsub_block: int
    augsub_bn: str

    # model
    model: str
    input_size: int
    drop: float
    drop_path: float
    finetune: str
    model_ema: bool
    model_ema_decay: float
    model_ema_warmup: bool
    model_ema_force_cpu: bool

    # optimizer
    opt: str
    opt_eps: float | None
    opt_betas: Sequence[float] | None
    momentum: float
    weight_decay: float
    clip_grad: float | None

    # schedule
    lr: float | None  # None until `Recipe.scale_lr`, where a recipe derives it from another flag
    sched: str
    warmup_lr: float
    min_lr: float
    warmup_epochs: int
    cooldown_epochs: int
    decay_epochs: float
    decay_rate: float
    patience_epochs: int
    lr_noise: Sequence[float] | None
    lr_noise_pct: float
    lr_noise_std: float

    # loss
    smoothing: float
    bce_loss: bool
    bce_target_thresh: float | None

    # augmentation
    scale: Sequence[float]
    ratio: Sequence[float]
    hflip: float
    vflip: float
    color_jitter: float | None
    aa: str | None
    train_interpolation: str
    repeated_aug: bool
    reprob: float
    remode: str
    recount: int
    resplit: bool
    mixup: float
    cutmix: float
    cutmix_minmax: Sequence[float] | None
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str

    # data
    data_path: str | None
    data_set: str
    nb_classes: int | None
    train_split: str
    val_split: str
    input_key: str | None
    target_key: str | None
    inat_category: str
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_mode: str
    eval_crop_ratio: float
    input: str
    num_workers: int
    data_timeout: int
    pin_mem: bool

    # flags of some recipes; `common.args.DEFAULTS_OF_MISSING_FLAGS` has the values for the others
    src: bool
    train_mode: bool
    aug_repeats: int
    zip: bool
    sync_bn: bool
    dist_bn: str
    auto_resume: bool
    checkpoint_hist: int
    log_dir: str | None
    class_order: str

    # settings of PREPROCESSING that no flag, file or variant sets; `resolve_preprocessing` takes them from the model
    left_to_model: Sequence[str] = ()

    @property
    def trains(self) -> bool:
        """Whether the run trains, rather than evaluates or measures."""
        return not (self.eval or self.throughput)

    @property
    def mixup_active(self) -> bool:
        """Whether images are mixed, by mixup or CutMix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def warmup_is_all(self) -> bool:
        """Whether the learning rate is still in its warm-up when the run ends."""
        return self.sched != "none" and self.warmup_epochs >= self.epochs

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values."""
        return type(self)(**vars(self) | changes)
