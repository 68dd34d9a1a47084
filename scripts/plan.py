"""What the runs of the table cost, before any of them begins: steps, arithmetic, GPU-hours and memory."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.args import parse
from common.augsub import AugSub
from scripts.table import RECIPES, Stage

if TYPE_CHECKING:
    from scripts.reproduce import Task

# dense bf16 (V100: fp16) rate in FLOP/s and memory in bytes, from the makers' data sheets
GPUS = {"v100": (125e12, 32e9), "a100": (312e12, 80e9), "h100": (989e12, 80e9), "h200": (989e12, 141e9)}
IMAGENET = 1_281_167  # training images
DIGITS = 1_437
BACKWARD = 2.0  # a backward pass in forwards: the gradients of the inputs, and of the weights


@dataclass(frozen=True)
class Cost:
    """Of a stage."""

    steps: int  # optimizer steps
    flops: float  # floating-point operations of the training, two to a multiply-add
    memory: float  # bytes on each GPU at the fullest


def print_plan(tasks: Sequence[Task], gpu: str, utilisation: float) -> None:
    """Prints each stage and the totals.

    Raises:
        ValueError: an unknown GPU, or a share outside (0, 1].
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: choose from {', '.join(GPUS)}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation {utilisation} is outside (0, 1]")
    rate, room = GPUS[gpu]
    hours = flops = 0.0
    for task in tasks:
        stage, found = task.stage, cost(task.stage, task.kind, task.flags)
        spent = found.flops / (rate * utilisation) / 3600
        hours, flops = hours + spent, flops + found.flops
        full = "" if found.memory < room else f", more than the {room / 1e9:.0f} GB of one {gpu}"
        launcher = f"torchrun --nnodes {stage.nodes} --nproc-per-node {stage.gpus}"
        figures = [
            f"{stage.nodes} x {stage.gpus} GPUs",
            f"{stage.global_batch} images a step",
            f"{found.steps:,} steps",
            f"{found.flops:.2e} FLOPs",
            f"{spent:,.0f} {gpu}-hours",
            f"{found.memory / 1e9:.1f} GB a GPU{full}",
        ]
        print(f"{task.name}\n  {launcher} {stage.entry} {shlex.join(task.flags)}\n  {', '.join(figures)}")
    speed = f"at {utilisation:.0%} of {rate / 1e12:.0f} TFLOP/s"
    print(f"in all: {len(tasks)} runs, {flops:.2e} FLOPs, {hours:,.0f} {gpu}-hours {speed}")


def cost(stage: Stage, kind: str, flags: Sequence[str]) -> Cost:
    """What a stage costs with a drop, by its own command line."""
    args = parse(RECIPES[stage.recipe], flags)
    images = DIGITS if stage.variant is None else IMAGENET
    batch = args.batch_size * args.accum_iter * stage.nodes * stage.gpus
    steps = args.epochs * (images // batch)
    found = measure(stage.recipe, args)
    memory = state_bytes(found, args) + found.saved * args.batch_size  # the activations are those of one pass
    return Cost(steps, steps * batch * (found.main + found.sub) * (1 + BACKWARD), memory)


def state_bytes(found: Measured, args: argparse.Namespace) -> int:
    """Weights, gradients, two moments and the average, in float32."""
    return found.weights * 4 * (4 + bool(args.model_ema))


@dataclass(frozen=True)
class Measured:
    """Of a model with a drop, for one image."""

    main: float  # floating-point operations of the main model's forward pass
    sub: float  # and of the sub-model's
    saved: float  # bytes of activations in 16 bits that a forward pass keeps for the backward one, the greater of both
    weights: int


_MEASURED: dict[tuple, Measured] = {}


def measure(recipe: str, args: argparse.Namespace) -> Measured:
    """Counts on torch's meta device, where nothing is computed."""
    key = (recipe, args.model, args.input_size, args.nb_classes, args.augsub, args.augsub_ratio, args.drop_path > 0)
    if key not in _MEASURED:
        with torch.device("meta"):
            model = RECIPES[recipe].create_model(args, args.nb_classes or 1000)
            augsub = AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block)
            images = torch.zeros(2, 3, args.input_size, args.input_size)
        model.train()
        main, saved = _pass(model, images)
        sub = 0.0
        if args.augsub != "none":
            with augsub.sub_model():
                sub, other = _pass(model, images)
            saved = max(saved, other)
        weights = sum(p.numel() for p in model.parameters())
        _MEASURED[key] = Measured(main / 2, sub / 2, saved / 2, weights)
    return _MEASURED[key]


def _pass(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """A forward pass → its floating-point operations, and the bytes that it keeps in 16 bits."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return float(counter.get_total_flops()), float(sum(t.untyped_storage().nbytes() // 2 for t in kept.values()))
