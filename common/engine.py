"""One epoch of training, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn

from common.augsub import AugSub, Criterion
from common.device_augment import DeviceAugment
from common.dist import Process, all_min, all_sum, all_union, any_of
from common.errors import StopTraining
from common.loader import NONE, UNREADABLE_SHARE
from common.recipe import SetLR

# images (B, 3, H, W), labels (B,) or NONE, names of unreadable images
Batch = tuple[Any, Tensor, list[str]]
UNREADABLE_THEN = {"training": "another takes its place", "evaluation": "it is not counted"}
NEVER = 2.0**52  # a step no run reaches, and exact in float64


@dataclass
class Position:
    """Where in an epoch training stands, between two updates."""

    update: int = 0  # updates done
    rates: float = 0.0  # sum of their learning rates
    total: list[float] = field(default_factory=list)  # images and losses, summed up to the last report
    window: list[float] = field(default_factory=list)  # and those since, of this process alone


class Interrupted(Exception):
    """Training was asked to stop, and did between two updates."""

    def __init__(self, position: Position):
        super().__init__()
        self.position = position


@dataclass
class Trainer:
    """What a step of training needs.

    Args:
        model: as it is called, compiled or in DDP; `bare` is the module inside.
        augsub: made from the bare model.
        set_lr: sets the learning rates for an update, counted from 0 over the whole run.
        classes: of the model; labels must be below.
        autocast: dtype of autocast, or None for float32.
        accumulate: micro-batches per update. The last update of an epoch may have fewer.
        train_mode: whether drops and batch statistics act in the main pass.
        joint: whether both passes share one backward, which holds the graphs of both.
        augment: what is done to the loader's images on the device, where they come as `Raw`.
    """

    process: Process
    model: nn.Module
    bare: nn.Module
    augsub: AugSub
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    set_lr: SetLR
    scaler: torch.amp.GradScaler
    classes: int
    autocast: torch.dtype | None = None
    ema: ModelEmaV3 | None = None
    mixup: Mixup | None = None
    clip_grad: float | None = None
    accumulate: int = 1
    memory_format: torch.memory_format = torch.contiguous_format
    train_mode: bool = True
    joint: bool = False
    augment: DeviceAugment | None = None
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.bare.parameters() if p.requires_grad]

    def batch(self, images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device, augmented and mixed; its labels are looked at while they are on the host."""
        check_labels(labels, self.classes)
        device = self.process.device
        if self.augment is not None:
            images = self.augment(images)
        images = images.to(device, non_blocking=True, memory_format=self.memory_format)
        labels = labels.to(device, non_blocking=True)
        return self.mixup(images, labels) if self.mixup else (images, labels)

    def micro_step(self, images: Any, labels: Tensor, parts: int, last: bool) -> list[Tensor]:
        """Adds the gradients of one of `parts` micro-batches → the losses, unscaled: main and, with AugSub, sub."""
        x, y = self.batch(images, labels)
        losses: list[Tensor] = []
        with autocast(self.process.device, self.autocast):
            passes = self.augsub.losses(self.model, x, y, self.criterion, sync=last)
            for group in [list(passes)] if self.joint else ([loss] for loss in passes):
                with torch.autocast(self.process.device.type, enabled=False):
                    self.scaler.scale(torch.stack(group).sum() / parts).backward()
                losses += [loss.detach() / self.augsub.weight for loss in group]
        return losses

    def update(self) -> None:
        """One optimizer step, from the gradients that have come together."""
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.bare)


@dataclass
class Report:
    """What the steps since the last report came to, over all processes."""

    update: int  # updates done in this epoch
    updates: int  # updates in an epoch
    loss: float  # mean loss of the main model
    sub_loss: float | None  # mean loss of the sub-model
    lr: float  # of the last update, the largest of all groups
    images_per_second: float
    seen: int  # images since the last report


