"""Runs of the DeiT entry point, small enough for tests, and what to look at in them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import files, train
from common.dist import Process
from common.engine import Trainer
from common.run import run
from deit.recipe import RECIPE
from scripts.soak import differences

FLAGS = ["--model", "deit_pico_patch8_LS", "--input-size", "32", "--num-workers", "0", "--batch-size", "8", "--epochs",
         "2", "--warmup-epochs", "0", "--amp", "off", "--reprob", "0", "--aa", "none", "--no-repeated-aug",
         "--model-ema-decay", "0.5", "--log-interval", "2", "--lr", "1e-2"]  # fmt: skip
# every place at which a run draws at random
RANDOM = ["--augsub", "masking", "--drop-path", "0.2", "--drop", "0.1", "--reprob", "0.3", "--aa",
          "rand-m9-mstd0.5-inc1", "--mixup", "0.8", "--cutmix", "1.0"]  # fmt: skip
ALONE = Process(torch.device("cpu"))


def start(*flags: str) -> None:
    """Runs the recipe in this process."""
    run(RECIPE, [*FLAGS, *flags])


def refused(capsys, *flags: str, status: int = 2) -> str:
    """The one sentence of a run that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        start(*flags)
    assert leaving.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def final(folder: Path, name: str = "checkpoint.pth") -> dict:
    return files.load(folder / name)


def assert_same_bits(some: Path, other: Path, name: str = "checkpoint.pth") -> None:
    """Two runs' checkpoints and logs are equal, but for the settings that may differ."""
    a, b = final(some, name), final(other, name)
    assert a.pop("args").keys() == b.pop("args").keys()
    assert a["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    assert not differences(a, b)
    assert log_of(some) == log_of(other)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def interrupt_epoch(monkeypatch, number: int) -> None:
    """A Ctrl-C at the end of the epoch of that number, counted from 0, and of no other."""
    plain = train.train_one_epoch

    def interrupted(trainer, loader, batches, epoch, *rest):
        means = plain(trainer, loader, batches, epoch, *rest)
        if epoch == number:
            raise KeyboardInterrupt
        return means

    monkeypatch.setattr(train, "train_one_epoch", interrupted)


def stop_after(monkeypatch, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
    """This process gets a real signal during the update of that number, counted from 1 over the start."""
    update, done = Trainer.update, []

    def signalled(trainer):
        update(trainer)
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "update", signalled)


def curves_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()
