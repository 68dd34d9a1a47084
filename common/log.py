"""What a run says: a bar on a terminal, plain lines elsewhere, log.txt in JSON lines, TensorBoard scalars."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.engine import Report
from common.errors import StopTraining
from common.folder import CURVES, LOG, SUMMARY, duration, entries, replacing


class Log:
    """The voice of a run. Only the main process has one that speaks; the others' `speaks` is False.

    Args:
        folder: output folder for log.txt and TensorBoard's curves; None writes no files.
        speaks: whether to print and write at all.
        start_epoch: first epoch of this start; lines and curves of it and later ones, left from a run that was
            cut off in the middle, are taken out.
        start_update: updates of that epoch done before this start, whose curves stay.
        updates: optimizer steps in an epoch.
        epochs: epochs of the run.
        curve_steps: points of an epoch on the axis of TensorBoard's curves; None counts optimizer steps.
        curves: folder for TensorBoard's curves, where it is not one in `folder`.
        held: a lock on the folder, to give back in the end.
        past: the lines of log.txt before this start; None takes the file's own.

    Raises:
        OSError: the files cannot be begun.
        StopTraining: in every later method, where one cannot be written, as on a full disk.
    """

    def __init__(self, folder: Path | None, speaks: bool, start_epoch: int, updates: int, epochs: int,
                 curve_steps: int | None = None, curves: str | None = None, start_update: int = 0,
                 held: IO[bytes] | None = None, past: list[dict[str, Any]] | None = None):  # fmt: skip
        self.held = held
        self.curve_steps = curve_steps or updates
        self.folder, self.speaks, self.updates, self.epochs = folder, speaks, updates, epochs
        self.start = start_epoch * updates + start_update
        self.bar: tqdm | None = None
        self.curves: SummaryWriter | None = None
        self.began = time.time()
        self.entries: list[dict[str, Any]] = []
        if speaks and folder is not None:
            before = entries(folder) if past is None else past
            self.entries = [entry for entry in before if entry["epoch"] < start_epoch]
            if self.entries or (folder / LOG).exists():
                with replacing(folder / LOG) as file:
                    file.write("".join(json.dumps(entry) + "\n" for entry in self.entries).encode())
            purge = self.step(start_epoch, start_update) + 1  # what was done ends at the step itself
            threading.excepthook = _quiet_writer
            self.curves = SummaryWriter(curves or str(folder / CURVES), purge_step=purge)
            self.curves.flush()

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def epoch(self, epoch: int, update: int = 0) -> None:
        """Opens the bar of an epoch, of which some updates may be done."""
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.updates,
                initial=update,
                desc=f"epoch {epoch + 1}/{self.epochs}",
                bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}",
                dynamic_ncols=True,
                leave=False,
            )

    def tick(self) -> None:
        """Moves the bar by one update."""
        if self.bar is not None:
            self.bar.update()

    def report(self, epoch: int, report: Report) -> None:
        """Shows and records one report of the training loop."""
        if not self.speaks:
            return
        sub = "" if report.sub_loss is None else f"  sub {report.sub_loss:.4f}"
        figures = f"loss {report.loss:.4f}{sub}  lr {report.lr:.1e}  {report.images_per_second:.0f} img/s"
        done = epoch * self.updates + report.update - self.start
        left = self.epochs * self.updates - self.start - done
        figures += f"  left {duration((time.time() - self.began) / done * left)}"
        if self.bar is not None:
            self.bar.set_postfix_str(figures)
        else:
            self.line(f"epoch {epoch + 1}/{self.epochs}  step {report.update}/{report.updates}  {figures}")
        step = self.step(epoch, report.update)
        self.scalars({"train/loss": report.loss, "train/sub_loss": report.sub_loss, "train/lr": report.lr,
                      "speed/images_per_second": report.images_per_second}, step)  # fmt: skip

    def end_epoch(self) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def step(self, epoch: int, update: int) -> int:
        """Where an epoch's update, counted from 1, lies on the curves' axis."""
        return epoch * self.curve_steps + update * self.curve_steps // self.updates

    def scalars(self, values: dict[str, float | None], step: int) -> None:
        """Adds points to TensorBoard's curves; a step is an optimizer step."""
        if self.curves is not None:
            with self.writing(CURVES):
                for name, value in values.items():
                    if value is not None:
                        self.curves.add_scalar(name, value, step)

    def record(self, entry: dict[str, Any]) -> None:
        """Adds a line to log.txt."""
        self.entries.append(entry)
        if self.speaks and self.folder is not None:
            with self.writing(LOG), open(self.folder / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")
        self.flush()

    def accuracy(self) -> dict[int, float]:
        """Top-1 accuracy of each epoch so far, in %."""
        return {entry["epoch"]: entry["test_acc1"] for entry in self.entries}

    def flush(self) -> None:
        """Sees to it that the points so far outlive this process."""
        if self.curves is not None:
            with self.writing(CURVES):
                self.curves.flush()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Makes the failure to write a file a reason to stop."""
        try:
            yield
        except OSError as error:
            raise StopTraining(f"{name} in {self.folder} could not be written ({error.strerror or error})") from error

    def summary(self) -> None:
        """Writes what log.txt holds as summary.csv, with the columns of timm's train script."""
        if not (self.speaks and self.folder is not None):
            return
        names = {"epoch": "epoch", "train_loss": "train_loss", "eval_loss": "test_loss", "eval_top1": "test_acc1",
                 "eval_top5": "test_acc5", "lr": "train_lr"}  # fmt: skip
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(names)
        table.writerows([entry[name] for name in names.values()] for entry in self.entries)
        with self.writing(SUMMARY), replacing(self.folder / SUMMARY) as file:
            file.write(text.getvalue().encode())

    def close(self) -> None:
        """Ends the bar and the curves' file."""
        self.end_epoch()
        if self.curves is not None:
            with contextlib.suppress(OSError):  # of a full disk the run has told, or nothing is lost that it needs
                self.curves.close()
        if self.held is not None:
            self.held.close()


def _quiet_writer(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread hands an error on to the next call; a traceback of its own is one too many."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
