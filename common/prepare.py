"""prepare(): arguments → data → model → optimizer, and what a run says of itself at its start."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, dist
from common.args import DIGITS
from common.augsub import AugSub
from common.data import check_classes, open_data_set
from common.dist import Process
from common.engine import Trainer, Unreadable
from common.folder import SETTINGS, lock, remove_parts, replacing
from common.joint import join
from common.loader import create_augment, create_mixup, evaluation_loader, training_loader
from common.log import Log
from common.masking import PixelMask, TokenMask
from common.optim import create_optimizer
from common.recipe import Recipe
from common.resume import Source, Start, fetch, newest_of, plain, put_in_order, restore, resume_from
from common.signals import Request
from common.writer import Writer

ROOT = Path(__file__).resolve().parents[1]
RUNNING = ".running"
WAIT = 120.0  # seconds for a run in the same folder to end: a file server keeps the locks of a machine that died for 90


@dataclass
class Job:
    """All that a run is made of."""

    recipe: Recipe
    args: argparse.Namespace
    process: Process
    model: nn.Module  # bare
    trainer: Trainer
    train_loader: Any
    batches: int  # of an epoch, on each process
    val_loader: Any
    unreadable: Unreadable  # among the training images
    unreadable_val: Unreadable  # among the evaluation images
    log: Log
    folder: Path | None  # for checkpoints and logs
    start: Start
    best: dict[str, float]  # "acc1" and its "epoch"; empty before the first
    request: Request = field(default_factory=Request)  # to stop
    writer: Writer = field(default_factory=Writer)  # of checkpoints
    stopped: str | None = None  # the signal that asked to


def prepare(recipe: Recipe, args: argparse.Namespace, process: Process) -> Job:
    """Builds everything, and loads what the run starts from; the output folder is touched last.

    Raises:
        ValueError: bad input, in one sentence.
    """
    val_data = open_data_set(args, train=False)
    training = not (args.eval or args.throughput)
    train_data = val_data if not training else open_data_set(args, train=True)
    classes = count_classes(args, check_classes(train_data, val_data))
    check_targets(args, classes)
    newest = newest_of(Path(args.output_dir))
    source = resume_from(args, process)

    train_loader, batches = training_loader(args, train_data, process) if training else (None, 1)
    updates = math.ceil(batches / args.accum_iter)
    trainer = create_trainer(recipe, args, process, classes, batches, source)
    start = restore(recipe, args, source, trainer, updates) if source is not None else Start(args.start_epoch)
    folder = Path(args.output_dir) if training and args.output_dir else None
    log = open_folder(recipe, args, process, folder, source, newest, start, updates)
    for line in (*describe(recipe, args, process, trainer, classes, updates), *start.notes):
        log.line(line)
    return Job(
        recipe=recipe,
        args=args,
        process=process,
        model=trainer.bare,
        trainer=trainer,
        train_loader=train_loader,
        batches=batches,
        val_loader=evaluation_loader(args, val_data, process),
        unreadable=Unreadable(len(train_data), "training", log.line),  # type: ignore[arg-type]
        unreadable_val=Unreadable(len(val_data), "evaluation", log.line),  # type: ignore[arg-type]
        log=log,
        folder=folder,
        start=start,
        best=start.best,
    )


def create_trainer(
    recipe: Recipe,
    args: argparse.Namespace,
    process: Process,
    classes: int,
    batches: int,
    source: Source | None = None,
) -> Trainer:
    """The model with its drop, on the device, and all that trains it.

    Args:
        classes: of the model.
        batches: of an epoch, on each process.
        source: the checkpoint that the run will go on from.

    Raises:
        ValueError: bad input, in one sentence.
    """
    training = not (args.eval or args.throughput)
    if args.deterministic:
        use_deterministic_kernels()
    dist.seed_everything(args.seed)
    model = create_model(recipe, args, classes)
    if args.finetune and source is None:
        checkpoint.load_weights(
            model, fetch(args.finetune), recipe.adapt_weights, new_head=training, head_std=recipe.new_head_std
        )
    if args.sync_bn:
        if process.device.type != "cuda":
            raise ValueError("--sync-bn needs GPUs: PyTorch has no such batch norm for the CPU")
        model = convert_sync_batchnorm(model)
    augsub = AugSub(model, args.augsub, args.augsub_ratio, block=args.augsub_block, batch_norm=args.augsub_bn)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(process.device).to(memory_format=memory_format)
    dtype = autocast_dtype(args.amp, process.device)
    if process.device.type == "cpu":
        use_plain_attention(model, dtype)
    check_images(model, args, process.device)
    check_mask(augsub, model, args)
    ema = None
    if args.model_ema and (training or source is not None):
        ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    in_force = recipe.scale_lr(args, args.batch_size * process.world_size * args.accum_iter)
    optimizer = create_optimizer(recipe, model, in_force)
    mixup = create_mixup(args, classes)
    joint = join(augsub, model) if args.augsub_joint and training else None
    return Trainer(
        process=process,
        model=wrapped(joint or model, args, process),
        bare=model,
        augsub=augsub,
        criterion=recipe.loss(args, mixup is not None),
        optimizer=optimizer,
        set_lr=recipe.schedule(optimizer, in_force, batches / args.accum_iter),
        scaler=torch.amp.GradScaler(process.device.type, enabled=dtype is torch.float16),
        classes=classes,
        autocast=dtype,
        ema=ema,
        mixup=mixup,
        clip_grad=args.clip_grad or None,
        accumulate=args.accum_iter,
        memory_format=memory_format,
        train_mode=args.train_mode,
        joint=args.augsub_joint,
        augment=create_augment(args, process.device),
    )


def count_classes(args: argparse.Namespace, found: int | None) -> int:
    """The classes of the model: `--nb-classes`, or as many as the data set has."""
    if args.nb_classes is None:
        if found is None:
            raise ValueError(f"--data-set {args.data_set} does not tell its classes: --nb-classes must")
        return found
    if found is not None and found > args.nb_classes:
        raise ValueError(f"--nb-classes {args.nb_classes}: the data set has {found} classes")
    return args.nb_classes


def check_targets(args: argparse.Namespace, classes: int) -> None:
    """Refuses label smoothing that lifts every class above `--bce-target-thresh`.

    Raises:
        ValueError: saying what would do.
    """
    threshold = args.bce_target_thresh
    if args.bce_loss and threshold is not None and args.smoothing / classes > threshold:
        raise ValueError(
            f"--bce-loss with --smoothing {args.smoothing}: smoothed, all {classes} classes of each image are above "
            f"--bce-target-thresh {threshold:g} and would become its targets; --smoothing 0 is the papers'"
        )


def check_mask(augsub: AugSub, model: nn.Module, args: argparse.Namespace) -> None:
    """Refuses a mask that would hide nothing, since at least one block or token always stays.

    Raises:
        ValueError: saying what would do.
    """
    if args.augsub != "masking" or not args.augsub_ratio:
        return
    size = args.input_size
    if augsub.drop in (TokenMask.name, PixelMask.name) and args.augsub_block >= size:
        raise ValueError(f"--augsub-block {args.augsub_block} covers the whole image of {size} pixels, so that masking "
                         f"hides nothing: --augsub-block {max(1, size // 4)} would do")  # fmt: skip
    if getattr(getattr(model, "patch_embed", None), "num_patches", None) == 1:
        raise ValueError(f"--input-size {size} is one patch of {args.model}, so masking would hide nothing")


def create_model(recipe: Recipe, args: argparse.Namespace, classes: int) -> nn.Module:
    """The recipe's model.

    Raises:
        ValueError: there is no such model, or it cannot be made with these settings.
    """
    try:
        return recipe.create_model(args, classes)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--model {args.model} cannot be made with these settings: {reason}") from error


@torch.no_grad()
def check_images(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Tries the model on one blank image.

    Raises:
        ValueError: it takes no images of this size.
    """
    training = model.training
    model.eval()
    try:
        model(torch.zeros(1, 3, args.input_size, args.input_size, device=device))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--input-size {args.input_size} is none that --model {args.model} takes ({error})") from error
    finally:
        model.train(training)