@dataclass
class Watch:
    """What is told of an epoch while it is trained, on every process.

    Args:
        interval: updates between reports.
        say: is handed each report.
        tick: is called after each update.
        asked: whether this process is asked to stop. A single one does after its update; several agree at a report.
        save_every: updates, counted over the whole run, between positions to save; 0 for none.
        save: is handed each of them.
    """

    interval: int
    say: Callable[[Report], None]
    tick: Callable[[], None] = lambda: None
    asked: Callable[[], bool] = lambda: False
    save_every: int = 0
    save: Callable[[Position], None] = lambda position: None


def train_one_epoch(
    trainer: Trainer,
    loader: Iterable[Batch],
    batches: int,
    epoch: int,
    watch: Watch,
    unreadable: Unreadable,
    begin: Position | None = None,
) -> dict[str, float]:
    """Trains for one epoch. The host waits for the device only at a report, at a position to save, and at the end.

    Args:
        trainer: model, optimizer and the rest.
        loader: batches on the host, from where `begin` stands.
        batches: how many of them make the epoch; the same on every process.
        epoch: counted from 0.
        watch: is told how it goes.
        unreadable: counts the images that could not be read.
        begin: where an earlier start was interrupted.

    Returns:
        means over the epoch and all processes: "lr", "loss" of the main model and, with AugSub, "sub_loss".

    Raises:
        StopTraining: on all processes within one interval, where a loss on any of them was not finite, or too many
            images were unreadable; on this process, where a label or the data is to blame.
        Interrupted: on all processes, after the same update.
    """
    trainer.bare.train(trainer.train_mode)
    updates = math.ceil(batches / trainer.accumulate)
    alone = trainer.process.world_size == 1
    passes = 1 if trainer.augsub.kind == "none" else 2
    window, total = _Losses(passes, trainer.process.device), torch.zeros(1 + passes, dtype=torch.float64)
    done, rates = 0, 0.0
    if begin is not None:
        done, rates, total = begin.update, begin.rates, torch.tensor(begin.total, dtype=torch.float64)
        if begin.window:
            window.load(begin.window)
    earlier, where = window.seen, f"of {updates} in epoch {epoch + 1}"
    start = time.perf_counter()
    stream = islice(loader, batches - done * trainer.accumulate)
    for chunk in _chunks(stream, trainer.accumulate):
        done += 1
        trainer.set_lr(epoch * updates + done - 1)
        parts = min(trainer.accumulate, batches - (done - 1) * trainer.accumulate)
        for part, (images, labels, bad) in enumerate(chunk, start=1):
            unreadable.add(bad)
            if (labels.numpy() == NONE).any():
                raise StopTraining(f"a hundred images drawn in place of {bad[-1]} could not be read either")
            window.add(trainer.micro_step(images, labels, parts, last=part == parts), len(labels), done)
        trainer.update()
        lr = max(group["lr"] for group in trainer.optimizer.param_groups)
        rates += lr
        watch.tick()
        if done % watch.interval == 0 or done == updates:
            sums = window.reduce(where)
            unreadable.check(UNREADABLE_SHARE)
            total += sums
            seen, *means = sums.tolist()
            now = time.perf_counter()
            watch.say(Report(done, updates, means[0] / seen, means[1] / seen if passes == 2 else None, lr,
                       (seen - earlier) / (now - start), int(seen)))  # fmt: skip
            start, earlier = now, 0
        agreed = any_of(watch.asked()) if alone or done % watch.interval == 0 else False
        due = watch.save_every and (epoch * updates + done) % watch.save_every == 0
        if (agreed or due) and done != updates:
            window.check(where)
            position = Position(done, rates, total.tolist(), window.dump())
            if agreed:
                raise Interrupted(position)
            watch.save(position)
    if done != updates:
        raise StopTraining(f"the data ended after {done} of {updates} steps of epoch {epoch + 1}")
    seen, *losses = total.tolist()
    return {"lr": rates / updates} | {name: value / seen for name, value in zip(("loss", "sub_loss"), losses)}


def _chunks(stream: Iterator[Any], size: int) -> Iterator[Iterator[Any]]:
    """Groups of `size` items, drawn as they are asked for: the next batch is not waited for before it is used."""
    for first in stream:
        yield _chain(first, islice(stream, size - 1))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


