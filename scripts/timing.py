"""What a training step costs: time by part, memory, communication, and how often the host waits for the device.

The steps are the trainer's own, `Trainer.micro_step` and `Trainer.update`, on random images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from common import checkpoint
from common.dist import Process
from common.engine import Batch, Trainer, Unreadable, Watch, train_one_epoch
from common.prepare import create_trainer
from common.recipe import Recipe
from common.train import state_of
from common.writer import Writer, snapshot
from scripts.options import Mode, cores

PARTS = ("forward", "backward", "optimizer", "EMA", "host")
BATCHES_OF_EPOCH = 5000  # of the schedule, whose first rate is taken
# where the host waits for a GPU, by the names of CUDA's runtime
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
READS = "aten::_local_scalar_dense"  # what .item() comes to: a number that the host reads from a tensor


class ReferenceTrainer(Trainer):
    """Stands for the published trainers: an all-reduce for each pass, the loss read and the device waited for in each
    step. Eager, with attention that is not fused, in float32 on a CPU and float16 autocast on a GPU.
    """

    def micro_step(self, images: Tensor, labels: Tensor, parts: int, last: bool) -> list[Tensor]:
        own, self.model = self.model, lambda x: own(x)  # type: ignore[assignment]  # without DDP's no_sync
        try:
            losses = super().micro_step(images, labels, parts, last)
        finally:
            self.model = own
        for loss in losses:
            loss.item()
        return losses

    def update(self) -> None:
        super().update()
        wait_for(self.process.device)


def reference_flags(device: torch.device) -> list[str]:
    """The settings of the published trainers."""
    amp = "fp16" if device.type == "cuda" else "off"
    return ["--amp", amp, "--no-compile", "--no-channels-last", "--no-augsub-joint"]


def build(recipe: Recipe, mode: Mode, process: Process, batches: int = BATCHES_OF_EPOCH) -> Trainer:
    """The trainer of a mode.

    Raises:
        ValueError: bad settings, such as a drop that the model has no place for.
    """
    with fused_attention(not mode.reference and use_fused_attn()):
        trainer = create_trainer(recipe, mode.args, process, mode.args.nb_classes, batches)
    if not mode.reference:
        return trainer
    values = {f.name: getattr(trainer, f.name) for f in dataclasses.fields(trainer) if f.init}
    if process.world_size > 1:  # the main pass has no use for a mask token
        unused = hasattr(trainer.bare, "mask_token")
        values["model"] = DistributedDataParallel(trainer.bare, find_unused_parameters=unused)
    return ReferenceTrainer(**values)


@contextmanager
def fused_attention(on: bool) -> Iterator[None]:
    """Within it timm makes models with fused attention, or without."""
    before = use_fused_attn()
    set_fused_attn(on)
    try:
        yield
    finally:
        set_fused_attn(before)


def random_batches(args: argparse.Namespace, device: torch.device, count: int = 2, seed: int = 0) -> list[Batch]:
    """Batches of standard normal images on the host, as the loader gives them."""
    draw = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    for _ in range(count):
        images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, generator=draw)
        labels = torch.randint(args.nb_classes, (args.batch_size,), generator=draw)
        pinned = args.pin_mem and device.type == "cuda"
        found.append((images.pin_memory(), labels.pin_memory(), []) if pinned else (images, labels, []))
    return found


class Stopwatch:
    """Shares out the time of a trainer's steps among `PARTS`.

    On a GPU the stretches lie between events on the stream, so that nothing is waited for within a step.
    """

    def __init__(self, trainer: Trainer):
        self.device = trainer.process.device
        self.stretches: list[tuple[str, Any]] = []
        self._hook(trainer)

    def switch(self, part: str) -> None:
        """Ends the stretch before and begins one of this part."""
        at: Any = time.perf_counter()
        if self.device.type == "cuda":
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self.stretches.append((part, at))

    def read(self) -> dict[str, float]:
        """Seconds of each part but the host's since the last reading; the device has been waited for."""
        spent = dict.fromkeys(PARTS[:-1], 0.0)
        for (part, start), (_, end) in zip(self.stretches, self.stretches[1:]):
            if part in spent:
                spent[part] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        self.stretches.clear()
        return spent

    def _hook(self, trainer: Trainer) -> None:
        losses, scale = trainer.augsub.losses, trainer.scaler.scale

        def timed_losses(*args: Any, **kwargs: Any) -> Iterator[Tensor]:
            passes = losses(*args, **kwargs)
            while True:
                self.switch("forward")
                loss = next(passes, None)
                self.switch("host")
                if loss is None:
                    return
                yield loss

        def timed_scale(outputs: Any) -> Any:
            self.switch("backward")
            return scale(outputs)

        trainer.augsub.losses = timed_losses  # type: ignore[method-assign]
        trainer.scaler.scale = timed_scale  # type: ignore[method-assign]
        trainer.micro_step = self._timed(trainer.micro_step, "host")  # type: ignore[method-assign]
        trainer.update = self._timed(trainer.update, "optimizer")  # type: ignore[method-assign]
        if trainer.ema is not None:
            trainer.ema.update = self._timed(trainer.ema.update, "EMA")

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch(part)
            result = call(*args, **kwargs)
            self.switch("host")
            return result

        return timed


