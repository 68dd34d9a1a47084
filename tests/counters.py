"""Counters for the invariants of a training step: what the host reads from the device, and what DDP all-reduces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.autograd import DeviceType
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import ProfilerActivity, profile, record_function

from common.data.bad_samples import BadSampleCounter
from common.distributed import Process
from common.engine import LossMeter, train_epoch
from scripts.bench.args import Mode
from scripts.bench.cases import WithoutNoSync, build_mode_trainer, prepare_modes, random_batches, synchronize
from scripts.launch.registry import RECIPES

# where the host waits for a GPU, by the names of CUDA's runtime
CUDA_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
ITEM = "aten::_local_scalar_dense"  # what Tensor.item() calls
SPAN = "between reports"


def modes_of(recipe: str, *flags: str) -> dict[str, Mode]:
    """The modes of `benchmark.py step`, by name."""
    words = ["--batch-size", "4", "--threads", "1", *flags]
    return {mode.name: mode for mode in prepare_modes("step", RECIPES[recipe], words)}


def count_host_waits(recipe: str, mode: Mode, steps: int = 3) -> int:
    """How often the host waits for the device in `steps` updates of the training loop between two reports.

    From a profiler's trace of the training loop. On a GPU: the calls by which CUDA waits. On a CPU, which has nothing
    to wait for: the numbers that the host reads from tensors, each of which would wait on a GPU; but for the
    optimizer's reads of its step counters, which lie on the host whatever the device.
    """
    process = Process(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    accum_steps = mode.args.accum_iter
    batches = (2 * steps + 1) * accum_steps  # the first steps warm up; after the last one is a report
    trainer = build_mode_trainer(RECIPES[recipe], mode, process, batches)
    drawn = random_batches(mode.args, process.device)
    loader = (drawn[number % len(drawn)] for number in range(batches))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if process.device.type == "cuda" else [])
    profiler = profile(activities=activities)
    span = record_function(SPAN)
    meter, bad_samples = LossMeter(trainer, 0, 2 * steps + 1), BadSampleCounter(1, "training", print)
    for step in train_epoch(trainer, loader, batches, meter, bad_samples, report_every=batches):
        if step.number == steps:
            synchronize(process.device)
            profiler.start()
            span.__enter__()
        if step.number == 2 * steps:
            span.__exit__(None, None, None)
            profiler.stop()
        assert (step.report is not None) == step.last
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    (within,) = (event.time_range for event in events if event.name == SPAN)
    events = [e for e in events if within.start <= e.time_range.start and e.time_range.end <= within.end]
    assert sum(event.name.startswith("Optimizer.step") for event in events) == steps
    if process.device.type == "cuda":
        return sum(event.name in CUDA_WAITS for event in events)
    return sum(event.name == ITEM and not inside_optimizer(event) for event in events)


def inside_optimizer(event: Any) -> bool:
    """Whether a profiler's event belongs to an optimizer's step."""
    while event is not None:
        if event.name.startswith("Optimizer.step"):
            return True
        event = event.cpu_parent
    return False


def count_all_reduces(rank: int, world: int, folder: Path, cases: list[tuple[str, Mode]]) -> None:
    """What DDP reduces in one update of each recipe's mode, "bytes" and "all_reduces", beside the bytes of the model's
    "parameters" → a file of the first process, in the order of `cases`."""
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = []
    for recipe, mode in cases:
        trainer = build_mode_trainer(RECIPES[recipe], mode, Process(torch.device("cpu"), rank, world, rank))
        trainer.raw_model.train(trainer.train_mode)
        buckets: list[tuple[int, int]] = []  # index and bytes of each that is reduced
        ddp: Any = trainer.model.ddp if isinstance(trainer.model, WithoutNoSync) else trainer.model
        # a lambda, since DDP compares the hook's annotations, here strings, with types
        ddp.register_comm_hook(buckets, lambda state, bucket: reduce_and_count(state, bucket))
        batches = random_batches(mode.args, torch.device("cpu"), seed=rank)
        for _ in range(2):  # DDP rebuilds its buckets after the first
            buckets.clear()
            for part in range(1, trainer.accum_steps + 1):
                images, labels, _ = batches[part % len(batches)]
                trainer.train_step(images, labels, trainer.accum_steps, last=part == trainer.accum_steps)
            trainer.update()
        results.append({
            "bytes": sum(nbytes for _, nbytes in buckets),
            "all_reduces": sum(index == 0 for index, _ in buckets),
            "parameters": sum(p.nbytes for p in trainer.parameters),
        })  # fmt: skip
    if rank == 0:
        torch.save(results, folder / "reductions.pt")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def reduce_and_count(buckets: list[tuple[int, int]], bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    buckets.append((bucket.index(), bucket.buffer().nbytes))
    return allreduce_hook(torch_dist.distributed_c10d._get_default_group(), bucket)
