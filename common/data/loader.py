"""Loaders: transformed images in batches, what happens to unreadable images, and to workers that hang or die.

Which image comes when, and how it is augmented, follows from (seed, epoch, place in the epoch) alone (`samplers`):
neither the number of workers nor their timing plays a part.
"""

from __future__ import annotations

import errno
import multiprocessing
import random
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader, Dataset, IterableDataset

from common import signals
from common.data.bad_samples import (
    MAX_REPLACEMENTS,
    NO_IMAGE,
    READ_ERRORS,
    UnreadableSampleError,
    explain_read_error,
)
from common.data.datasets import ImageStream
from common.data.fast.ops import DeferredBatch
from common.data.fast.recorder import FastTransform
from common.data.images import to_rgb
from common.data.protocols import EncodedDataset, ImageDataset
from common.data.samplers import MAX_SEED, SeededSampler, build_sampler
from common.data.transforms import (
    AugmentConfig,
    training_stages,
    training_transform,
)
from common.distributed import Process

WORKER_DEATH_ADVICE = {
    signal.SIGKILL: ", probably out of memory: lower --num-workers",
    signal.SIGBUS: ", probably since /dev/shm is full: enlarge it (docker run --shm-size) or lower --num-workers",
}
WORKER_EXIT_S = 1.0  # until the exit status of a worker that has died is known
EVAL_BATCH_FACTOR = 1.5  # upstream's evaluation batch, in training batches; without gradients a larger one fits
# image (3, H, W), label or NO_IMAGE, names and reasons of unreadable images: none or one
Item = tuple[Tensor | DeferredBatch, int, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class LoaderConfig:
    """How images are loaded."""

    batch_size: int  # of each process
    num_workers: int  # of each process
    timeout_s: int  # seconds without a batch after which a worker counts as hung; 0 waits for ever
    pin_memory: bool  # where the device is a GPU
    seed: int  # of the run
    repeats: int  # how often each image comes in an epoch, with repeated augmentation; 0 for once, without


class WatchedLoader(DataLoader):
    """A DataLoader that keeps its workers, whose exit statuses tell how one died; PyTorch has them in an iterator that
    is gone when the error arrives, or not yet there: a worker can die while the iterator is being made."""

    workers: Sequence[BaseProcess] = ()

    def _get_iterator(self) -> Any:
        workers: list[BaseProcess] = []
        if self.num_workers:
            self.multiprocessing_context = _recording_context(workers)
        self.workers = workers
        return super()._get_iterator()


def _recording_context(processes: list[BaseProcess]) -> Any:
    """The default multiprocessing context, which appends each process that it makes to `processes`."""
    context: Any = copy(multiprocessing.get_context())
    make = context.Process

    def record(*args: Any, **kwargs: Any) -> BaseProcess:
        processes.append(make(*args, **kwargs))
        return processes[-1]

    context.Process = record
    return context


class AugmentedDataset(Dataset):
    """Transformed images of a dataset, each drawn from a seed of its own.

    Item (index, seed) → (image (3, H, W), label, name and reason of each unreadable image: none or one).

    Args:
        data: the images.
        transform: PIL image → (3, H, W).
        replace: another image, drawn at random, takes the place of an unreadable one. Without, and where
            `MAX_REPLACEMENTS` are unreadable too, the item's label is `NO_IMAGE`.
        num_workers: of the loader.
    """

    def __init__(self, data: ImageDataset, transform: Callable[..., Any], replace: bool = True, num_workers: int = 0):
        self.data, self.transform, self.replace = data, transform, replace
        # index that each worker reads, or -1; in shared memory, for the main process to tell where they hang
        self.in_flight = torch.full((max(num_workers, 1),), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        index, seed = place
        candidate, replacements = index, None
        worker = torch.utils.data.get_worker_info()
        slot = worker.id if worker is not None else 0
        unreadable: tuple[tuple[str, str], ...] = ()
        for _ in range(MAX_REPLACEMENTS if self.replace else 1):
            self.in_flight[slot] = candidate
            try:
                image, label = self.read(candidate)
                if label < 0:  # it would be taken for `NO_IMAGE`
                    raise UnreadableSampleError(self.data.sample_name(candidate), f"label {label} stands for no class")
                item = self.augment(image, seed), int(label), unreadable
                self.in_flight[slot] = -1
                return item
            except READ_ERRORS as error:
                replacements = replacements or random.Random(seed)
                unreadable = unreadable or ((self.data.sample_name(index), explain_read_error(error)),)
                candidate = replacements.randrange(len(self))
        self.in_flight[slot] = -1
        return torch.zeros(3, 1, 1), NO_IMAGE, unreadable

    def read(self, index: int) -> tuple[Any, int]:
        """What the transform takes, and the label."""
        image, label = self.data[index]
        return to_rgb(image), label

    def augment(self, image: Any, seed: int) -> Any:
        """The transformed image, as drawn from the seed."""
        with seeded_rng(seed):
            return self.transform(image)

    def samples_in_flight(self, workers: Collection[int] | None = None) -> list[str]:
        """Names of the images that workers are reading: all of them, or those of these numbers."""
        indices = enumerate(self.in_flight.tolist())
        return [self.data.sample_name(i) for worker, i in indices if i >= 0 and (workers is None or worker in workers)]


class FastAugmentedDataset(AugmentedDataset):
    """Items have a `DeferredBatch` for an image; of an `EncodedDataset` only the random crop is decoded."""

    def __init__(self, data: ImageDataset, transform: FastTransform, replace: bool = True, num_workers: int = 0):
        super().__init__(data, transform, replace, num_workers)
        self.encoded = data if isinstance(data, EncodedDataset) else None
        # saving and restoring the state of numpy's global generator would take longer than recording the operations
        self.numpy_rng = np.random.RandomState()

    def read(self, index: int) -> tuple[Any, int]:
        return super().read(index) if self.encoded is None else self.encoded.read_encoded(index)

    def augment(self, image: Any, seed: int) -> DeferredBatch:
        self.numpy_rng.seed(seed % 2**32)
        with seeded_rng(seed, numpy=False):
            return self.transform(image, self.numpy_rng)


class AugmentedStream(IterableDataset):
    """Transformed images of a dataset that can only be read from front to back.

    Items are those of `AugmentedDataset`, but an unreadable image ends the run. An epoch's order and augmentation
    follow from (seed, epoch, rank), the number of workers, and timm's reader.

    Args:
        data: the images.
        transform: PIL image → (3, H, W).
        seed: of the run.
        process: this one.
        train: timm's reader shuffles and gives each process its share; else this process keeps each world_size-th of
            all images.
    """

    def __init__(self, data: ImageStream, transform: Callable[..., Any], seed: int, process: Process, train: bool):
        self.data, self.transform, self.seed, self.process, self.train = data, transform, seed, process, train
        self.epoch = multiprocessing.Value("q", 0)  # shared, since persistent workers have copies of this dataset

    def set_epoch(self, epoch: int) -> None:
        self.epoch.value = epoch
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Item]:
        worker = torch.utils.data.get_worker_info()
        seeds = random.Random(repr((self.seed, self.epoch.value, self.process.rank, worker.id if worker else 0)))
        images = iter(self.data)
        if not self.train:
            images = islice(images, self.process.rank, None, self.process.world_size)
        for image, label in images:
            with seeded_rng(seeds.randrange(MAX_SEED)):
                yield self.transform(to_rgb(image)), int(label), ()


@contextmanager
def seeded_rng(seed: int, numpy: bool = True) -> Iterator[None]:
    """Seed python's, torch's and, if asked for, numpy's global generators, and restore their states at the end."""
    python_state, torch_state = random.getstate(), torch.random.get_rng_state()
    numpy_state = np.random.get_state() if numpy else None
    random.seed(seed)
    if numpy:
        np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)
        torch.random.set_rng_state(torch_state)