@dataclass
class Subject:
    """A mode under measurement.

    Args:
        batches: on the host.
        peak: bytes of tensors at the fullest moment of a step.
        rounds: seconds a step of each part, one entry a round.
        cpu: seconds a step that this process had the cores, all threads together, one entry a round.
        sent: of each bucket of gradients that was reduced, where they are counted: its place among a pass's, its bytes.
    """

    mode: Mode
    trainer: Trainer
    batches: list[Batch]
    watch: Stopwatch
    peak: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[tuple[int, int]] = field(default_factory=list)
    done: int = 0

    def step(self) -> None:
        """One update."""
        trainer = self.trainer
        trainer.set_lr(self.done)
        for part in range(1, trainer.accumulate + 1):
            images, labels, _ = self.batches[(self.done + part) % len(self.batches)]
            trainer.micro_step(images, labels, trainer.accumulate, last=part == trainer.accumulate)
        trainer.update()
        self.done += 1

    def round(self, steps: int) -> None:
        """Times some steps, from an idle device to an idle device."""
        device = self.trainer.process.device
        self.watch.stretches.clear()
        wait_for(device)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        wait_for(device)
        whole = time.perf_counter() - start
        self.cpu.append((time.process_time() - cpu) / steps)
        spent = self.watch.read()
        spent["host"] = max(0.0, whole - sum(spent.values()))
        self.rounds.append({part: seconds / steps for part, seconds in spent.items()})

    @property
    def seconds(self) -> list[float]:
        """Seconds a step, one entry a round."""
        return [sum(parts.values()) for parts in self.rounds]


def prepare_subject(recipe: Recipe, mode: Mode, process: Process, warmup: int) -> Subject:
    """Builds a mode, warms it up and measures its memory."""
    before = torch.cuda.memory_allocated(process.device) if process.device.type == "cuda" else 0
    subject = warm_subject(recipe, mode, process, warmup)
    subject.peak = peak_memory(subject, before)
    return subject


def warm_subject(recipe: Recipe, mode: Mode, process: Process, warmup: int, counted: bool = False) -> Subject:
    """Builds a mode and warms it up (a compiled model is compiled here). Each process has images of its own."""
    trainer = build(recipe, mode, process)
    trainer.bare.train(trainer.train_mode)
    batches = random_batches(mode.args, process.device, seed=process.rank)
    subject = Subject(mode, trainer, batches, Stopwatch(trainer))
    if counted:
        subject.sent = count_reductions(trainer)
    for _ in range(max(1, warmup)):
        subject.step()
    return subject


def save_rounds(subject: Subject, path: Path, rounds: int, steps: int) -> tuple[list[float], list[float], list[float]]:
    """Saves in the background while training goes on → seconds that each save keeps training waiting, that its write
    takes, and that each step beside a write takes."""
    stalls, writes, beside = [], [], []
    writer = Writer()
    ended: list[float] = []

    def write(state: dict[str, Any]) -> None:
        checkpoint.save(path, state, keep=1)
        ended.append(time.perf_counter())

    for _ in range(rounds):
        subject.round(steps)
        wait_for(subject.trainer.process.device)
        began = time.perf_counter()
        state = snapshot(state_of(subject.trainer))
        writer.start(partial(write, state))
        stalls.append(time.perf_counter() - began)
        del state
        while writer.thread is not None and writer.thread.is_alive():
            start = time.perf_counter()
            subject.step()
            wait_for(subject.trainer.process.device)
            beside.append(time.perf_counter() - start)
        writer.wait()
        writes.append(ended[-1] - began)
    return stalls, writes, beside


