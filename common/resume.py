"""Going on from a checkpoint: which one, whether it is the same run, and what comes back of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, dist
from common.args import MAY_CHANGE, STREAMS
from common.dist import Process
from common.engine import Position, Trainer
from common.files import keep_as, load
from common.recipe import Recipe

# what an optimizer is set to, as against what it remembers
OPTIMIZER_SETTINGS = {"weight_decay", "betas", "eps", "momentum", "lr_scale"}


@dataclass
class Source:
    """A checkpoint to start from."""

    path: Path
    content: dict[str, Any]
    continues: bool = False  # whether an earlier start of this command left it in the output folder
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
        if args.eval or not there or (folder / checkpoint.LAST).resolve() == named.resolve():
            return Source(named, load(named))
        ours = newest(folder, process)
        before = ours.content.get("args")
        if isinstance(before, dict) and before.get("resume") == args.resume:
            return ours
        if folder.resolve() != named.parent.resolve():
            raise ValueError(f"{args.output_dir} holds another run than {args.resume}: choose another --output-dir")
        return Source(named, load(named))
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
    content, damaged, reasons, path = None, [], [], None
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
    return Source(path, content if content is not None else load(path), True, damaged, notes)


def newest_of(folder: Path) -> tuple[int, int] | None:
    """What changes when a folder gets a new checkpoint."""
    try:
        found = (folder / checkpoint.LAST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def put_in_order(source: Source) -> None:
    """Gives the checkpoint that a run goes on from the name of the newest, and damaged ones a name that says so."""
    last = source.path.with_name(checkpoint.LAST)
    for path in source.damaged:
        os.replace(path, path.with_name(f"damaged_{path.name}"))
    if source.continues and source.path != last:
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
    continues: bool = False  # an earlier start of this command
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


def restore(recipe: Recipe, args: argparse.Namespace, source: Source, trainer: Trainer) -> Start:
    """Puts a checkpoint's state into the trainer.

    Raises:
        ValueError: the checkpoint does not fit, or the output folder holds a run with other settings.
    """
    content, path = source.content, source.path
    ours = {"best", "processes", "position"} <= content.keys() and isinstance(content.get("args"), dict)
    notes = list(source.notes)
    if ours and not args.eval and source.continues:
        check_settings(args, content, path, trainer.process.world_size)
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
        start = Start(int(content["epoch"]) + 1, {name: float(content["best"][name]) for name in content["best"]},
                      continues=source.continues)  # fmt: skip
        where = f"epoch {start.epoch + 1}"
        if content["position"] is not None:
            start.position = Position(**content["position"])
            where += f", after step {start.position.update},"
            if content["processes"] == trainer.process.world_size:
                start.own = content["own"][trainer.process.rank]
                start.position.window = start.own["window"]
                set_own_state(trainer, start.own)
            elif trainer.process.is_main:  # so that the means of the epoch are of all its images
                start.position.window = [sum(values) for values in zip(*(own["window"] for own in content["own"]))]
    start.notes = [*notes, f"continuing at {where} from {path}"]
    return start


@contextmanager
def of_ours(path: Path) -> Iterator[None]:
    """Makes the failure to use what a checkpoint of ours should hold a ValueError of one sentence."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
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
        if content["scaler"]:  # empty where the run so far was not in float16
            trainer.scaler.load_state_dict(content["scaler"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit --opt {args.opt} ({error})") from error
    for group, given in zip(trainer.optimizer.param_groups, settings):
        group.update(given)  # a state dict brings the settings of its run too


def check_settings(args: argparse.Namespace, content: dict[str, Any], source: Path, processes: int) -> None:
    """Compares the settings with those of the run in the output folder. The number of processes may differ where the
    batch of all of them together does not.

    Raises:
        ValueError: they would make another run of it.
    """
    before = content["args"]
    with of_ours(source):
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
    if changed:
        raise ValueError(
            f"{args.output_dir} holds a run with other settings ({', '.join(changed[:4])}): choose another "
            f"--output-dir, or continue that run under these settings with --resume {source}"
        )


def plain(value: Any) -> Any:
    """Settings as JSON has them, so that a saved one equals a parsed one."""
    return json.loads(json.dumps(value))