def collate(batch: list[Item]) -> tuple[Tensor | DeferredBatch, Tensor, list[tuple[str, str]]]:
    """→ images (B, 3, H, W), labels (B,), and names and reasons of unreadable images; pixels labelled `NO_IMAGE` mean
    nothing."""
    placeholder = next((image for image, label, _ in batch if label != NO_IMAGE), batch[0][0])
    images = stack([image if label != NO_IMAGE else placeholder for image, label, _ in batch])
    labels = torch.tensor([label for _, label, _ in batch])
    return images, labels, [sample for _, _, samples in batch for sample in samples]


def stack(images: list[Any]) -> Tensor | DeferredBatch:
    """Images → a batch. Pixels keep the layout that decoders give them, with a pixel's channels together in memory."""
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    pixels = torch.stack([image.pixels.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return DeferredBatch(pixels, torch.stack([image.ops for image in images]))


def build_train_loader(
    data: ImageDataset | ImageStream, config: LoaderConfig, augment: AugmentConfig, process: Process
) -> tuple[DataLoader, int]:
    """Shuffled batches of augmented images, and how many of them make an epoch on every process.

    Raises:
        ValueError: there are fewer images than processes, or than one batch of all of them.
    """
    if len(data) < process.world_size:
        raise ValueError(
            f"--data-path: {len(data)} training images for {process.world_size} processes; start fewer processes"
        )
    transform = FastTransform(*training_stages(augment)) if augment.fast else training_transform(augment)
    dataset: Any
    sampler = None
    if isinstance(data, ImageStream):
        dataset = AugmentedStream(data, transform, config.seed, process, train=True)
        images = len(data)  # of this process
    else:
        sampler = build_sampler(data, process, config.seed, config.repeats)
        kind: Any = FastAugmentedDataset if augment.fast else AugmentedDataset
        dataset = kind(data, transform, num_workers=config.num_workers)
        images = len(sampler)
    batches = images // config.batch_size
    if batches < 1:
        raise ValueError(
            f"--batch-size {config.batch_size}: more than the {images} training images of a process; use a smaller one"
        )
    loader = WatchedLoader(
        dataset,
        sampler=sampler,
        batch_size=config.batch_size,
        drop_last=True,
        persistent_workers=config.num_workers > 0,
        generator=torch.Generator(),  # else workers' seeds would come from the global one, which drops draw from
        **_common_settings(config, process),
    )
    return loader, batches


def build_eval_loader(
    data: ImageDataset | ImageStream, config: LoaderConfig, transform: Callable[..., Any], process: Process
) -> DataLoader:
    """This process's share of the evaluation images; the shares of all processes hold each image exactly once.

    Args:
        transform: PIL image → (3, H, W).
    """
    dataset: Any
    sampler = None
    if isinstance(data, ImageStream):
        dataset = AugmentedStream(data, transform, config.seed, process, train=False)
    else:
        dataset = AugmentedDataset(data, transform, False, config.num_workers)
        sampler = [(index, 0) for index in range(process.rank, len(data), process.world_size)]
    batch_size = int(EVAL_BATCH_FACTOR * config.batch_size)
    return WatchedLoader(dataset, batch_size=batch_size, sampler=sampler, **_common_settings(config, process))


def _common_settings(config: LoaderConfig, process: Process) -> dict[str, Any]:
    """Of training and evaluation loaders."""
    return {
        "num_workers": config.num_workers,
        "timeout": config.timeout_s if config.num_workers else 0,
        "pin_memory": config.pin_memory and process.device.type == "cuda",
        "collate_fn": collate,
        "worker_init_fn": signals.ignore_stop_signals,
    }


def iterate_epoch(loader: DataLoader, epoch: int, start_batch: int = 0) -> Iterator[Any]:
    """The batches of an epoch from `start_batch` on, of a training loader; a stream reads those before it again."""
    if isinstance(loader.sampler, SeededSampler):
        loader.sampler.set_epoch(epoch)
        loader.sampler.start = start_batch * (loader.batch_size or 1)
        return iter(loader)
    assert isinstance(loader.dataset, AugmentedStream)
    loader.dataset.set_epoch(epoch)
    return islice(loader, start_batch, None)


def explain_worker_failure(loader: DataLoader | None, error: BaseException) -> str | None:
    """What to tell the user where `error` comes from a worker that hangs or died; None where it does not."""
    if loader is None:
        return None
    if isinstance(error, RuntimeError) and "DataLoader timed out" in str(error):
        samples = loader.dataset.samples_in_flight() if isinstance(loader.dataset, AugmentedDataset) else []
        stuck = f"; stuck on {', '.join(samples)}" if samples else ""
        return f"no batch from the DataLoader workers for {loader.timeout:g} s (--data-timeout){stuck}"
    # an error that was raised in a worker has a text of its own, "Caught … in DataLoader worker process 0"
    died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    return explain_worker_death(loader) if died or _lost_worker_socket(error) else None


def explain_worker_death(loader: DataLoader) -> str:
    """How a worker ended, at which image, and what to do."""
    workers = loader.workers if isinstance(loader, WatchedLoader) else ()
    with _child_signals_ignored():
        connection.wait([worker.sentinel for worker in workers if worker.pid is not None], WORKER_EXIT_S)
    dead = {number: worker.exitcode for number, worker in enumerate(workers) if worker.exitcode}
    samples = loader.dataset.samples_in_flight(dead) if isinstance(loader.dataset, AugmentedDataset) else []
    where = f" while it read {' or '.join(samples)}" if samples else ""
    status = next(iter(dead.values()), None)
    if status is None:
        return "a DataLoader worker died; re-run the command to resume"
    if status > 0:
        return f"a DataLoader worker exited with status {status}{where}; re-run the command to resume"
    advice = WORKER_DEATH_ADVICE.get(signal.Signals(-status), "; remove this file if it is damaged" if samples else "")
    name = signal.Signals(-status).name
    return f"a DataLoader worker was killed by {name}{where}{advice}; re-run the command to resume"


@contextmanager
def _child_signals_ignored() -> Iterator[None]:
    """Keep PyTorch's handler of SIGCHLD from raising an error inside, for the worker whose death is known already."""
    handler = _take_child_handler_away()
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _take_child_handler_away() -> Any:
    """Take PyTorch's handler of SIGCHLD away → the handler; None in other threads, which cannot set one."""
    if threading.current_thread() is not threading.main_thread():
        return None
    while True:
        try:
            return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:  # the handler's own, of a signal that had come before
            continue


def _lost_worker_socket(error: BaseException) -> bool:
    """Whether a batch could not be fetched because the worker that holds it is gone: torch hands file descriptors over
    through a socket of the worker's."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    fetching = any(frame.f_globals.get("__name__") == reductions.__name__ for frame in frames)
    too_many_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)  # the worker lives then
    return isinstance(error, (OSError, EOFError)) and fetching and not too_many_files


def kill_workers() -> None:
    """Kill the workers, also those that hang."""
    _take_child_handler_away()  # it would raise an error for each
    for child in multiprocessing.active_children():
        child.kill()
