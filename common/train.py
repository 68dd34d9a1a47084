"""run(recipe): arguments → data → model → optimizer → epochs → evaluation → checkpoint."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
import torchvision
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint, dist
from common.args import DIGITS, MAY_CHANGE, parse
from common.augsub import AugSub
from common.data import check_classes, create_mixup, evaluation_loader, open_data_set, set_epoch, training_loader
from common.dist import Process
from common.engine import StopTraining, Trainer, Unreadable, autocast, evaluate, train_one_epoch
from common.log import CURVES, Log, duration, entries
from common.recipe import Recipe, create_optimizer

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "args.json"


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Trains, or evaluates with `--eval`, as the command line says.

    Exits with status 2 and one sentence on bad input, and where training cannot go on.
    """
    args = parse(recipe, argv)
    with ExitStack() as stack:
        try:
            process = stack.enter_context(dist.started(args.device))
            job = prepare(recipe, args, process)
        except ValueError as error:
            leave(str(error), 2)
        try:
            task_of(args)(job)
        except StopTraining as stop:
            leave(f"training stopped: {stop}", 2)
        except KeyboardInterrupt:
            leave("interrupted" + ("; the same command continues from the last checkpoint" if job.folder else ""), 130)
        finally:
            job.log.close()


def task_of(args: argparse.Namespace) -> Callable[[Job], None]:
    """What the command line asks for."""
    if args.throughput:
        return measure_throughput
    return evaluate_only if args.eval else train


def leave(sentence: str, status: int) -> NoReturn:
    """Ends the process; the first of several says why."""
    if dist.is_main_before_start():
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
    raise SystemExit(status)


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
    unreadable: Unreadable
    log: Log
    folder: Path | None
    epoch: int = 0  # the next one to train
    best: dict[str, float] = field(default_factory=dict)


def prepare(recipe: Recipe, args: argparse.Namespace, process: Process) -> Job:
    """Builds everything, and loads what the run starts from; the output folder is touched last.

    Raises:
        ValueError: bad input, in one sentence.
    """
    val_data = open_data_set(args, train=False)
    training = not (args.eval or args.throughput)
    train_data = val_data if not training else open_data_set(args, train=True)
    classes = count_classes(args, check_classes(train_data, val_data))
    source = resume_from(args)

    dist.seed_everything(args.seed)
    model = create_model(recipe, args, classes)
    if args.finetune and not source:
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
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)

    train_loader, batches = training_loader(args, train_data, process) if training else (None, 1)
    updates = math.ceil(batches / args.accum_iter)
    in_force = recipe.scale_lr(args, args.batch_size * process.world_size * args.accum_iter)
    optimizer = create_optimizer(recipe, model, in_force)
    mixup = create_mixup(args, classes)
    dtype = autocast_dtype(args.amp, process.device)
    trainer = Trainer(
        process=process,
        model=wrapped(model, args, process),
        bare=model,
        augsub=augsub,
        criterion=recipe.loss(args, mixup is not None),
        optimizer=optimizer,
        set_lr=recipe.schedule(optimizer, in_force, updates),
        scaler=torch.amp.GradScaler(process.device.type, enabled=dtype is torch.float16),
        autocast=dtype,
        ema=ema,
        mixup=mixup,
        clip_grad=args.clip_grad,
        accumulate=args.accum_iter,
        memory_format=memory_format,
        train_mode=args.train_mode,
    )
    start, best, notes = restore(recipe, args, source, trainer) if source else (args.start_epoch, {}, [])
    folder = make_folder(args, process) if training else None
    log = Log(folder, process.is_main, start, updates, args.epochs, recipe.curve_steps, args.log_dir)
    for line in (*describe(args, process, trainer, classes, updates), *notes):
        log.line(line)
    views = train_loader.dataset if train_loader is not None else None
    unreadable = Unreadable(len(train_data), getattr(views, "name_of", str), log.line)  # type: ignore[arg-type]
    val_loader = evaluation_loader(args, val_data, process)
    return Job(
        recipe, args, process, model, trainer, train_loader, batches, val_loader, unreadable, log, folder, start, best
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


def create_model(recipe: Recipe, args: argparse.Namespace, classes: int) -> nn.Module:
    """The recipe's model.

    Raises:
        ValueError: there is no such model, or it cannot be made with these settings.
    """
    try:
        return recipe.create_model(args, classes)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"--model {args.model} cannot be made with these settings: {error}") from error


def fetch(source: str) -> str:
    """A checkpoint's path; one behind an https:// address is downloaded first, to torch's cache."""
    if not source.startswith("https://"):
        return source
    target = Path(torch.hub.get_dir(), "checkpoints", Path(source).name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(target), progress=dist.is_main_before_start())
        except OSError as error:
            raise ValueError(f"{source}: could not be downloaded ({error})") from error
    return str(target)


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """dtype of mixed precision; by default bfloat16 where the hardware computes in it, else none."""
    if amp is None:
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
        amp = "bf16" if native else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def wrapped(model: nn.Module, args: argparse.Namespace, process: Process) -> nn.Module:
    """The model as training calls it: compiled, and in DDP where there are several processes."""
    if args.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if process.world_size == 1:
        return model
    ids = [process.device.index] if process.device.type == "cuda" else None
    # batch statistics are averaged at the end of each epoch instead; torch 2.15 renames the argument
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    own_buffers: Any = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **own_buffers)