def peak_memory(subject: Subject, before: int) -> int:
    """Bytes of all tensors of a mode at the fullest moment of a step.

    On a GPU `max_memory_allocated`, less the bytes `before` the mode was built. On a CPU, whose allocator keeps no such
    count, the profiler's record of every allocation and release of tensor memory during the step, summed up in order of
    time, over what the mode holds before it: weights, buffers, the optimizer's state and the average of the weights.
    Workspaces that oneDNN takes from the system for itself are in neither.
    """
    trainer = subject.trainer
    device = trainer.process.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        subject.step()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = bytes_of(trainer)
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silent():
        recorded.start()
    subject.step()
    with silent():
        recorded.stop()
    now = peak = 0
    for event in trace_of(recorded):
        if event.get("name") == "[memory]":
            now += event["args"]["Bytes"]
            peak = max(peak, now)
    return held + peak


@contextmanager
def silent() -> Iterator[None]:
    """Within it nothing is written to standard error, as torch's profiler does at each start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def trace_of(recorded: profile) -> list[dict[str, Any]]:
    """A profile's events in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if "ts" in event), key=lambda event: event["ts"])


def bytes_of(trainer: Trainer) -> int:
    """Bytes of weights, buffers, the optimizer's state and the average of the weights, each storage once."""
    modules: list[nn.Module] = [trainer.bare] + ([trainer.ema] if trainer.ema is not None else [])
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product."""
    side, repeats = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    wait_for(device)
    return 2 * side**3 * repeats / (time.perf_counter() - start)


def wait_for(device: torch.device) -> None:
    """Waits until the GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits_of(recipe: Recipe, mode: Mode, process: Process, steps: int = 3) -> dict[str, int]:
    """How often the host waits for the device in `steps` updates of the training loop, between two reports.

    From a profiler's trace of `train_one_epoch`. On a GPU: the calls by which CUDA waits. On a CPU, which has nothing
    to wait for: the numbers that the host reads from tensors, each of which would wait on a GPU. The optimizer's own
    reads are counted apart, because its counters of steps lie on the host whatever the device.

    Returns:
        "updates"; "waits"; "optimizer": its reads of counters on the host.
    """
    trainer = build(recipe, mode, process, batches=2 * steps * mode.args.accum_iter)
    batches = random_batches(mode.args, process.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if process.device.type == "cuda" else [])
    recorded = profile(activities=activities)
    span = record_function("between reports")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done == steps:  # the first half warms up
            wait_for(process.device)
            with silent():
                recorded.start()
            span.__enter__()
        if done == 2 * steps:
            span.__exit__(None, None, None)
            with silent():
                recorded.stop()

    count = 2 * steps * trainer.accumulate
    loader = (batches[i % len(batches)] for i in range(count))
    watch = Watch(count, lambda report: None, tick)
    train_one_epoch(trainer, loader, count, 0, watch, Unreadable(1, "training", print))
    events = [event for event in recorded.events() if event.device_type == DeviceType.CPU]
    (within,) = (event.time_range for event in events if event.name == "between reports")
    events = [e for e in events if within.start <= e.time_range.start and e.time_range.end <= within.end]
    reads = [event for event in events if event.name == READS]
    own = sum(any(name.startswith("Optimizer.step") for name in _callers(event)) for event in reads)
    calls = sum(event.name in WAITS for event in events)
    return {"updates": steps, "waits": calls if process.device.type == "cuda" else len(reads) - own, "optimizer": own}


def _callers(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def count_reductions(trainer: Trainer) -> list[tuple[int, int]]:
    """Has DDP note what it reduces, from the first step on → its list of each bucket's place and bytes."""
    sizes: list[tuple[int, int]] = []
    # as a lambda, because DDP takes annotations for types, which here are strings
    trainer.model.register_comm_hook(sizes, lambda state, bucket: _reduce(state, bucket))  # type: ignore[operator]
    return sizes


def _reduce(sizes: list[tuple[int, int]], bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    sizes.append((bucket.index(), bucket.buffer().nbytes))
    return allreduce_hook(torch_dist.distributed_c10d._get_default_group(), bucket)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] \
        if cpu.exists() else []  # fmt: skip
    return {
        "cpu": names[0] if names else "",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
