"""Console, log.txt and TensorBoard output of a run; active on rank 0 only."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.engine import Report
from common.errors import StopTraining
from common.run_dir import CURVES, LOG, SUMMARY, atomic_write, duration, read_log


class Bar(tqdm):
    """A progress bar with figures behind it; tqdm's own `postfix` would begin with a comma."""

    figures = ""

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """What `bar_format` may name."""
        return {**super().format_dict, "figures": self.figures}

    def show(self, figures: str) -> None:
        """Replace the figures."""
        self.figures = figures
        self.refresh()


class Console:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.bar: Bar | None = None

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def open_bar(self, title: str, total: int, initial: int) -> None:
        if self.enabled and sys.stderr.isatty():
            bar_format = "{desc} {percentage:3.0f}%|{bar}| {figures}"
            self.bar = Bar(
                desc=title, total=total, initial=initial, bar_format=bar_format, dynamic_ncols=True, leave=False
            )

    def advance_bar(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLog:
    """log.txt, one JSON object a line and epoch, and summary.csv made of it.

    Args:
        folder: output folder; None keeps the entries in memory alone.
        history: entries of earlier starts; None takes those in the file.
        start_epoch: entries of it and later ones, of a start that was cut off, are removed.

    Raises:
        OSError: log.txt cannot be written.
    """

    def __init__(self, folder: Path | None, history: list[dict[str, Any]] | None, start_epoch: int):
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        if folder is None:
            return
        earlier = read_log(folder) if history is None else history
        self.entries = [entry for entry in earlier if entry["epoch"] < start_epoch]
        if self.entries or (folder / LOG).exists():
            with atomic_write(folder / LOG) as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in self.entries).encode())

    def append(self, entry: dict[str, Any]) -> None:
        """Add an epoch's entry."""
        self.entries.append(entry)
        if self.folder is not None:
            with stop_if_unwritable(self.folder / LOG), open(self.folder / LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def accuracy_by_epoch(self) -> dict[int, float]:
        """Top-1 accuracy of each epoch so far, in %."""
        return {entry["epoch"]: entry["test_acc1"] for entry in self.entries}

    def write_summary(self) -> None:
        """Write summary.csv, with the columns of timm's train script."""
        if self.folder is None:
            return
        columns = {
            "epoch": "epoch",
            "train_loss": "train_loss",
            "eval_loss": "test_loss",
            "eval_top1": "test_acc1",
            "eval_top5": "test_acc5",
            "lr": "train_lr",
        }
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(columns)
        table.writerows([entry[key] for key in columns.values()] for entry in self.entries)
        with stop_if_unwritable(self.folder / SUMMARY), atomic_write(self.folder / SUMMARY) as file:
            file.write(text.getvalue().encode())


class TensorBoard:
    """TensorBoard's event files.

    Args:
        folder: of the event files; None writes nothing.
        purge_step: points at and after it, of a start that was cut off, are removed.
    """

    def __init__(self, folder: Path | None, purge_step: int):
        self.folder = folder
        self.writer: SummaryWriter | None = None
        if folder is not None:
            threading.excepthook = _ignore_tensorboard_thread
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)
            self.writer.flush()

    def add_scalars(self, values: dict[str, float | None], step: int) -> None:
        if self.writer is not None and self.folder is not None:
            with stop_if_unwritable(self.folder):
                for tag, value in values.items():
                    if value is not None:
                        self.writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Make the points so far outlive this process."""
        if self.writer is not None and self.folder is not None:
            with stop_if_unwritable(self.folder):
                self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # a full disk was reported before, or nothing is lost that the run needs
                self.writer.close()


class Logger:
    """What a run prints and writes while it trains.

    Args:
        folder: output folder for log.txt and TensorBoard's event files; None writes no files.
        enabled: whether this is rank 0; other ranks print and write nothing.
        epochs: epochs of the run.
        steps_per_epoch: optimizer steps.
        start_epoch, start_step: where this start begins; what an earlier start logged after it is removed.
        curve_steps: points of an epoch on TensorBoard's axis; None counts optimizer steps.
        tensorboard_dir: where it is not `folder`/tensorboard.
        history: log.txt's entries before this start; None takes the file's.

    Raises:
        OSError: the files cannot be created.
        StopTraining: in every later method, where one cannot be written, as on a full disk.
    """

    def __init__(
        self,
        folder: Path | None,
        enabled: bool,
        epochs: int,
        steps_per_epoch: int,
        start_epoch: int = 0,
        start_step: int = 0,
        curve_steps: int | None = None,
        tensorboard_dir: str | None = None,
        history: list[dict[str, Any]] | None = None,
    ):
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.curve_steps = curve_steps or steps_per_epoch
        self.enabled, self.start_time = enabled, time.time()
        self.steps_before_start = start_epoch * steps_per_epoch + start_step
        written = folder if enabled else None
        self.console = Console(enabled)
        self.json_log = JsonLog(written, history, start_epoch)
        event_folder = Path(tensorboard_dir or written / CURVES) if written is not None else None
        if event_folder is not None and not is_utf8(event_folder):
            self.print(f"{event_folder}: no TensorBoard curves; they need a name in UTF-8")
            event_folder = None
        # the last point of what is kept lies at the step itself
        self.tensorboard = TensorBoard(event_folder, purge_step=self.axis_step(start_epoch, start_step) + 1)

    def print(self, text: str) -> None:
        self.console.print(text)

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Open the progress bar of an epoch, of which some steps may be done."""
        self.console.open_bar(f"epoch {epoch + 1}/{self.epochs}", self.steps_per_epoch, step)

    def step(self) -> None:
        """Move the progress bar by one step."""
        self.console.advance_bar()

    def report(self, epoch: int, report: Report) -> None:
        """Show and record the means of the last interval."""
        if not self.enabled:
            return
        sub_loss = "" if report.sub_loss is None else f"  sub {report.sub_loss:.4f}"
        done = epoch * self.steps_per_epoch + report.step - self.steps_before_start
        left = self.epochs * self.steps_per_epoch - self.steps_before_start - done
        seconds_left = (time.time() - self.start_time) / done * left
        text = (
            f"loss {report.loss:.4f}{sub_loss}  lr {report.lr:.1e}  {report.images_per_second:.0f} img/s  "
            f"left {duration(seconds_left)}"
        )
        if self.console.bar is not None:
            self.console.bar.show(text)
        else:
            self.print(f"epoch {epoch + 1}/{self.epochs}  step {report.step}/{report.steps}  {text}")
        scalars = {
            "train/loss": report.loss,
            "train/sub_loss": report.sub_loss,
            "train/lr": report.lr,
            "speed/images_per_second": report.images_per_second,
        }
        self.tensorboard.add_scalars(scalars, self.axis_step(epoch, report.step))

    def end_epoch(self) -> None:
        self.console.close_bar()

    def flush(self) -> None:
        """Make what was recorded so far outlive this process."""
        self.tensorboard.flush()

    def epoch(self, epoch: int, train: dict[str, float], test: dict[str, float], parameters: int) -> None:
        """Record the means of an epoch's training and the results of the evaluation after it."""
        entry = {f"train_{name}": value for name, value in train.items()}
        entry |= {f"test_{name}": value for name, value in test.items()}
        self.json_log.append(entry | {"epoch": epoch, "n_parameters": parameters})
        scalars: dict[str, float | None] = {f"test/{name}": value for name, value in test.items()}
        self.tensorboard.add_scalars(scalars, self.axis_step(epoch, self.steps_per_epoch))
        self.tensorboard.flush()

    def axis_step(self, epoch: int, step: int) -> int:
        """Where an epoch's step, counted from 1, lies on TensorBoard's axis."""
        return epoch * self.curve_steps + step * self.curve_steps // self.steps_per_epoch

    def close(self) -> None:
        self.console.close_bar()
        self.tensorboard.close()


def is_utf8(path: Path) -> bool:
    """Whether TensorBoard, which encodes names as UTF-8, can open the path."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def stop_if_unwritable(path: Path) -> Iterator[None]:
    """Turn the failure to write a file into StopTraining."""
    try:
        yield
    except OSError as error:
        raise StopTraining(f"{path}: could not be written ({error.strerror or error})") from error


def _ignore_tensorboard_thread(args: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writing thread, whose error is raised again in the next call."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
