"""Process group: start-up from torchrun's or Slurm's environment, and reductions over ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

from common.errors import is_rank_zero_from_env

EXIT_COUNT_KEY = "leaving"  # counter in the process group's store
RESTART_SAFE_ENV = "afresh"  # URL scheme of the rendezvous handler below


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


def claim_error_report() -> bool:
    """Whether this rank is the first to call: of several that fail for the same reason, one prints the message."""
    if not _distributed():
        return is_rank_zero_from_env()
    try:
        return _store().add(EXIT_COUNT_KEY, 1) == 1
    except RuntimeError:  # the process that hosts the store has exited
        return False


def _store() -> torch_dist.Store:
    return torch_dist.distributed_c10d._get_default_store()


def _rendezvous_per_restart(url: str, **kwargs: Any) -> Iterator[tuple[torch_dist.Store, int, int]]:
    """Rendezvous by environment variables, with a key prefix for each restart.

    torchrun keeps one store over all restarts of its workers, and PyTorch's own env:// handler adds no prefix: a
    restarted rank could read an address that a rank of the start before had written, and wait for it without end.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, world_size in torch_dist.rendezvous(url.replace(RESTART_SAFE_ENV, "env", 1), **kwargs):
        yield torch_dist.PrefixStore(f"start-{restart}", store), rank, world_size


torch_dist.register_rendezvous_handler(RESTART_SAFE_ENV, _rendezvous_per_restart)


@contextmanager
def init_distributed(device: str | None) -> Iterator[Process]:
    """Join the process group, NCCL on GPUs and gloo on CPUs, and destroy it at the end.

    Args:
        device: "cuda", "cpu" or "cuda:1"; None takes the GPU where there is one.

    Raises:
        ValueError: there is no GPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU on this machine; use --device cpu")
    env = init_distributed_device_so(device, dist_url=f"{RESTART_SAFE_ENV}://")
    try:
        yield Process(torch.device(env["device"]), env["global_rank"], env["world_size"], env["local_rank"])
    finally:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def _distributed() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def all_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if _distributed():
        torch_dist.all_reduce(values)
    return values


def all_min(values: Tensor) -> Tensor:
    """Minimum over all ranks, in place."""
    if _distributed():
        torch_dist.all_reduce(values, torch_dist.ReduceOp.MIN)
    return values


def all_union(values: set[Any]) -> set[Any]:
    """Union of all ranks' sets."""
    return set().union(*all_gather(values))


def all_gather(value: Any) -> list[Any]:
    """Each rank's value, in the order of ranks."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value)
    return values


def broadcast_from_main(value: Any) -> Any:
    """Rank 0's value."""
    if not _distributed():
        return value
    values = [value]
    torch_dist.broadcast_object_list(values)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(all_gather(flag))