def use_deterministic_kernels() -> None:
    """Has PyTorch refuse kernels whose result hangs on timing; cuBLAS reads its part when the GPU is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def use_plain_attention(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Has timm's attention multiply matrices in the open where that is faster on a CPU than PyTorch's fused kernel: in
    bfloat16, and with a bias that learns, which the kernel does not take.

    Args:
        dtype: autocast's; None without.
    """
    for module in model.modules():
        learns = getattr(module, "relative_position_bias_table", None) is not None
        if getattr(module, "fused_attn", False) and (learns or dtype is torch.bfloat16):
            module.fused_attn = False  # type: ignore[assignment]


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """dtype of mixed precision; by default bfloat16 where the hardware is faster in it, else none."""
    if amp is None:
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # AVX-512's bf16 instructions alone do it on AMD's processors; on Intel's a step of ViT-S takes 1.7 times
            # as long as in float32 with them, and AMX is needed
            told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in each release
            able = torch.cpu._is_amx_tile_supported() or "AMD" in told.get("cpu_name", "")
            native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and able
        amp = "bf16" if native else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def wrapped(model: nn.Module, args: argparse.Namespace, process: Process) -> nn.Module:
    """The model as training calls it: compiled, and in DDP where there are several processes."""
    if args.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if process.world_size == 1 or args.eval or args.throughput:  # there are no gradients to share
        return model
    ids = [process.device.index] if process.device.type == "cuda" else None
    # batch statistics are averaged at the end of each epoch instead; torch 2.15 renames the argument
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    own_buffers: Any = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **own_buffers)


