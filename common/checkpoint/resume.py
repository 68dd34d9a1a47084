"""Resuming: which checkpoint to start from, whether it is of the same run, and restoring it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common import distributed
from common.checkpoint.class_names import check_class_names, saved_class_names
from common.checkpoint.hub_format import archive_folders
from common.checkpoint.io import load
from common.checkpoint.manager import list_newest_first
from common.checkpoint.report import check_complete
from common.checkpoint.sources import WeightsSource
from common.checkpoint.state import Restorable, RunIdentity, as_json, load_rank_state
from common.checkpoint.weights import AdaptWeights, has_average, load_weights
from common.distributed import Process
from common.progress import EpochProgress
from common.run_dir import LAST, link_or_copy

# settings of an optimizer's parameter groups, as opposed to its state
OPTIMIZER_SETTINGS = {"weight_decay", "betas", "eps", "momentum", "lr_scale"}
# what reading a state that is not as expected may raise
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class ResumeOptions:
    """The flags that say what to start from."""

    output_dir: str  # "" saves nothing
    resume: str = ""  # as the flag has it
    weights: WeightsSource | None = None  # what it names
    auto_resume: bool = True  # continue what is in the output folder
    evaluate: bool = False
    requires_checkpoint: bool = False  # there are no other weights to evaluate
    start_epoch: int = 0  # where the checkpoint has no trainer state
    finetune: str = ""  # initial weights, for which the checkpoint's take the place


@dataclass
class ResumeSource:
    """A checkpoint to start from."""

    path: Path
    content: dict[str, Any]
    continues: bool = False  # it is the newest in the output folder
    named: bool = False  # --resume names it, so settings may differ
    label: str = ""  # its name in messages, if that is not the path
    pretrained_cfg: dict[str, Any] | None = None  # of the config.json beside the weights
    damaged: list[Path] = field(default_factory=list)  # newer ones that cannot be read
    notes: list[str] = field(default_factory=list)  # to print

    @property
    def name(self) -> str:
        """The file in messages."""
        return self.label or str(self.path)


@dataclass
class ResumePoint:
    """Where a run starts, and what to print about it."""

    epoch: int  # to train next, counted from 0
    best: dict[str, float] = field(default_factory=dict)  # "acc1" and its "epoch"; empty before the first
    progress: EpochProgress | None = None  # in that epoch
    rank_state: dict[str, Any] | None = None  # of this rank, in the middle of an epoch
    links_due: bool = False  # a checkpoint of an epoch's end in the output folder: best and top k may lack it
    log: list[dict[str, Any]] | None = None  # lines of log.txt so far; None keeps the file's
    ema_restored: bool = True  # False: there are no averaged weights to evaluate
    notes: list[str] = field(default_factory=list)


def find_resume_source(options: ResumeOptions, process: Process) -> ResumeSource | None:
    """Find the checkpoint to start from: the newest in the output folder, `--resume`, or none.

    Raises:
        ValueError: the output folder holds another run than `--resume`, no checkpoint in it can be read, or there is
            nothing to evaluate.
    """
    folder = Path(options.output_dir)
    has_checkpoints = bool(options.output_dir) and any(list_newest_first(folder))
    if options.resume:
        assert options.weights is not None
        named, label = Path(options.weights.path), options.weights.label
        if options.evaluate or not has_checkpoints:
            return ResumeSource(
                named, load(named), named=True, label=label, pretrained_cfg=options.weights.pretrained_cfg
            )
        newest = load_newest(folder, process)
        if (folder / LAST).resolve() == named.resolve():
            return replace(newest, named=True)
        saved_args = newest.content.get("args")
        if isinstance(saved_args, dict) and saved_args.get("resume") == options.resume:
            return newest  # an earlier start of this very command was cut off
        if folder.resolve() != named.parent.resolve():
            raise ValueError(
                f"--output-dir {options.output_dir}: holds another run than --resume {options.resume}; "
                "choose another --output-dir"
            )
        return ResumeSource(named, load(named), named=True, label=label, pretrained_cfg=options.weights.pretrained_cfg)
    if has_checkpoints and options.auto_resume:
        return load_newest(folder, process)
    if options.requires_checkpoint:
        raise ValueError("--eval: no weights; pass a checkpoint with --resume or --finetune, or a run's --output-dir")
    return None


def run_settings(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the run that saved a checkpoint; None for a file of another origin."""
    settings = content.get("args")
    return settings if {"best", "processes", "position"} <= content.keys() and isinstance(settings, dict) else None


