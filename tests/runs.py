"""Small runs of the DeiT recipe in this process, and readers of their results."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import train
from common.args import parse
from common.checkpoint import io as files
from common.cli import run
from common.distributed import Process
from common.engine import LossMeter, Report, train_epoch
from common.recipe import Recipe
from common.run import Run, build_run
from common.trainer import Trainer
from deit.recipe import RECIPE
from tests.compare_runs import diff_nested
from tests.sample_data import make_shards

FLAGS = ["--model", "deit_pico_patch8_LS", "--input-size", "32", "--num-workers", "0", "--batch-size", "8", "--epochs",
         "2", "--warmup-epochs", "0", "--amp", "off", "--reprob", "0", "--aa", "none", "--no-repeated-aug",
         "--model-ema-decay", "0.5", "--log-interval", "2", "--lr", "1e-2"]  # fmt: skip
# every place at which a run draws at random
RANDOM = ["--augsub", "masking", "--drop-path", "0.2", "--drop", "0.1", "--reprob", "0.3", "--aa",
          "rand-m9-mstd0.5-inc1", "--mixup", "0.8", "--cutmix", "1.0"]  # fmt: skip
ONE_PROCESS = Process(torch.device("cpu"))


def start(*flags: str) -> None:
    """Run the recipe in this process."""
    run(RECIPE, [*FLAGS, *flags])


def build(*flags: str, recipe: Recipe = RECIPE) -> Run:
    """A run with exactly these flags, built in this process and not started."""
    return build_run(recipe, parse(recipe, flags), ONE_PROCESS)


def train_for(run: Run, batches: int | None = None, report_every: int = 1) -> tuple[dict[str, float], list[Report]]:
    """The first batches of epoch 0 → its means and its reports."""
    batches = run.batches if batches is None else batches
    assert run.train_loader is not None
    meter = LossMeter(run.trainer, 0, math.ceil(batches / run.trainer.accum_steps))
    steps = train_epoch(run.trainer, run.train_loader, batches, meter, run.bad_train_samples, report_every)
    reports = [step.report for step in steps if step.report is not None]
    return meter.means(), reports


def run_refused(capsys, *flags: str, status: int = 2) -> str:
    """Start a run that must end with this status → its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        start(*flags)
    assert leaving.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def load_checkpoint(folder: Path, name: str = "checkpoint.pth") -> dict:
    """The content of a run's last checkpoint."""
    return files.load(folder / name)


def assert_same_bits(some: Path, other: Path, name: str = "checkpoint.pth") -> None:
    """Two runs' checkpoints and logs are equal, but for the settings that may differ."""
    a, b = load_checkpoint(some, name), load_checkpoint(other, name)
    assert a.pop("args").keys() == b.pop("args").keys()
    assert a["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    assert not diff_nested(a, b)
    assert log_entries(some) == log_entries(other)


def log_entries(folder: Path) -> list[dict]:
    """The lines of a run's log.txt."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def interrupt_epoch(monkeypatch, number: int) -> None:
    """Raise KeyboardInterrupt at the end of the epoch of that number, counted from 0, and of no other."""
    train_epoch = train.train_epoch

    def interrupted(trainer, loader, batches, meter, *rest):
        yield from train_epoch(trainer, loader, batches, meter, *rest)
        if meter.epoch == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupted)


def stop_after(monkeypatch, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a real signal during the optimizer step of that number, counted from 1 over the start."""
    update, done = Trainer.update, []

    def signalled(trainer):
        update(trainer)
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "update", signalled)


def read_scalars(folder: Path) -> EventAccumulator:
    """A run's TensorBoard curves."""
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def shard_flags(folder: Path, **kwargs: Any) -> list[str]:
    """Write shards → the flags to train on them."""
    return [*make_shards(folder, **kwargs), "--nb-classes", "24", "--batch-size", "4", *RANDOM]
