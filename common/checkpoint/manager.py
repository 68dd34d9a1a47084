"""A run's checkpoints and models: the newest, the previous ones, the best and the top k, written in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.checkpoint.hub_format import Export, write_folder
from common.checkpoint.io import write
from common.checkpoint.weights import move_mask_tokens
from common.errors import StopTraining
from common.run_dir import BEST, LAST, PREVIOUS, link_or_copy


class BackgroundWriter:
    """Runs one write at a time in a thread and raises its error in the thread that calls."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Start a write, when the one before has ended."""
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:  # re-raised in the main thread; otherwise a failed save would go unnoticed
                self.error = error

        # daemon: the interpreter does not wait for it when a second Ctrl-C ends the process
        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise what a write has failed with, once."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Wait for the write in progress; raises what it failed with."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def drain(self, seconds: float | None = None) -> None:
        """Wait for the write in progress, at most `seconds`; raises nothing."""
        if self.thread is not None:
            self.thread.join(seconds)


class CheckpointManager(BackgroundWriter):
    """Saves the states of one run, one at a time, while training continues.

    What a write fails with is raised in the thread that trains, at the next call but `drain`: StopTraining, where the
    disk or the weights are to blame.

    Args:
        folder: the output folder; None saves nothing, as on all ranks but 0.
        keep_last: how many of the newest checkpoints to keep.
        top_k: how many of the most accurate ones to keep too, as checkpoint-<epoch>.pth.
        config: config.json of the model in timm's hub format; None exports none.
    """

    def __init__(self, folder: Path | None, keep_last: int, top_k: int, config: bytes | None = None):
        super().__init__()
        self.folder, self.keep_last, self.top_k, self.config = folder, keep_last, top_k, config

    def save(self, state: dict[str, Any], accuracy_by_epoch: dict[int, float], exports: Sequence[Export] = ()) -> None:
        """Copy a state to the CPU and start to write it, as soon as the write before has ended.

        After the write, a state of the end of an epoch is retained if it is the best or among the top k, and then the
        model is exported.

        Args:
            state: from `checkpoint_state`.
            accuracy_by_epoch: top-1 accuracy of each epoch so far.
            exports: folders to write in timm's hub format.
        """
        if self.folder is None:
            return
        path = self.folder / LAST
        self.wait()  # so that there is one copy at a time
        copied = copy_to_cpu(state)

        def write_file() -> None:
            try:
                save_checkpoint(path, copied, self.keep_last)
            except (OSError, RuntimeError, FloatingPointError) as error:
                left = "the previous checkpoint is intact" if path.exists() else "there is no previous checkpoint"
                raise StopTraining(f"{path}: could not be written ({error}); {left}") from error
            if copied["position"] is None:
                self.retain_best_and_top_k(copied["epoch"], copied["best"], accuracy_by_epoch)
            self.write_exports(copied, exports)

        self.start(write_file)

    def export(self, state: dict[str, Any], exports: Sequence[Export]) -> None:
        """Copy weights to the CPU and start to export them alone, as soon as the write before has ended.

        Args:
            state: with "model" and "model_ema".
        """
        if self.folder is None or not exports:
            return
        self.wait()
        copied = copy_to_cpu({part: state[part] for part in {export.part for export in exports}})
        self.start(lambda: self.write_exports(copied, exports))

    def write_exports(self, copied: dict[str, Any], exports: Sequence[Export]) -> None:
        """Write a state's models in timm's hub format, without AugSub's mask token."""
        weights = move_mask_tokens(copied)
        for export in exports:
            assert self.config is not None
            try:
                write_folder(export.folder, self.config, weights[export.part], export.card)
            except (OSError, SafetensorError) as error:
                raise StopTraining(f"{export.folder}: could not be written ({error})") from error

    def retain_best_and_top_k(self, epoch: int, best: dict[str, float], accuracy_by_epoch: dict[int, float]) -> None:
        """Link the newest checkpoint, of the end of `epoch`, as the best and among the top k, if it is one of them.

        Also to be called when a run resumes at the end of an epoch: it may have been killed before these links.
        """
        if self.folder is None:
            return
        newest = self.folder / LAST
        try:
            if best.get("epoch") == epoch:
                link_or_copy(newest, self.folder / BEST)
            if self.top_k:
                link_or_copy(newest, self.folder / f"checkpoint-{epoch}.pth")
                numbered = [path for path in self.folder.glob("checkpoint-*.pth") if path.stem[11:].isdigit()]
                ranked = sorted(numbered, key=lambda path: accuracy_by_epoch.get(int(path.stem[11:]), -1.0))
                for path in ranked[: -self.top_k]:
                    path.unlink()
        except OSError as error:
            raise StopTraining(f"{newest}: could not be linked or copied to its second name ({error})") from error


def copy_to_cpu(state: Any) -> Any:
    """Copy nested dicts, lists and tuples of tensors to the CPU.

    Copies from a GPU go to pinned memory and overlap; the host waits once, for all of them.
    """
    from_gpu = False

    def copy(value: Any) -> Any:
        nonlocal from_gpu
        if isinstance(value, Tensor) and value.device.type == "cuda":
            from_gpu = True
            target = torch.empty_like(value, device="cpu", pin_memory=True)
            return target.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {name: copy(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(copy(item) for item in value)
        return value

    copied = copy(state)
    if from_gpu:
        torch.cuda.synchronize()
    return copied


def save_checkpoint(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint and rotate those before; `path` is complete or unchanged.

    Args:
        path: of the newest.
        state: on the CPU.
        keep: how many of the newest checkpoints to keep, this one included.

    Raises:
        OSError: the folder is not writable or the disk is full.
        FloatingPointError: a weight is not finite.
    """
    for part in ("model", "model_ema"):
        for name, weight in (state.get(part) or {}).items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise FloatingPointError(f"{name} of the {part} is not finite")
    write(path, move_mask_tokens(state), before_rename=lambda: rotate(path, keep))


def rotate(path: Path, keep: int) -> None:
    """Link the checkpoint at `path` as previous_checkpoint_1.pth, renames that to number 2, and so on up to `keep`.

    `path` itself stays until the next one is renamed over it. If the process is killed in between, each checkpoint
    still has a name, and the next call completes the rotation.
    """
    names = [path, *(path.with_name(PREVIOUS.format(number)) for number in range(1, keep))]
    if path.exists() and len(names) > 1 and not (names[1].exists() and names[1].samefile(path)):
        for number in range(len(names) - 1, 1, -1):
            if names[number - 1].exists():
                os.replace(names[number - 1], names[number])
        link_or_copy(path, names[1])
    for surplus in set(path.parent.glob(PREVIOUS.format("*"))) - set(names):
        surplus.unlink(missing_ok=True)


def list_newest_first(folder: Path) -> Iterator[Path]:
    """Yields a run's checkpoints to resume from: the newest, the previous ones, the best last."""
    previous = sorted(folder.glob(PREVIOUS.format("*")), key=lambda path: (len(path.name), path.name))
    yield from (path for path in (folder / LAST, *previous, folder / BEST) if path.exists())