def resume_from(args: argparse.Namespace) -> str:
    """The checkpoint to go on from: `--resume`, or the one that an earlier start left in the output folder, or ""."""
    if args.resume:
        return fetch(args.resume)
    own = Path(args.output_dir, checkpoint.LAST)
    if args.output_dir and own.exists() and args.auto_resume:
        return str(own)
    if args.eval and not args.throughput and not args.finetune:
        raise ValueError("--eval needs weights: --resume or --finetune names a checkpoint, or --output-dir a run")
    return ""


def restore(
    recipe: Recipe, args: argparse.Namespace, source: str, trainer: Trainer
) -> tuple[int, dict[str, float], list[str]]:
    """Puts a checkpoint's state into the trainer → the epoch to go on with, the best result so far, what to say.

    Raises:
        ValueError: the checkpoint does not fit, or the output folder holds a run with other settings.
    """
    content = checkpoint.load(source)
    ours = "best" in content and isinstance(content.get("args"), dict)
    if ours and not args.resume and not args.eval:
        changed = [
            f"{name} {content['args'][name]} → {value}"
            for name, value in vars(args).items()
            if name not in MAY_CHANGE and name in content["args"] and plain(value) != plain(content["args"][name])
        ]
        if changed:
            raise ValueError(
                f"{args.output_dir} holds a run with other settings ({', '.join(changed[:4])}): choose another "
                f"--output-dir, or continue that run under these settings with --resume {source}"
            )
    checkpoint.load_weights(trainer.bare, source, recipe.adapt_weights, content=content)
    if trainer.ema is not None:
        part = "model_ema" if isinstance(content.get("model_ema"), dict) else "model"
        checkpoint.load_weights(trainer.ema.module, source, recipe.adapt_weights, part=part, content=content)
    if args.eval:
        return 0, {}, [f"evaluating {source}"]
    if not ours:
        epoch = content["epoch"] + 1 if isinstance(content.get("epoch"), int) else args.start_epoch
        return epoch, {}, [f"{source} is not of this trainer: its weights are used from epoch {epoch} on, with a fresh "
                           "optimizer"]  # fmt: skip
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty where the run so far was not in float16
            trainer.scaler.load_state_dict(content["scaler"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: its optimizer state does not fit --opt {args.opt} ({error})") from error
    epoch = content["epoch"] + 1
    return epoch, content["best"], [f"continuing at epoch {epoch + 1} from {source}"]


def plain(value: Any) -> Any:
    """Settings as JSON has them, so that a saved one equals a parsed one."""
    return json.loads(json.dumps(value))


def make_folder(args: argparse.Namespace, process: Process) -> Path | None:
    """Creates the output folder and writes the settings of this start into it.

    Raises:
        ValueError: it cannot be written.
    """
    if not args.output_dir:
        return None
    folder = Path(args.output_dir)
    if process.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with checkpoint.replacing(folder / SETTINGS) as file:
                file.write(json.dumps(settings(args, process), indent=2).encode())
        except OSError as error:
            raise ValueError(f"--output-dir {folder}: not writable ({error.strerror})") from error
    return folder


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


def describe(args: argparse.Namespace, process: Process, trainer: Trainer, classes: int, updates: int) -> Iterator[str]:
    """The lines a run opens with."""
    if args.data_set == DIGITS:
        own = ", with a small model and settings of their own" if args.variant is None else ""
        yield f"data: scikit-learn's 1,797 handwritten digits, since no --data-path was given{own}"
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


def evaluate_all(job: Job) -> dict[str, float]:
    """Accuracy and loss of the model, and with an average of the weights also its, as "ema_acc1", …"""
    kwargs = {"dtype": job.trainer.autocast, "memory_format": job.trainer.memory_format}
    results = evaluate(job.model, job.val_loader, job.process, **kwargs)  # type: ignore[arg-type]
    ema = job.trainer.ema
    if ema is not None and not job.args.model_ema_force_cpu:
        averaged = evaluate(ema.module, job.val_loader, job.process, **kwargs)  # type: ignore[arg-type]
        results |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
    return results


def accuracies(results: dict[str, float]) -> str:
    """Both accuracies, and that of the averaged weights, in words."""
    ema = f"  (average of the weights: {results['ema_acc1']:.2f} %)" if "ema_acc1" in results else ""
    return f"acc@1 {results['acc1']:.2f} %  acc@5 {results['acc5']:.2f} %{ema}"


def evaluate_only(job: Job) -> None:
    """Prints the accuracy."""
    results = evaluate_all(job)
    job.log.line(f"{int(results['images'])} images: {accuracies(results)}  loss {results['loss']:.4f}")


def measure_throughput(job: Job, warmup: int = 50, rounds: int = 30) -> None:
    """Prints images/s of the model in evaluation on one batch, the mean of 30 passes after 50."""
    images = next(iter(job.val_loader))[0].to(job.process.device, memory_format=job.trainer.memory_format)
    job.model.eval()
    with torch.no_grad(), autocast(job.process.device, job.trainer.autocast):
        for left in range(warmup + rounds, 0, -1):
            if left == rounds:
                synchronise(job.process.device)
                start = time.perf_counter()
            job.model(images)
    synchronise(job.process.device)
    seconds = time.perf_counter() - start
    job.log.line(f"throughput: {rounds * len(images) / seconds:.1f} images/s in batches of {len(images)}")


def synchronise(device: torch.device) -> None:
    """Waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(job: Job) -> None:
    """Trains from `job.epoch` to the end; each epoch ends with an evaluation and a checkpoint.

    Raises:
        StopTraining: a loss was not finite, the data cannot be read, or the checkpoint cannot be written.
    """
    args, log = job.args, job.log
    parameters = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    began = time.time()
    if job.epoch >= args.epochs:
        log.line(f"all {args.epochs} epochs are trained already")
    for epoch in range(job.epoch, args.epochs):
        dist.seed_everything(args.seed, job.process.rank, epoch)
        set_epoch(job.train_loader, epoch)
        log.epoch(epoch)
        means = train_one_epoch(
            job.trainer,
            job.train_loader,
            job.batches,
            epoch,
            args.log_interval,
            lambda report, epoch=epoch: log.report(epoch, report),  # type: ignore[misc]
            job.unreadable,
        )
        log.end_epoch()
        if job.process.world_size > 1 and args.dist_bn:
            distribute_bn(job.model, job.process.world_size, reduce=args.dist_bn == "reduce")
        results = evaluate_all(job)
        better = results["acc1"] > job.best.get("acc1", -1.0)
        if better:
            job.best = {"acc1": results["acc1"], "epoch": epoch}
        scores = {name: value for name, value in results.items() if name != "images"}
        entry = {f"train_{name}": value for name, value in means.items()}
        entry |= {f"test_{name}": value for name, value in scores.items()}
        log.record(entry | {"epoch": epoch, "n_parameters": parameters})
        log.scalars({f"test/{name}": value for name, value in scores.items()}, log.step(epoch, log.updates))
        log.line(f"epoch {epoch + 1}/{args.epochs}  {accuracies(results)}  best {job.best['acc1']:.2f} %")
        due = better or (epoch + 1) % args.save_freq == 0 or epoch + 1 == args.epochs
        if job.process.is_main and job.folder is not None and due:
            save(job, epoch, better)
        if job.recipe.summary:
            log.summary()
    summarise(job, time.time() - began)


def save(job: Job, epoch: int, better: bool) -> None:
    """Writes the checkpoint of an epoch, and where it is the best so far keeps it as that too."""
    assert job.folder is not None
    trainer = job.trainer
    state = {
        "model": job.model.state_dict(),
        "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": epoch,
        "best": job.best,
        "args": plain(vars(job.args)),
    }
    path = job.folder / checkpoint.LAST
    try:
        checkpoint.save(path, state)
        if better:
            checkpoint.keep_as(path, job.folder / checkpoint.BEST)
        keep_best(job, epoch, job.args.checkpoint_hist)
    except (OSError, RuntimeError, FloatingPointError) as error:
        left = "the one before is still there" if path.exists() else "none was written before"
        raise StopTraining(f"{path} could not be written ({error}); {left}") from error


def keep_best(job: Job, epoch: int, most: int) -> None:
    """Keeps the checkpoint under its epoch's number, while it is among the `most` of highest accuracy."""
    if not most:
        return
    assert job.folder is not None
    checkpoint.keep_as(job.folder / checkpoint.LAST, job.folder / f"checkpoint-{epoch}.pth")
    accuracy = {entry["epoch"]: entry["test_acc1"] for entry in entries(job.folder)}
    kept = sorted(job.folder.glob("checkpoint-*.pth"), key=lambda path: accuracy.get(int(path.stem[11:]), -1.0))
    for path in kept[:-most]:
        path.unlink()


def summarise(job: Job, seconds: float) -> None:
    """The closing lines: accuracy, best epoch, time, where things lie."""
    if job.best:
        job.log.line(f"best accuracy {job.best['acc1']:.2f} % in epoch {int(job.best['epoch']) + 1}, "
                     f"trained in {duration(seconds)}")  # fmt: skip
    if job.folder is not None:
        job.log.line(f"checkpoints, log.txt and {SETTINGS} in {job.folder}; curves: tensorboard --logdir "
                     f"{job.folder / CURVES}")  # fmt: skip
