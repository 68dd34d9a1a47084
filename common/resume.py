"""Going on from a checkpoint: which one, whether it is the same run, and what comes back of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import checkpoint, dist
from common.args import MAY_CHANGE, STREAMS
from common.dist import Process
from common.engine import Position, Trainer
from common.files import load
from common.folder import LAST, keep_as
from common.recipe import Recipe

# what an optimizer is set to, as against what it remembers
OPTIMIZER_SETTINGS = {"weight_decay", "betas", "eps", "momentum", "lr_scale"}


@dataclass
class Source:
    """A checkpoint to start from."""

    path: Path
    content: dict[str, Any]
    continues: bool = False  # whether it is the output folder's newest
    named: bool = False  # whether `--resume` names it, so that settings may differ
    damaged: list[Path] = field(default_factory=list)  # newer ones that were passed over
    notes: list[str] = field(default_factory=list)  # what there is to say of them


def resume_from(args: argparse.Namespace, process: Process) -> Source | None:
    """The checkpoint to go on from: the newest that an earlier start of this command left in the output folder, or
    `--resume`, or none.

    Raises:
        ValueError: the output folder holds another run than the one that `--resume` names, none of its checkpoints
            can be read, or there is nothing to evaluate.
    """
    folder = Path(args.output_dir)
    there = bool(args.output_dir) and any(checkpoint.generations(folder))
    if args.resume:
        named = Path(fetch(args.resume))
        if args.eval or not there:
            return Source(named, load(named), named=True)
        ours = newest(folder, process)
        if (folder / LAST).resolve() == named.resolve():
            return replace(ours, named=True)
        before = ours.content.get("args")
        if isinstance(before, dict) and before.get("resume") == args.resume:
            return ours
        if folder.resolve() != named.parent.resolve():
            raise ValueError(f"{args.output_dir} holds another run than {args.resume}: choose another --output-dir")
        return Source(named, load(named), named=True)
    if there and args.auto_resume:
        return newest(folder, process)
    if args.eval and not args.throughput and not args.finetune:
        raise ValueError("--eval needs weights: --resume or --finetune names a checkpoint, or --output-dir a run")
    return None


def newest(folder: Path, process: Process) -> Source:
    """The newest checkpoint of a run's folder that is whole; the main process chooses for all.

    Raises:
        ValueError: none is.
    """
    content, path = None, None
    damaged: list[Path] = []
    reasons: list[str] = []
    if process.is_main:
        for path in checkpoint.generations(folder):
            try:
                content = load(path)
                break
            except ValueError as error:
                damaged.append(path)
                reasons.append(str(error))
        else:
            path = None
    path, damaged, reasons = dist.from_main((path, damaged, reasons))
    if path is None:
        raise ValueError(f"none of the checkpoints in {folder} can be read ({'; '.join(reasons)}): choose another "
                         "--output-dir, or empty this one to begin anew")  # fmt: skip
    notes = [f"{reason}; the one before takes its place" for reason in reasons]
    return Source(path, content if content is not None else load(path), continues=True, damaged=damaged, notes=notes)


def newest_of(folder: Path) -> tuple[int, int] | None:
    """What changes when a folder gets a new checkpoint."""
    try:
        found = (folder / LAST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def put_in_order(folder: Path, source: Source | None) -> None:
    """Gives the checkpoint that a run goes on from the name of the newest, and others names that say what they are:
    damaged ones, and those of an earlier run in this folder that this one does not continue."""
    if source is None or not source.continues:
        for path in list(checkpoint.generations(folder)):
            if source is None or not path.samefile(source.path):
                os.replace(path, path.with_name(f"earlier_{path.name}"))
        return
    for path in source.damaged:
        os.replace(path, path.with_name(f"damaged_{path.name}"))
    last = source.path.with_name(LAST)
    if source.path != last:
        keep_as(source.path, last)


def fetch(source: str) -> str:
    """A checkpoint's path; one behind an https:// address is downloaded first, to torch's cache."""
    if source.startswith("http://"):
        raise ValueError(f"{source}: only https:// addresses are fetched")
    if not source.startswith("https://"):
        return source
    address = hashlib.sha256(source.encode()).hexdigest()[:12]  # two places may have a file of the same name
    target = Path(torch.hub.get_dir(), "checkpoints", f"{address}-{Path(source).name}")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(target), progress=dist.is_main_before_start())
        except OSError as error:
            raise ValueError(f"{source}: could not be downloaded ({error})") from error
    return str(target)


@dataclass
class Start:
    """Where a run begins."""

    epoch: int  # the next one to train
    best: dict[str, float] = field(default_factory=dict)  # "acc1" and its "epoch"; empty before the first
    position: Position | None = None  # in that epoch
    own: dict[str, Any] | None = None  # state of this process alone: generators, batch statistics
    continues: bool = False  # an earlier start in the output folder
    log: list[dict[str, Any]] | None = None  # lines of log.txt so far; None takes the file's own
    notes: list[str] = field(default_factory=list)  # what there is to say of it


def own_state(trainer: Trainer, position: Position) -> dict[str, Any]:
    """What one process has for itself in the middle of an epoch, as tensors and plain values."""
    several = trainer.process.world_size > 1  # else the model's state has them
    buffers = {name: buffer.cpu() for name, buffer in trainer.bare.named_buffers()} if several else {}
    return {"random": dist.random_state(), "buffers": buffers, "window": position.window}


def set_own_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Puts back what `own_state` gave."""
    buffers = dict(trainer.bare.named_buffers())
    for name, value in state["buffers"].items():
        buffers[name].copy_(value)
    dist.set_random_state(state["random"])


