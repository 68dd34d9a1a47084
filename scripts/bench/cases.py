"""What is timed: the trainer of a mode, or the reference's, with random batches and a timer of its phases.

Timing is written here because `torch.utils.benchmark` and pyperf time one statement to its end before the next. Modes
are compared by interleaved rounds instead, so background load affects all of them alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.args import EMBEDDED
from common.data_config import resolve_preprocessing
from common.distributed import Process
from common.engine import Batch
from common.recipe import Recipe
from common.run import check_targets
from common.trainer import PHASES, Trainer, build_trainer, ignore_phase
from scripts.bench.args import NO_PATH, BenchArgs, Mode, parse_modes

BATCHES_PER_EPOCH = 5000  # of the schedule, whose first learning rates are used


def prepare_modes(command: str, recipe: Recipe, flags: Sequence[str], data_path: str = NO_PATH) -> list[Mode]:
    """Parse the modes to compare, the reference's included, and set the number of compute threads.

    Args:
        data_path: used where the flags name a variant, a model or a data set but no path.

    Raises:
        ValueError: bad input.
    """
    modes = parse_modes(command, recipe, flags, data_path)
    args = modes[0].args
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.reference:
        overrides = ["--amp", "fp16" if device.type == "cuda" else "off", "--no-compile", "--no-channels-last"]
        published = parse_modes(command, recipe, flags, data_path, overrides)
        modes += [Mode(f"reference {mode.name}", mode.kind, True, mode.args) for mode in published]
    for mode in modes:
        if mode.args.nb_classes is None:
            mode.args.nb_classes = 10 if mode.args.data_set in EMBEDDED else 1000
        mode.args = resolve_preprocessing(recipe, mode.args)
        mode.args.steps = mode.args.steps or (10 if device.type == "cuda" else 1)
        check_targets(mode.args, mode.args.nb_classes)
    if args.threads:
        torch.set_num_threads(args.threads)
    return modes


class ReferenceTrainer(Trainer):
    """Stands for the published trainers: reads each loss, and waits for the device in every step.

    `build_mode_trainer` makes its model: eager, unfused attention, an all-reduce for each pass; float32 on a CPU and
    float16 autocast on a GPU.
    """

    def train_step(self, images: Tensor, labels: Tensor, micro_batches: int, last: bool) -> list[Tensor]:
        losses = super().train_step(images, labels, micro_batches, last)
        for loss in losses:
            loss.item()
        return losses

    def update(self) -> None:
        super().update()
        synchronize(self.process.device)


class WithoutNoSync(nn.Module):
    """A DDP model that all-reduces in every backward pass, since AugSub sees no `no_sync` to hold it back."""

    def __init__(self, ddp: DistributedDataParallel):
        super().__init__()
        self.ddp = ddp

    def forward(self, x: Tensor) -> Tensor:
        return self.ddp(x)


def build_mode_trainer(
    recipe: Recipe,
    mode: Mode,
    process: Process,
    batches: int = BATCHES_PER_EPOCH,
    start_phase: Callable[[str], None] = ignore_phase,
) -> Trainer:
    """Build the trainer of a mode.

    Raises:
        ValueError: bad settings, such as a drop that the model has no place for.
    """
    fused = use_fused_attn()
    set_fused_attn(bool(fused) and not mode.reference)
    try:
        trainer = build_trainer(recipe, mode.args, process, mode.args.nb_classes, batches)
    finally:
        set_fused_attn(bool(fused))
    values = {f.name: getattr(trainer, f.name) for f in dataclasses.fields(trainer) if f.init}
    values["start_phase"] = start_phase
    if mode.reference and process.world_size > 1:
        unused = hasattr(trainer.raw_model, "mask_token")  # in the main pass
        values["model"] = WithoutNoSync(DistributedDataParallel(trainer.raw_model, find_unused_parameters=unused))
    return (ReferenceTrainer if mode.reference else Trainer)(**values)


def random_batches(args: BenchArgs, device: torch.device, count: int = 2, seed: int = 0) -> list[Batch]:
    """Draw batches of standard normal images on the host, as a loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    for _ in range(count):
        images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, generator=generator)
        labels = torch.randint(args.nb_classes, (args.batch_size,), generator=generator)
        if args.pin_mem and device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        batches.append((images, labels, []))
    return batches


class PhaseTimer:
    """Times the phases of a trainer's steps, as its `start_phase`.

    On a GPU it records events on the stream, so the host waits for the device only when the times are read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.starts: list[tuple[str, Any]] = []

    def __call__(self, phase: str) -> None:
        """Start a phase, which ends the one before."""
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.starts.append((phase, now))

    def read(self) -> dict[str, float]:
        """Sum up the seconds of each phase since the last call; the device must be idle."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self.starts, self.starts[1:]):
            seconds[phase] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        self.starts.clear()
        return seconds


class RoundTime(NamedTuple):
    """Times of a round, in seconds per step."""

    phases: dict[str, float]
    cpu: float  # CPU time of the process, all threads together

    @property
    def total(self) -> float:
        return sum(self.phases.values())


@dataclass
class BenchCase:
    """A mode under measurement."""

    mode: Mode
    trainer: Trainer
    batches: list[Batch]  # on the host
    timer: PhaseTimer
    peak_bytes: int = 0  # of tensors at the fullest moment of a step, where it was measured
    rounds: list[RoundTime] = field(default_factory=list)
    steps_done: int = 0

    def step(self) -> None:
        """Take one optimizer step."""
        trainer = self.trainer
        trainer.start_update(self.steps_done)
        for number in range(1, trainer.accum_steps + 1):
            images, labels, _ = self.batches[(self.steps_done + number) % len(self.batches)]
            trainer.train_step(images, labels, trainer.accum_steps, last=number == trainer.accum_steps)
        trainer.update()
        self.steps_done += 1

    def run_round(self, steps: int) -> RoundTime:
        """Time some steps, from an idle device to an idle device."""
        device = self.trainer.process.device
        synchronize(device)
        self.timer.starts.clear()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        synchronize(device)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        phases = self.timer.read() | {"host": 0.0}
        phases["host"] = max(0.0, seconds - sum(phases.values()))
        self.rounds.append(RoundTime({phase: value / steps for phase, value in phases.items()}, cpu / steps))
        return self.rounds[-1]

    @property
    def seconds(self) -> list[float]:
        """Seconds per step, one entry a round."""
        return [round_time.total for round_time in self.rounds]

    @property
    def cpu_seconds(self) -> list[float]:
        """Seconds of CPU time per step, one entry a round."""
        return [round_time.cpu for round_time in self.rounds]


def build_case(recipe: Recipe, mode: Mode, process: Process, warmup: int) -> BenchCase:
    """Build a mode and take its first steps, in which a compiled model is compiled. Each process draws its own
    images."""
    timer = PhaseTimer(process.device)
    trainer = build_mode_trainer(recipe, mode, process, start_phase=timer)
    trainer.raw_model.train(trainer.train_mode)
    case = BenchCase(mode, trainer, random_batches(mode.args, process.device, seed=process.rank), timer)
    for _ in range(max(1, warmup)):
        case.step()
    return case


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
