"""Processes: start-up from torchrun's or Slurm's environment, random state, and sums over all of them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

from common.errors import is_main_before_start

LEAVING = "leaving"  # a count in the store that the processes share
AFRESH = "afresh"  # our way for processes to meet, as PyTorch's addresses name it


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_first_to_leave() -> bool:
    """Whether this process is the first of all to ask: of several that stop over the same trouble, one speaks."""
    if not _distributed():
        return is_main_before_start()
    try:
        return _store().add(LEAVING, 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return False


def _store() -> torch_dist.Store:
    return torch_dist.distributed_c10d._get_default_store()


def _rendezvous_afresh(url: str, **kwargs: Any) -> Iterator[tuple[torch_dist.Store, int, int]]:
    """Has the processes meet as the environment says, apart from those of an earlier start by the same torchrun: they
    share its store, and could find the others' old addresses in it, and wait there for ever."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, world_size in torch_dist.rendezvous(url.replace(AFRESH, "env", 1), **kwargs):
        yield torch_dist.PrefixStore(f"start-{start}", store), rank, world_size


torch_dist.register_rendezvous_handler(AFRESH, _rendezvous_afresh)


@contextmanager
def started(device: str | None) -> Iterator[Process]:
    """Joins the other processes of the run, over NCCL on GPUs and gloo on CPUs, and leaves them at the end.

    Args:
        device: "cuda", "cpu" or "cuda:1"; None takes the GPU where there is one.

    Raises:
        ValueError: there is no GPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no GPU that PyTorch can use; --device cpu would do")
    found = init_distributed_device_so(device, dist_url=f"{AFRESH}://")
    try:
        yield Process(torch.device(found["device"]), found["global_rank"], found["world_size"], found["local_rank"])
    finally:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def seed_everything(*parts: int) -> None:
    """Starts python's, numpy's and torch's generators from the given numbers, e.g. (seed, rank, epoch)."""
    state = np.random.SeedSequence(parts).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]))


def random_state() -> dict[str, Any]:
    """The states of this process's generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.tensor(np.asarray(keys).tolist()), *rest),
        "torch": torch.random.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    random.setstate(state["python"])
    kind, keys, place, *rest = state["numpy"]
    if keys.shape != (624,) or not 0 <= place <= 624:  # numpy would read beyond them
        raise ValueError("a generator's state is out of range")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, *rest))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _distributed() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if _distributed():
        torch_dist.all_reduce(values)
    return values


def all_min(values: Tensor) -> Tensor:
    """The least over all processes, in place."""
    if _distributed():
        torch_dist.all_reduce(values, torch_dist.ReduceOp.MIN)
    return values


def all_union(values: set[str]) -> set[str]:
    """What is in the set of any process."""
    return set().union(*all_gather(values))


def all_gather(value: Any) -> list[Any]:
    """What each process has, in the order of their ranks."""
    if not _distributed():
        return [value]
    parts: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(parts, value)
    return parts


def from_main(value: Any) -> Any:
    """What the main process has."""
    if not _distributed():
        return value
    parts = [value]
    torch_dist.broadcast_object_list(parts)
    return parts[0]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return any(all_gather(flag))