def restore(recipe: Recipe, args: argparse.Namespace, source: Source, trainer: Trainer, updates: int) -> Start:
    """Puts a checkpoint's state into the trainer.

    Args:
        updates: optimizer steps of an epoch of this run.

    Raises:
        ValueError: the checkpoint does not fit, or the output folder holds a run with other settings.
    """
    content, path = source.content, source.path
    ours = {"best", "processes", "position"} <= content.keys() and isinstance(content.get("args"), dict)
    notes = list(source.notes)
    changed: list[str] = []
    if ours and not args.eval:
        changed = changed_settings(args, source, trainer.process.world_size, updates)
        if changed and source.continues and not source.named:
            raise ValueError(
                f"{args.output_dir} holds a run with other settings ({', '.join(changed[:4])}): choose another "
                f"--output-dir, or continue that run under these settings with --resume {path}"
            )
        if content["processes"] != trainer.process.world_size:
            notes.append(f"begun on {content['processes']} and continued on {trainer.process.world_size} processes, "
                         "the run does not end with the same bits")  # fmt: skip
    checkpoint.load_weights(trainer.bare, path, recipe.adapt_weights, content=content)
    if trainer.ema is not None:
        averaged = isinstance(content.get("model_ema"), dict)
        if averaged or not args.eval:
            part = "model_ema" if averaged else "model"
            checkpoint.load_weights(trainer.ema.module, path, recipe.adapt_weights, part=part, content=content)
        else:
            trainer.ema = None
        if not averaged:
            notes.append(f"{path} has no average of the weights" + ("" if args.eval else ": it starts from these"))
    if args.eval:
        return Start(0, notes=[f"evaluating {path}", *notes])
    if not ours:
        epoch = content["epoch"] + 1 if isinstance(content.get("epoch"), int) else args.start_epoch
        return Start(epoch, notes=[f"{path} is not of this trainer: its weights are used from epoch {epoch} on, "
                                   "with a fresh optimizer", *notes])  # fmt: skip
    restore_optimizer(args, content, path, trainer)
    with of_ours(path):
        best = {name: finite(value) for name, value in content["best"].items()}
        start = Start(whole(content["epoch"], -1) + 1, best, continues=source.continues)
        if source.continues:
            start.log = [dict(entry) for entry in content["log"]]
            assert all(whole(entry["epoch"], 0) >= 0 for entry in start.log)
        where = f"epoch {start.epoch + 1}"
        if content["position"] is not None and changed:
            notes.append(f"{path} is of the middle of an epoch under other settings ({', '.join(changed[:4])}), which "
                         "begins anew")  # fmt: skip
        elif content["position"] is not None:
            start.position = restore_position(content, trainer, updates)
            where += f", after step {start.position.update},"
            if content["processes"] == trainer.process.world_size:
                start.own = content["own"][trainer.process.rank]
                set_own_state(trainer, start.own)
    start.notes = [*notes, f"continuing at {where} from {path}"]
    return start


