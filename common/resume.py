"""Going on from a checkpoint: which one, whether it is the same run, and what comes back of it."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, dist
from common.args import MAY_CHANGE
from common.engine import Position, Trainer
from common.recipe import Recipe

# what an optimizer is set to, as against what it remembers
OPTIMIZER_SETTINGS = {"weight_decay", "betas", "eps", "momentum", "lr_scale"}


def resume_from(args: argparse.Namespace) -> str:
    """The checkpoint to go on from: the one that an earlier start of this command left in the output folder, or
    `--resume`, or "".

    Raises:
        ValueError: the output folder holds another run than the one that `--resume` names, or there is nothing to
            evaluate.
    """
    own = Path(args.output_dir, checkpoint.LAST)
    there = bool(args.output_dir) and own.exists()
    if args.resume:
        named = fetch(args.resume)
        if args.eval or not there or own.resolve() == Path(named).resolve():
            return named
        before = checkpoint.load(own).get("args")
        if isinstance(before, dict) and before.get("resume") == args.resume:
            return str(own)
        if own.parent.resolve() != Path(named).parent.resolve():
            raise ValueError(f"{args.output_dir} holds another run than {args.resume}: choose another --output-dir")
        return named
    if there and args.auto_resume:
        return str(own)
    if args.eval and not args.throughput and not args.finetune:
        raise ValueError("--eval needs weights: --resume or --finetune names a checkpoint, or --output-dir a run")
    return ""


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


def restore(recipe: Recipe, args: argparse.Namespace, source: str, trainer: Trainer) -> Start:
    """Puts a checkpoint's state into the trainer.

    Raises:
        ValueError: the checkpoint does not fit, or the output folder holds a run with other settings.
    """
    content = checkpoint.load(source)
    ours = {"best", "processes", "position"} <= content.keys() and isinstance(content.get("args"), dict)
    notes = []
    if ours and not args.eval and Path(source) == Path(args.output_dir, checkpoint.LAST) and source != args.resume:
        check_settings(args, content, source, trainer.process.world_size)
        if content["processes"] != trainer.process.world_size:
            notes = [f"begun on {content['processes']} and continued on {trainer.process.world_size} processes, the "
                     "run does not end with the same bits"]  # fmt: skip
    checkpoint.load_weights(trainer.bare, source, recipe.adapt_weights, content=content)
    if trainer.ema is not None:
        averaged = isinstance(content.get("model_ema"), dict)
        if averaged or not args.eval:
            part = "model_ema" if averaged else "model"
            checkpoint.load_weights(trainer.ema.module, source, recipe.adapt_weights, part=part, content=content)
        else:
            trainer.ema = None
        if not averaged:
            notes.append(f"{source} has no average of the weights" + ("" if args.eval else ": it starts from these"))
    if args.eval:
        return Start(0, notes=[f"evaluating {source}", *notes])
    if not ours:
        epoch = content["epoch"] + 1 if isinstance(content.get("epoch"), int) else args.start_epoch
        return Start(epoch, notes=[f"{source} is not of this trainer: its weights are used from epoch {epoch} on, "
                                   "with a fresh optimizer", *notes])  # fmt: skip
    settings = [{name: group[name] for name in OPTIMIZER_SETTINGS & group.keys()}
                for group in trainer.optimizer.param_groups]  # fmt: skip
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty where the run so far was not in float16
            trainer.scaler.load_state_dict(content["scaler"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: its optimizer state does not fit --opt {args.opt} ({error})") from error
    for group, given in zip(trainer.optimizer.param_groups, settings):
        group.update(given)  # a state dict brings the settings of its run too
    if not isinstance(content["epoch"], int) or not isinstance(content["best"], dict):
        raise ValueError(f"{source}: the file is damaged")
    start = Start(content["epoch"] + 1, content["best"])
    where = f"epoch {start.epoch + 1}"
    if content["position"] is not None:
        start.position = Position(**content["position"])
        if content["processes"] == trainer.process.world_size:
            start.own = content["own"][trainer.process.rank]
            start.position.window = start.own["window"]
        where += f", after step {start.position.update},"
    start.notes = [f"continuing at {where} from {source}", *notes]
    return start


def check_settings(args: argparse.Namespace, content: dict[str, Any], source: str, processes: int) -> None:
    """Compares the settings with those of the run in the output folder. The number of processes may differ where the
    batch of all of them together does not.

    Raises:
        ValueError: they would make another run of it.
    """
    before = content["args"]
    batches = [
        a["batch_size"] * a["accum_iter"] * n for a, n in ((before, content["processes"]), (vars(args), processes))
    ]
    may_change = MAY_CHANGE | ({"batch_size", "accum_iter"} if batches[0] == batches[1] else set())
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