def open_folder(
    recipe: Recipe,
    args: argparse.Namespace,
    process: Process,
    folder: Path | None,
    source: Source | None,
    newest: tuple[int, int] | None,
    start: Start,
    updates: int,
) -> Log:
    """Creates the output folder, writes the settings of this start into it, and opens the logs.

    Raises:
        ValueError: it cannot be written, or another run is at work in it.
    """
    held = None
    try:
        if folder is not None and process.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another run in {folder} to end"
            held = lock(folder / RUNNING, WAIT, lambda: print(waiting, flush=True))
            if newest_of(folder) != newest:
                raise ValueError(f"--output-dir {folder}: another run has gone on in it meanwhile; the same command "
                                 "again goes on from there")  # fmt: skip
            remove_parts(folder)
            put_in_order(folder, source)
            with replacing(folder / SETTINGS) as file:
                file.write(json.dumps(settings(args, process), indent=2).encode())
        update = start.position.update if start.position is not None else 0
        return Log(folder, process.is_main, start.epoch, updates, args.epochs, recipe.curve_steps, args.log_dir, update,
                   held, start.log)  # fmt: skip
    except TimeoutError as error:
        raise ValueError(f"--output-dir {folder}: another run is at work in it, which holds {RUNNING}") from error
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: not writable ({error.strerror or error})") from error


def settings(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """What decides a run: arguments, command, processes, commit and versions."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {
        "args": plain(vars(args)),
        "command": sys.argv,
        "processes": process.world_size,
        "device": str(process.device),
        "commit": commit or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }


def describe(
    recipe: Recipe, args: argparse.Namespace, process: Process, trainer: Trainer, classes: int, updates: int
) -> Iterator[str]:
    """The lines a run opens with."""
    if args.data_set == DIGITS:
        small = args.model == recipe.digits["model"]
        own = ", with a small model and settings of their own" if small else ""
        yield f"data: scikit-learn's 1,797 handwritten digits, which stand in where no --data-path is given{own}"
    else:
        yield f"data: {args.data_set} {args.data_path or ''}, {classes} classes"
    millions = sum(p.numel() for p in trainer.bare.parameters()) / 1e6
    yield f"model: {args.model}, {millions:.1f}M parameters, {args.input_size} px; {trainer.augsub}"
    precision = str(trainer.autocast or torch.float32).removeprefix("torch.")
    if not (args.eval or args.throughput):
        batch = args.batch_size * process.world_size * args.accum_iter
        yield (
            f"training: {args.epochs} epochs of {updates} steps of {batch} images; {process.world_size} "
            f"process{'es' if process.world_size > 1 else ''} on {process.device.type}, {precision}"
        )
        if not args.output_dir:
            yield "nothing will be saved: --output-dir names a folder for checkpoints and logs"