def restore_position(content: dict[str, Any], trainer: Trainer, updates: int) -> Position:
    """Where in the epoch a checkpoint stands, with this process's sums since the last report.

    Raises:
        LookupError, TypeError, ValueError: it is none that a run could have.
    """
    position = Position(**content["position"])
    whole(position.update, 1, updates - 1)
    finite(position.rates)
    windows = [own["window"] for own in content["own"]]
    for sums in (position.total, *windows):
        if len(sums) != len(position.total) or [finite(value) for value in sums] != sums:
            raise ValueError("its sums of losses do not fit")
    if len(position.total) != (2 if trainer.augsub.kind == "none" else 3):
        raise ValueError("its sums of losses do not fit")
    if content["processes"] == trainer.process.world_size:
        position.window = windows[trainer.process.rank]
    elif trainer.process.is_main:  # so that the means of the epoch are of all its images
        position.window = [sum(values) for values in zip(*windows)]
    return position


def whole(value: Any, least: int, most: float = math.inf) -> int:
    """A whole number within limits; raises ValueError where it is none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} where a whole number from {least} on is expected")
    return value


def finite(value: Any) -> float:
    """A finite number; raises ValueError where it is none."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} where a number is expected")
    return float(value)


@contextmanager
def of_ours(path: Path) -> Iterator[None]:
    """Makes the failure to use what a checkpoint of ours should hold a ValueError of one sentence."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise ValueError(f"{path}: the file is damaged, or no checkpoint of this trainer ({error})") from error


def restore_optimizer(args: argparse.Namespace, content: dict[str, Any], path: Path, trainer: Trainer) -> None:
    """Puts the state of the optimizer and the scaler back, under this command's settings.

    Raises:
        ValueError: they are of another optimizer.
    """
    settings = [{name: group[name] for name in OPTIMIZER_SETTINGS & group.keys()}
                for group in trainer.optimizer.param_groups]  # fmt: skip
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
        for parameter, state in trainer.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    check_moment(name, value, parameter)
                    state[name] = value.clone()  # two of them could lie in the same memory
        if content["scaler"]:  # empty where the run so far was not in float16
            trainer.scaler.load_state_dict(content["scaler"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit --opt {args.opt} ({error})") from error
    for group, given in zip(trainer.optimizer.param_groups, settings):
        group.update(given)  # a state dict brings the settings of its run too


def check_moment(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raises ValueError where a tensor that an optimizer remembers does not fit its parameter, or is not finite."""
    if value.ndim == parameter.ndim and value.ndim and value.shape != parameter.shape:
        raise ValueError(f"{name} {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"{name} is not finite")


def changed_settings(args: argparse.Namespace, source: Source, processes: int, updates: int) -> list[str]:
    """What makes another run of this one than of the checkpoint's, in words. The number of processes may differ where
    the batch of all of them together does not.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    content = source.content
    before = content["args"]
    with of_ours(source.path):
        batches = [
            a["batch_size"] * a["accum_iter"] * n for a, n in ((before, content["processes"]), (vars(args), processes))
        ]
        may_change = MAY_CHANGE | ({"batch_size", "accum_iter"} if batches[0] == batches[1] else set())
        if args.data_set.startswith(STREAMS):
            may_change -= {"num_workers"}
        changed = [
            f"{name} {before[name]} → {value}"
            for name, value in vars(args).items()
            if name not in may_change and name in before and plain(value) != plain(before[name])
        ]
    if not changed and batches[0] != batches[1]:
        changed = [f"images per step {batches[0]} → {batches[1]}, of {content['processes']} and {processes} processes"]
    if not changed and content.get("updates") != updates:
        changed = [f"steps of an epoch {content.get('updates')} → {updates}, as of other data"]
    return changed


def plain(value: Any) -> Any:
    """Settings as JSON has them, so that a saved one equals a parsed one."""
    return json.loads(json.dumps(value))
