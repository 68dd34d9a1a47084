"""Samplers: which image comes when, and the seed that its augmentation draws from.

No library has this order: torch's and timm's samplers give indices alone, and augmentation then draws from generators
of the worker processes, so that images depend on how many there are. Here both follow from (seed, epoch, rank, place in
the epoch), so any number of workers, and a run resumed in mid-epoch, gives the same images.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from common.data.protocols import ShardedDataset
from common.distributed import Process

SHUFFLE_BUFFER = 65_536  # images of shards that are shuffled among each other
# int64, which torch's generators are seeded with, holds all seeds below 2**63; other bounds would draw other seeds and
# so change every run
MAX_SEED = 2**62


class SeededSampler(Sampler[tuple[int, int]]):
    """Gives each index of `order` the seed of its augmentation, drawn from (seed, epoch, rank).

    Args:
        order: a sampler of indices for this process, with `set_epoch`.
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, order: Any, seed: int, rank: int):
        self.order, self.seed, self.rank, self.epoch = order, seed, rank, 0
        self.start = 0  # indices to skip at the beginning of the epoch

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seeds = np.random.default_rng([self.seed, self.epoch, self.rank]).integers(MAX_SEED, size=len(self))
        return islice(zip(self.order, seeds.tolist()), self.start, None)


class ShardShuffleSampler(Sampler[int]):
    """Shuffles images of shards while reading few shards at a time: first the order of the shards, then the images of
    as many consecutive ones as hold `SHUFFLE_BUFFER`.

    Args:
        shard_ends: (shards,); the number of images up to and including each shard.
        order: a sampler of positions in the shuffled epoch for this process; itself unshuffled.
        seed: of the run.
    """

    def __init__(self, shard_ends: np.ndarray, order: Any, seed: int):
        self.shard_ends, self.order, self.seed, self.epoch = shard_ends, order, seed, 0

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Leave `order` at its epoch: without shuffling, an epoch changes nothing in it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch, 2**32 - 1])  # a rank that no process has
        starts = np.concatenate([[0], self.shard_ends[:-1]])
        shards = rng.permutation(len(self.shard_ends))
        group = np.cumsum((self.shard_ends - starts)[shards]) // SHUFFLE_BUFFER
        shuffled = []
        for number in np.unique(group):
            images = [np.arange(starts[shard], self.shard_ends[shard]) for shard in shards[group == number]]
            shuffled.append(rng.permutation(np.concatenate(images)))
        indices = np.concatenate(shuffled).tolist()
        return (indices[position] for position in self.order)


def build_sampler(data: Any, process: Process, seed: int, repeats: int) -> SeededSampler:
    """A sampler of this process's share of a shuffled epoch, of the same length on every process.

    Args:
        data: an `ImageDataset`; of a `ShardedDataset` few shards are read at a time.
        seed: of the run.
        repeats: how often each image comes in an epoch, with repeated augmentation; 0 for each image once.
    """
    sharded = isinstance(data, ShardedDataset)
    share: dict[str, Any] = {"num_replicas": process.world_size, "rank": process.rank, "shuffle": not sharded}
    order: Any
    if repeats:
        order = RepeatAugSampler(data, num_repeats=repeats, **share)
    else:
        order = DistributedSampler(data, seed=seed, drop_last=True, **share)
    if sharded:
        order = ShardShuffleSampler(data.shard_ends, order, seed)
    return SeededSampler(order, seed, process.rank)
