"""One epoch of training as an iterator over optimizer steps, and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from timm.utils import accuracy
from torch import Tensor, nn

from common.class_report import ClassReport
from common.data.bad_samples import NO_IMAGE, UNREADABLE_SHARE, BadSampleCounter, check_replaced
from common.distributed import Process, all_min, all_sum
from common.errors import StopTraining
from common.progress import EpochProgress
from common.trainer import Trainer, autocast, check_labels

# images (B, 3, H, W) or what is augmented on the device, labels (B,) or NO_IMAGE, unreadable images with the reason
Batch = tuple[Any, Tensor, list[tuple[str, str]]]
NO_BAD_STEP = 2.0**52  # a step that no run reaches, and exact in float64


@dataclass(frozen=True)
class Report:
    """Means over all ranks of the steps since the last report."""

    step: int  # optimizer steps done in this epoch
    steps: int  # optimizer steps of an epoch
    loss: float  # of the main model
    sub_loss: float | None  # of the sub-model
    lr: float  # of the last step, the largest of all parameter groups
    images_per_second: float
    images: int


@dataclass(frozen=True)
class Step:
    """A finished optimizer step."""

    number: int  # in the epoch, counted from 1
    last: bool  # of the epoch
    report: Report | None  # where one was due: after the same steps on all ranks


class LossMeter:
    """Sums of losses and learning rates over an epoch; those since the last report stay on the device.

    Args:
        trainer: says how many losses a step has, and the device.
        epoch: counted from 0.
        steps: optimizer steps of an epoch.
        progress: where an earlier start stopped in this epoch.
    """

    def __init__(self, trainer: Trainer, epoch: int, steps: int, progress: EpochProgress | None = None):
        progress = progress or EpochProgress(totals=[0.0] * (1 + trainer.passes))
        self.device, self.passes = trainer.process.device, trainer.passes
        self.epoch, self.steps = epoch, steps
        self.step, self.lr_sum = progress.step, progress.lr_sum
        self.totals = torch.tensor(progress.totals, dtype=torch.float64)  # images, losses x images; of all ranks
        self._clear_interval()
        if progress.interval_totals:
            self.interval_images = int(progress.interval_totals[0])
            self.interval_sums = torch.tensor(progress.interval_totals[1:], dtype=torch.float64, device=self.device)

    def _clear_interval(self) -> None:
        self.interval_images = 0
        self.interval_sums = torch.zeros(self.passes, dtype=torch.float64, device=self.device)
        self.first_bad_step = torch.full((), NO_BAD_STEP, dtype=torch.float64, device=self.device)

    def add(self, losses: list[Tensor], images: int) -> None:
        """Add the losses of a micro-batch of the step in progress, without waiting for the device."""
        values = torch.stack(losses).double()
        self.interval_images += images
        self.interval_sums += values * images
        bad_step = torch.where(values.isfinite().all(), NO_BAD_STEP, float(self.step + 1))
        self.first_bad_step = torch.minimum(self.first_bad_step, bad_step.double())

    def end_step(self, lr: float) -> None:
        self.step += 1
        self.lr_sum += lr

    def check_finite(self) -> None:
        """Raise StopTraining on all ranks if a loss on any of them was not finite."""
        first_bad_step = all_min(self.first_bad_step).item()
        if first_bad_step < NO_BAD_STEP:
            raise StopTraining(
                f"the loss was not finite at step {int(first_bad_step)} of {self.steps} in epoch {self.epoch + 1}"
            )

    def reduce_interval(self) -> Tensor:
        """Sum the interval over all ranks: (1 + passes,) on the host, images and losses x images; begin the next one.

        Raises:
            StopTraining: on all ranks, where a loss was not finite.
        """
        self.check_finite()
        images = torch.tensor([self.interval_images], dtype=torch.float64, device=self.device)
        sums = all_sum(torch.cat([images, self.interval_sums])).cpu()
        self._clear_interval()
        self.totals += sums
        return sums

    def progress(self) -> EpochProgress:
        """Where the epoch stands, for a checkpoint; to be called on all ranks after the same step.

        Raises:
            StopTraining: on all ranks, where a loss was not finite.
        """
        self.check_finite()
        interval = [float(self.interval_images), *self.interval_sums.tolist()]
        return EpochProgress(self.step, self.lr_sum, self.totals.tolist(), interval)

    def means(self) -> dict[str, float]:
        """Means over the epoch and all ranks: "lr", "loss" of the main model and, with AugSub, "sub_loss"."""
        images, *losses = self.totals.tolist()
        means = {name: value / images for name, value in zip(("loss", "sub_loss"), losses)}
        return {"lr": self.lr_sum / self.steps} | means


def train_epoch(
    trainer: Trainer,
    loader: Iterable[Batch],
    batches: int,
    meter: LossMeter,
    bad_samples: BadSampleCounter,
    report_every: int,
) -> Iterator[Step]:
    """Train for one epoch, and yield after each optimizer step.

    The host waits for the device, and the ranks for each other, only where a report is due.

    Args:
        loader: batches on the host, from where `meter` stands.
        batches: how many of them make the epoch; the same on every rank.
        meter: keeps the sums of the epoch.
        bad_samples: counts the images that could not be read.
        report_every: optimizer steps between reports; the last step of an epoch has one too.

    Raises:
        StopTraining: on all ranks within one interval, where a loss on any of them was not finite, or too many images
            were unreadable; on this rank, where a label or the data is to blame.
    """
    trainer.raw_model.train(trainer.train_mode)
    accum_steps, steps = trainer.accum_steps, meter.steps
    stream = islice(loader, batches - meter.step * accum_steps)
    interval_start, resumed_images = time.perf_counter(), meter.interval_images
    for micro_batches in _group(stream, accum_steps):
        trainer.start_update(meter.epoch * steps + meter.step)
        count = min(accum_steps, batches - meter.step * accum_steps)
        for number, (images, labels, unreadable) in enumerate(micro_batches, start=1):
            bad_samples.add(unreadable)
            check_replaced(labels, unreadable)
            losses = trainer.train_step(images, labels, count, last=number == count)
            meter.add(losses, len(labels))
        trainer.update()
        meter.end_step(trainer.lr)
        report = None
        if meter.step % report_every == 0 or meter.step == steps:
            images_seen, *sums = meter.reduce_interval().tolist()
            bad_samples.check(UNREADABLE_SHARE)
            now = time.perf_counter()
            report = Report(
                step=meter.step,
                steps=steps,
                loss=sums[0] / images_seen,
                sub_loss=sums[1] / images_seen if trainer.passes == 2 else None,
                lr=trainer.lr,
                images_per_second=(images_seen - resumed_images) / (now - interval_start),
                images=int(images_seen),
            )
            interval_start, resumed_images = now, 0
        yield Step(meter.step, meter.step == steps, report)
    if meter.step != steps:
        raise StopTraining(f"the data ended after {meter.step} of {steps} steps of epoch {meter.epoch + 1}")


def _group(stream: Iterator[Any], size: int) -> Iterator[Iterator[Any]]:
    """Groups of `size` items, drawn as they are asked for: the next batch is not waited for before it is used."""
    for first in stream:
        yield _chain(first, islice(stream, size - 1))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    process: Process,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    bad_samples: BadSampleCounter | None = None,
    class_report: ClassReport | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in % and cross-entropy over the images of all ranks' loaders.

    Args:
        model: neither compiled nor in DDP.
        loader: this rank's share, batches on the host; unreadable images are not counted.
        dtype: of autocast.
        bad_samples: counts the unreadable ones.
        class_report: keeps labels and predictions.

    Returns:
        "acc1", "acc5", "loss", "images" (how many were counted).

    Raises:
        StopTraining: no image could be read, or a label is out of range.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    for images, host_labels, unreadable in loader:
        if unreadable:
            images, host_labels = images[host_labels != NO_IMAGE], host_labels[host_labels != NO_IMAGE]
            if bad_samples is not None:
                bad_samples.add(unreadable)
        if not len(images):
            continue
        images = images.to(process.device, non_blocking=True, memory_format=memory_format)
        labels = host_labels.to(process.device, non_blocking=True)
        with autocast(process.device, dtype):
            logits = model(images).float()
        check_labels(host_labels, logits.shape[1])
        shares = torch.stack(accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))).double() / 100
        sums[:2] += (shares * len(labels)).round()  # timm's float32 shares, as whole images again
        sums[2] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums[3] += len(labels)
        if class_report is not None:
            class_report.add(labels, logits)
    if bad_samples is not None:
        bad_samples.check()
    top1, top5, loss, images_counted = all_sum(sums).tolist()
    if not images_counted:
        raise StopTraining("no evaluation image could be read")
    return {
        "acc1": 100 * top1 / images_counted,
        "acc5": 100 * top5 / images_counted,
        "loss": loss / images_counted,
        "images": images_counted,
    }
