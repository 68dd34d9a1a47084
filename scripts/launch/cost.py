"""What the runs of a table will cost: steps, floating-point operations, GPU-hours and memory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.args import parse
from common.augsub import AugSub
from common.train_args import TrainArgs
from scripts.launch.paper_tables import Stage
from scripts.launch.planner import Task
from scripts.launch.registry import RECIPES

# dense bf16 (V100: fp16) rate in FLOP/s and memory in bytes, from the vendors' data sheets
GPUS = {"v100": (125e12, 32e9), "a100": (312e12, 80e9), "h100": (989e12, 80e9), "h200": (989e12, 141e9)}
IMAGENET_IMAGES, DIGITS_IMAGES = 1_281_167, 1_437  # training images
BACKWARD = 2.0  # FLOPs of a backward pass over those of a forward pass: gradients of inputs and of weights


class Cost(NamedTuple):
    """Estimate for a stage."""

    steps: int  # optimizer steps
    flops: float  # of the whole training; a multiply-add is two
    memory: float  # peak bytes on each GPU


class ModelCost(NamedTuple):
    """A model with a drop, for one image."""

    main: float  # FLOPs of the main model's forward pass
    sub: float  # FLOPs of the sub-model's forward pass
    activations: float  # bytes in 16 bits that a forward pass saves for backward; the larger of both passes
    parameters: int


def print_plan(tasks: Sequence[Task], gpu: str, utilisation: float) -> None:
    """Print the cost of each task and their sum.

    Raises:
        ValueError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: choose from {', '.join(GPUS)}")
    peak_rate, gpu_memory = GPUS[gpu]
    total_hours = total_flops = 0.0
    for task in tasks:
        stage, cost = task.stage, estimate_cost(task.stage, task.flags)
        hours = cost.flops / (peak_rate * utilisation) / 3600
        total_hours, total_flops = total_hours + hours, total_flops + cost.flops
        warning = "" if cost.memory < gpu_memory else f", more than the {gpu_memory / 1e9:.0f} GB of one {gpu}"
        facts = [
            f"{stage.nodes} x {stage.gpus} GPUs",
            f"{stage.global_batch} images a step",
            f"{cost.steps:,} steps",
            f"{cost.flops:.2e} FLOPs",
            f"{hours:,.0f} {gpu}-hours",
            f"{cost.memory / 1e9:.1f} GB a GPU{warning}",
        ]
        torchrun = f"torchrun --nnodes {stage.nodes} --nproc-per-node {stage.gpus}"
        print(f"{task.name}\n  {torchrun} {stage.entry} {shlex.join(task.flags)}\n  {', '.join(facts)}")
    speed = f"at {utilisation:.0%} of {peak_rate / 1e12:.0f} TFLOP/s"
    print(f"in all: {len(tasks)} runs, {total_flops:.2e} FLOPs, {total_hours:,.0f} {gpu}-hours {speed}")


def estimate_cost(stage: Stage, flags: Sequence[str]) -> Cost:
    """Cost of a stage with the flags of its command."""
    args = parse(RECIPES[stage.recipe], flags)
    images = DIGITS_IMAGES if stage.variant is None else IMAGENET_IMAGES
    batch = args.batch_size * args.accum_iter * stage.nodes * stage.gpus
    steps = args.epochs * (images // batch)
    model = measure(stage.recipe, args)
    memory = state_bytes(model, args) + model.activations * args.batch_size  # the two passes run one after the other
    return Cost(steps, steps * batch * (model.main + model.sub) * (1 + BACKWARD), memory)


def state_bytes(model: ModelCost, args: TrainArgs) -> int:
    """Bytes of weights, gradients, two moments and the EMA, in float32."""
    return model.parameters * 4 * (4 + bool(args.model_ema))


_measured: dict[tuple, ModelCost] = {}


def measure(recipe: str, args: TrainArgs) -> ModelCost:
    """Count FLOPs and saved bytes of a forward pass on torch's meta device, without computing it.

    Two images are passed and the counts halved: batch norm in training mode refuses one value per channel, as from one
    image of the digits, whose last feature map is 1x1.
    """
    with torch.device("meta"):
        model = RECIPES[recipe].create_model(args, args.nb_classes or 1000)
        augsub = AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block)
        images = torch.zeros(2, 3, args.input_size, args.input_size)
    # by the shapes, as flags of one recipe (Swin's --opts) change a model of the same name
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    drop = (args.augsub, args.augsub_ratio, args.augsub_block, args.drop_path > 0)
    key = (recipe, args.input_size, *drop, shapes)
    if key in _measured:
        return _measured[key]
    model.train()
    main_flops, activations = _measure_forward(model, images)
    sub_flops = 0.0
    if args.augsub != "none":
        with augsub.sub_model():
            sub_flops, sub_activations = _measure_forward(model, images)
        activations = max(activations, sub_activations)
    parameters = sum(p.numel() for p in model.parameters())
    _measured[key] = ModelCost(main_flops / 2, sub_flops / 2, activations / 2, parameters)
    return _measured[key]


def _measure_forward(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """FLOPs of a forward pass, and bytes in 16 bits that it saves for backward."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Tensor] = {}  # by storage, as several views of one are saved

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            saved[storage] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(images)
    saved_bytes = sum(tensor.untyped_storage().nbytes() // 2 for tensor in saved.values())
    return float(counter.get_total_flops()), float(saved_bytes)