def load_newest(folder: Path, process: Process) -> ResumeSource:
    """Load the newest readable checkpoint of a run's folder; rank 0 chooses for all.

    Raises:
        ValueError: none is readable.
    """
    content, path = None, None
    damaged: list[Path] = []
    reasons: list[str] = []
    if process.is_main:
        for candidate in list_newest_first(folder):
            try:
                content, path = load(candidate), candidate
                break
            except ValueError as error:
                damaged.append(candidate)
                reasons.append(str(error))
    path, damaged, reasons = distributed.broadcast_from_main((path, damaged, reasons))
    if path is None:
        raise ValueError(
            f"--output-dir {folder}: none of the checkpoints can be read ({'; '.join(reasons)}); choose another "
            "folder, or empty this one to start over"
        )
    notes = [f"{reason}; falling back to the previous checkpoint" for reason in reasons]
    content = content if content is not None else load(path)
    return ResumeSource(path, content, continues=True, damaged=damaged, notes=notes)


def latest_fingerprint(folder: Path) -> tuple[int, int] | None:
    """Inode and modification time of the newest checkpoint, which change with each save; None without one."""
    try:
        status = (folder / LAST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def archive_stale_checkpoints(folder: Path, source: ResumeSource | None) -> None:
    """Rename checkpoints that the run does not continue: damaged ones to damaged_*, those of another run and its
    models to earlier_*; the one that it does continue becomes the newest."""
    if source is None or not source.continues:
        archive_folders(folder)
        for path in list(list_newest_first(folder)):
            if source is None or not path.samefile(source.path):
                os.replace(path, path.with_name(f"earlier_{path.name}"))
        return
    for path in source.damaged:
        os.replace(path, path.with_name(f"damaged_{path.name}"))
    newest = source.path.with_name(LAST)
    if source.path != newest:
        link_or_copy(source.path, newest)


def restore(
    source: ResumeSource, options: ResumeOptions, run: RunIdentity, trainer: Restorable, adapt_weights: AdaptWeights
) -> ResumePoint:
    """Restore a checkpoint into the trainer; one of another origin gives its weights only.

    Raises:
        ValueError: the checkpoint is corrupt or does not fit, or the output folder holds a run with other settings.
    """
    content, path, world_size = source.content, source.name, trainer.process.world_size
    has_trainer_state = run_settings(content) is not None
    notes = list(source.notes)
    if options.finetune:
        notes.append(f"--finetune {options.finetune}: not loaded; the weights are those of {path}")
    saved_names = saved_class_names(content, path, source.pretrained_cfg)
    check_class_names(path, saved_names, run.class_names, options.resume if source.named else "")
    changed: list[str] = []
    if has_trainer_state and not options.evaluate:
        changed = list_changes(source, run, world_size)
        if changed and source.continues and not source.named:
            raise ValueError(
                f"--output-dir {options.output_dir}: holds a run with other settings ({', '.join(changed)}); "
                f"choose another --output-dir, or continue that run under these settings with --resume {source.path}"
            )
        if changed:
            notes += [f"{path}: saved under other settings; this run uses its own:", *(f"  {line}" for line in changed)]
        if content["processes"] != world_size:
            notes.append(
                f"saved on {content['processes']} processes, resumed on {world_size}: not bit-identical to an "
                "uninterrupted run"
            )
    has_ema, lines = restore_weights(source, trainer, adapt_weights, options.evaluate)
    if not has_ema:
        notes.append(f"{path}: no EMA weights" + ("" if options.evaluate else "; the EMA starts from the model's"))
    if options.evaluate:
        return ResumePoint(0, ema_restored=has_ema, notes=[*lines, *notes])
    if not has_trainer_state:
        epoch = content["epoch"] + 1 if isinstance(content.get("epoch"), int) else options.start_epoch
        note = f"{path} has no trainer state: loading weights only, starting at epoch {epoch + 1}"
        return ResumePoint(epoch, notes=[note, *lines, *notes])
    restore_optimizer(source, trainer, run.settings["opt"])
    with report_corruption(path):
        best = {name: check_finite(value) for name, value in content["best"].items()}
        links_due = source.continues and content["position"] is None
        point = ResumePoint(check_int(content["epoch"], -1) + 1, best, links_due=links_due)
        if source.continues:
            point.log = [dict(entry) for entry in content["log"]]
            assert all(check_int(entry["epoch"], 0) >= 0 for entry in point.log)
        position = f"epoch {point.epoch + 1}"
        if content["position"] is not None and changed:  # the same step would be of other images
            notes.append(f"{path}: saved in the middle of an epoch under other settings; restarting that epoch")
        elif content["position"] is not None:
            point.progress = restore_progress(content, run, trainer.process)
            position += f", after step {point.progress.step},"
            if content["processes"] == world_size:
                point.rank_state = content["own"][trainer.process.rank]
                # Tried here, where a state that does not fit is bad input. The epoch's seed sets the generators anew,
                # so training loads it again after that.
                load_rank_state(trainer, point.rank_state)
    point.notes = [*notes, f"continuing at {position} from {path}"]
    return point


def restore_weights(
    source: ResumeSource, trainer: Restorable, adapt_weights: AdaptWeights, evaluate: bool
) -> tuple[bool, list[str]]:
    """Load model and EMA → whether the checkpoint has all of what the trainer has, and what to print of its weights.

    Without averaged weights in it, training starts the EMA from the model's; there is nothing to evaluate.

    Raises:
        ValueError: they do not fit, or are to be evaluated and lack some of the model's.
    """
    content, path = source.content, source.name
    report = load_weights(trainer.raw_model, path, adapt_weights, content=content)
    if evaluate:
        check_complete(report)
    lines = list(report.lines())
    if trainer.ema is None:
        return True, lines
    has_ema = has_average(content)
    if has_ema or not evaluate:
        part = "model_ema" if has_ema else "model"
        lines += load_weights(trainer.ema.module, path, adapt_weights, part=part, content=content).lines()
    return has_ema, lines


def restore_optimizer(source: ResumeSource, trainer: Restorable, name: str) -> None:
    """Load the state of optimizer and scaler, and keep this command's settings.

    Args:
        name: of the optimizer, for the error.

    Raises:
        ValueError: the state is another optimizer's.
    """
    content = source.content
    settings = [
        {key: group[key] for key in OPTIMIZER_SETTINGS & group.keys()} for group in trainer.optimizer.param_groups
    ]
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
        for parameter, state in trainer.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    check_moment(key, value, parameter)
                    state[key] = value.clone()  # a hostile file may have two of them share memory
        if content["scaler"]:  # empty if the run was not in float16 so far
            trainer.scaler.load_state_dict(content["scaler"])
    except MALFORMED as error:
        raise ValueError(f"{source.name}: optimizer state does not fit --opt {name} ({error})") from error
    for group, values in zip(trainer.optimizer.param_groups, settings):
        group.update(values)  # load_state_dict brought the settings of the checkpoint's run


def check_moment(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raise ValueError if a tensor of an optimizer's state is not finite or not of its parameter's shape.

    A tensor of another rank is a step counter or factored (Adafactor's rows and columns): its shape is not checked.
    """
    if value.ndim == parameter.ndim and value.ndim and value.shape != parameter.shape:
        raise ValueError(f"{name} {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"{name} is not finite")


def restore_progress(content: dict[str, Any], run: RunIdentity, process: Process) -> EpochProgress:
    """Read how far the epoch had come, with this rank's sums since the last report.

    Raises:
        LookupError, TypeError, ValueError: no run could have come so far.
    """
    progress = EpochProgress.from_dict(content["position"])
    check_int(progress.step, 1, run.steps_per_epoch - 1)
    check_finite(progress.lr_sum)
    interval_totals = [state["window"] for state in content["own"]]
    # each is the number of images, then one sum of losses per pass; the loop adds them up element by element
    for totals in (progress.totals, *interval_totals):
        if len(totals) != 1 + run.passes or [check_finite(value) for value in totals] != totals:
            raise ValueError(f"loss sums: expected {1 + run.passes} numbers, found {totals!r:.40}")
    if content["processes"] == process.world_size:
        progress.interval_totals = interval_totals[process.rank]
    elif process.is_main:  # other ranks now: rank 0 takes all sums, so that the epoch's means are of all its images
        progress.interval_totals = [sum(values) for values in zip(*interval_totals)]
    return progress


def check_int(value: Any, least: int, most: float = math.inf) -> int:
    """Return an integer in [least, most]; raises ValueError if it is none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"expected an integer from {least} to {most}, found {value!r:.40}")
    return value


def check_finite(value: Any) -> float:
    """Return a finite number as a float; raises ValueError if it is none."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value!r:.40}")
    return float(value)


@contextmanager
def report_corruption(path: str) -> Iterator[None]:
    """Turn what reading a malformed state raises into a ValueError that names the file."""
    try:
        yield
    except MALFORMED as error:
        raise ValueError(f"{path}: corrupt, or not a checkpoint of this trainer ({error})") from error


def list_changes(source: ResumeSource, run: RunIdentity, world_size: int) -> list[str]:
    """List how this run differs from the checkpoint's; empty if it is the same run.

    The number of processes may differ if the images per optimizer step do not.

    Raises:
        ValueError: the checkpoint is corrupt.
    """
    content, settings = source.content, run.settings
    saved = content["args"]
    with report_corruption(source.name):
        batches = [
            values["batch_size"] * values["accum_iter"] * processes
            for values, processes in ((saved, content["processes"]), (settings, world_size))
        ]
        may_change = run.may_change | ({"batch_size", "accum_iter"} if batches[0] == batches[1] else set())
        changes = [
            f"{name} {saved[name]} → {value}"
            for name, value in settings.items()
            if name not in may_change and name in saved and as_json(value) != as_json(saved[name])
        ]
    if not changes and batches[0] != batches[1]:
        changes = [f"images per step {batches[0]} → {batches[1]}, on {content['processes']} and {world_size} processes"]
    if not changes and content.get("updates") != run.steps_per_epoch:
        changes = [f"steps per epoch {content.get('updates')} → {run.steps_per_epoch}, so other data"]
    return changes