class _Losses:
    """Sums of losses that stay on the device until they are asked for."""

    def __init__(self, passes: int, device: torch.device):
        self.passes, self.device = passes, device
        self.clear()

    def clear(self) -> None:
        self.seen = 0
        self.sums = torch.zeros(self.passes, dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), NEVER, dtype=torch.float64, device=self.device)

    def add(self, losses: list[Tensor], images: int, update: int) -> None:
        values = torch.stack(losses).double()
        self.seen += images
        self.sums += values * images
        bad = torch.where(values.isfinite().all(), NEVER, float(update))
        self.first_bad = torch.minimum(self.first_bad, bad.double())

    def dump(self) -> list[float]:
        """Images seen and sums of losses of this process."""
        return [float(self.seen), *self.sums.tolist()]

    def load(self, state: list[float]) -> None:
        """Puts back what `dump` gave."""
        self.seen = int(state[0])
        self.sums = torch.tensor(state[1:], dtype=torch.float64, device=self.device)

    def check(self, where: str) -> None:
        """Raises StopTraining on all processes if a loss on any of them was not finite."""
        first_bad = all_min(self.first_bad).item()
        if first_bad < NEVER:
            raise StopTraining(f"the loss was not finite at step {int(first_bad)} {where}")

    def reduce(self, where: str) -> Tensor:
        """Images seen and sums of losses over all processes, (1 + passes,) on the host; starts anew.

        Raises:
            StopTraining: on all of them, where a loss was not finite.
        """
        self.check(where)
        seen = torch.tensor([self.seen], dtype=torch.float64, device=self.device)
        sums = all_sum(torch.cat([seen, self.sums])).cpu()
        self.clear()
        return sums


class Unreadable:
    """Counts the images that could not be read and names each once.

    Args:
        images: how many there are.
        kind: "training" or "evaluation".
        warn: is handed a line for each.
    """

    def __init__(self, images: int, kind: str, warn: Callable[[str], None]):
        self.images, self.kind, self.warn = images, kind, warn
        self.known: set[str] = set()
        self.new: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        self.new.update(names)

    def check(self, most: float = 1.0) -> None:
        """Joins what all processes found; above a share of `most` raises StopTraining on all of them."""
        found = all_union(self.new - self.known) - self.known
        self.new.clear()
        for name in sorted(found):
            self.warn(f"unreadable {self.kind} image, {UNREADABLE_THEN[self.kind]}: {name}")
        self.known |= found
        if len(self.known) > most * self.images:
            raise StopTraining(
                f"{len(self.known)} of {self.images} {self.kind} images could not be read, more than {100 * most:g} %"
            )


def check_labels(labels: Tensor, classes: int) -> None:
    """labels: (B,) on the host; raises StopTraining where one is not below `classes`."""
    if len(labels) and labels.numpy().max() >= classes:
        raise StopTraining(f"the data has the label {int(labels.max())}, beyond --nb-classes {classes}")


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Context of mixed precision in `dtype`, or of none."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    process: Process,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    unreadable: Unreadable | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in % and cross-entropy over the images of all processes' loaders.

    Args:
        model: the bare model.
        loader: this process's share, batches on the host; unreadable images count nowhere.
        unreadable: is told which those are.

    Returns:
        "acc1", "acc5", "loss", "images" (how many were counted).

    Raises:
        StopTraining: not one image could be read, or a label is beyond the model's classes.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    for images, labels, bad in loader:
        if bad:
            images, labels = images[labels != NONE], labels[labels != NONE]
            if unreadable is not None:
                unreadable.add(bad)
        if not len(images):
            continue
        on_host = labels
        images = images.to(process.device, non_blocking=True, memory_format=memory_format)
        labels = labels.to(process.device, non_blocking=True)
        with autocast(process.device, dtype):
            logits = model(images).float()
        check_labels(on_host, logits.shape[1])
        shares = torch.stack(accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))).double() / 100
        sums[:2] += (shares * len(labels)).round()  # whole images again
        sums[2] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums[3] += len(labels)
    if unreadable is not None:
        unreadable.check()
    top1, top5, loss, images = all_sum(sums).tolist()
    if not images:
        raise StopTraining("not one evaluation image could be read")
    return {"acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "loss": loss / images, "images": images}
