"""What a checkpoint stores of a run: collected here, restored by resume.py."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from common import rng
from common.distributed import Process
from common.progress import EpochProgress


class Restorable(Protocol):
    """What a checkpoint stores of a trainer, and is restored into."""

    raw_model: nn.Module  # neither compiled nor in DDP
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    process: Process


@dataclass(frozen=True)
class RunIdentity:
    """What makes two starts the same run, so that one may continue the other's checkpoint.

    Args:
        settings: value of each flag.
        may_change: flags that may differ.
        steps_per_epoch: optimizer steps.
        passes: losses per step: 1, or 2 with a sub-model.
        class_names: in the order of the labels; None where the data set does not say.
        preprocessing: the fields of `Preprocessing`.
    """

    settings: dict[str, Any]
    may_change: Set[str]
    steps_per_epoch: int
    passes: int
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)


def checkpoint_state(
    trainer: Restorable,
    run: RunIdentity,
    epoch: int,
    best: dict[str, float],
    log: list[dict[str, Any]],
    progress: EpochProgress | None = None,
    rank_states: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Collect what `restore` reads; tensors and list are not copied.

    Args:
        epoch: the last one that is complete; `progress` is in the next one.
        log: lines of log.txt so far.
        progress, rank_states: in the middle of an epoch; the `rank_state` of all ranks.
    """
    return trainer_state(trainer) | {
        "epoch": epoch,
        "best": best,
        "args": as_json(run.settings),
        "class_names": run.class_names,
        "preprocessing": as_json(run.preprocessing),
        "processes": trainer.process.world_size,
        "updates": run.steps_per_epoch,
        "log": log,
        # interval totals differ from rank to rank: `rank_states` have them
        "position": replace(progress, interval_totals=[]).to_dict() if progress is not None else None,
        "own": rank_states,
    }


def trainer_state(trainer: Restorable) -> dict[str, Any]:
    """Collect what training changes: weights, EMA, optimizer and scaler; not copied."""
    return {
        "model": trainer.raw_model.state_dict(),
        "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
    }


def rank_state(trainer: Restorable, progress: EpochProgress) -> dict[str, Any]:
    """Collect what differs between ranks in the middle of an epoch: random generators, batch statistics, loss sums."""
    averaged = trainer.ema.module if trainer.ema is not None else None
    several = trainer.process.world_size > 1  # one rank's buffers are in the state dicts
    return {
        "random": rng.get_rng_state(),
        "buffers": buffers_on_cpu(trainer.raw_model) if several else {},
        "ema_buffers": buffers_on_cpu(averaged) if several and averaged is not None else {},
        "window": progress.interval_totals,
    }


def buffers_on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}


def load_rank_state(trainer: Restorable, state: dict[str, Any]) -> None:
    """Restore what `rank_state` collected, but for the loss sums, which `EpochProgress` has."""
    load_buffers(trainer.raw_model, state["buffers"])
    if trainer.ema is not None:
        load_buffers(trainer.ema.module, state.get("ema_buffers", {}))  # absent in files of earlier versions
    rng.set_rng_state(state["random"])


def load_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Overwrite buffers by name."""
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)


def as_json(value: Any) -> Any:
    """Convert settings to what JSON has, so that a saved one equals a parsed one."""
    return json.loads(json.dumps(value))
