"""run(recipe, args): data → model → optimizer → epochs → evaluation → checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import distribute_bn

from common import checkpoint, dist
from common.engine import Interrupted, Position, Trainer, Watch, autocast, evaluate, train_one_epoch
from common.errors import Leaving, StopTraining, is_main_before_start
from common.folder import BEST, CURVES, LAST, SETTINGS, duration, keep_as
from common.loader import NONE, batches_of, end_processes, failure_of
from common.prepare import Job, prepare
from common.recipe import Recipe
from common.resume import own_state, plain, set_own_state
from common.signals import listening, stop_printing
from common.writer import snapshot


def run(recipe: Recipe, args: argparse.Namespace) -> str | None:
    """Trains, or evaluates with `--eval`, as the arguments say → None, or the signal that asked it to stop before the
    end.

    Exits with status 2 and one sentence on bad input, and where training cannot go on.
    """
    job = None
    with ExitStack() as stack:
        try:
            request = stack.enter_context(listening(is_main_before_start()))
            process = stack.enter_context(dist.started(args.device))
            job = prepare(recipe, args, process)
            job.request = request
            with at_work(job):
                task_of(args)(job)
            stopped, job = job.stopped, None
            gc.collect()  # DDP goes before its process group does
            return stopped
        except ValueError as error:
            if job is not None:  # past the start it is no bad input
                raise
            leave(str(error), 2)
        except StopTraining as stop:
            leave(f"training stopped: {stop}", 2)
        except KeyboardInterrupt:
            saved = job is not None and job.folder is not None and (job.folder / LAST).exists()
            leave("interrupted" + ("; the same command continues from the last checkpoint" if saved else ""), 130)
        except BrokenPipeError:
            stop_printing()
            raise Leaving("", 141) from None
        except Exception as error:
            loaders = [job.train_loader, job.val_loader] if job is not None else []
            sentence = next(filter(None, (failure_of(loader, error) for loader in loaders)), None)
            if sentence is not None:
                leave(f"training stopped: {sentence}", 2)
            if not dist.is_first_to_leave():  # what fails here fails for want of another, whose traceback tells more
                raise Leaving("", 2) from None
            raise


@contextmanager
def at_work(job: Job) -> Iterator[None]:
    """Lets what is on its way to the disk get there, for a while, before the folder is given back."""
    try:
        yield
    except KeyboardInterrupt:
        job.writer.settle(seconds=1.0)
        raise
    except BaseException:
        job.writer.settle()
        raise
    finally:
        job.log.close()


def task_of(args: argparse.Namespace) -> Callable[[Job], None]:
    """What the command line asks for."""
    if args.throughput:
        return measure_throughput
    return evaluate_only if args.eval else train


def leave(sentence: str, status: int) -> NoReturn:
    """Ends the process and those that load its data; the first of several says why."""
    end_processes()
    if not dist.is_first_to_leave():
        raise Leaving("", status)
    print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
    raise Leaving(sentence, status)


def train(job: Job) -> None:
    """Trains from `job.epoch` to the end; each epoch ends with an evaluation and a checkpoint.

    Raises:
        StopTraining: a loss was not finite, the data cannot be read, or the checkpoint cannot be written.
    """
    args, log = job.args, job.log
    parameters = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    began = time.time()
    whole = job.start.continues and job.start.position is None  # its checkpoint is that of a whole epoch
    if whole and job.process.is_main and job.folder is not None:  # an earlier start may have been cut off before
        keep(job.folder, job.start.epoch - 1, job.best, args.checkpoint_hist, log.accuracy())
    if job.start.epoch >= args.epochs:
        log.line(f"all {args.epochs} epochs are trained already")
    job.request.gently = True
    upcoming = None
    for epoch in range(job.start.epoch, args.epochs):
        begin = job.start.position if epoch == job.start.epoch else None
        dist.seed_everything(args.seed, job.process.rank, epoch)
        if begin is not None and job.start.own is not None:
            set_own_state(job.trainer, job.start.own)
        log.epoch(epoch, begin.update if begin is not None else 0)
        if upcoming is None:
            done = begin.update * args.accum_iter if begin is not None else 0
            upcoming = batches_of(job.train_loader, epoch, done)
        try:
            means = train_one_epoch(
                job.trainer, upcoming, job.batches, epoch, watching(job, epoch), job.unreadable, begin
            )
        except Interrupted as stop:
            pause(job, epoch, stop.position)
            return
        log.end_epoch()
        upcoming = None  # ends with its epoch
        if epoch + 1 < args.epochs:  # loader processes begin with it while this one is evaluated
            upcoming = batches_of(job.train_loader, epoch + 1)
        if job.process.world_size > 1 and args.dist_bn:
            averaged = [job.trainer.ema.module] if job.trainer.ema is not None else []
            for model in [job.model, *averaged]:
                distribute_bn(model, job.process.world_size, reduce=args.dist_bn == "reduce")
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
            save(job, epoch)
        if job.recipe.summary:
            log.summary()
        if epoch + 1 < args.epochs and dist.any_of(bool(job.request)):
            pause(job, epoch + 1)
            return
    job.writer.wait()
    if job.recipe.summary:
        log.summary()  # where an earlier start was cut off before it
    summarise(job, time.time() - began)


def watching(job: Job, epoch: int) -> Watch:
    """What becomes of an epoch's reports and positions."""

    def tick() -> None:
        job.log.tick()
        job.writer.check()

    def save_position(position: Position) -> None:
        own = dist.all_gather(own_state(job.trainer, position))
        if job.process.is_main:
            save(job, epoch - 1, position, own)

    every = job.args.save_every if job.args.output_dir else 0
    return Watch(
        interval=job.args.log_interval,
        say=lambda report: job.log.report(epoch, report),
        tick=tick,
        asked=lambda: bool(job.request),
        save_every=every,
        save=save_position,
    )


def pause(job: Job, epoch: int, position: Position | None = None) -> None:
    """Saves where training stands, before an epoch or in it, and says how it goes on."""
    job.log.end_epoch()
    where = f"before epoch {epoch + 1}"
    if position is not None:
        where = f"after step {position.update} of {job.log.updates} in epoch {epoch + 1}"
        own = dist.all_gather(own_state(job.trainer, position))
    if job.folder is None:
        again = "nothing is saved, for want of an --output-dir"
    else:
        again = "the same command goes on from there"
        if job.process.is_main:
            saved = epoch % job.args.save_freq == 0 or job.best.get("epoch") == epoch - 1
            if position is not None:
                save(job, epoch - 1, position, own)
            elif not saved:
                save(job, epoch - 1)
            job.writer.wait()
    job.stopped = next(name for name in dist.all_gather(job.request.by) if name is not None)
    job.log.line(f"asked to stop ({job.stopped}): stopped {where}; {again}")


def state_of(trainer: Trainer) -> dict[str, Any]:
    """What training changes: weights, their average, optimizer, scaler; as it is, not a copy."""
    return {
        "model": trainer.bare.state_dict(),
        "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
    }


def save(job: Job, epoch: int, position: Position | None = None, own: list[dict[str, Any]] | None = None) -> None:
    """Copies the state after an epoch, or at a position in the middle of the next one, and has it written in the
    background, under all its names."""
    assert job.folder is not None
    trainer, folder, best = job.trainer, job.folder, dict(job.best)
    accuracy = job.log.accuracy()
    job.writer.wait()  # at most one copy at a time
    job.log.flush()
    state = snapshot(state_of(trainer) | {
        "epoch": epoch,
        "best": best,
        "args": plain(vars(job.args)),
        "processes": job.process.world_size,
        "updates": job.log.updates,
        "log": list(job.log.entries),
        "position": dataclasses.asdict(dataclasses.replace(position, window=[])) if position is not None else None,
        "own": own,
    })  # fmt: skip

    def write() -> None:
        path = folder / LAST
        try:
            checkpoint.save(path, state, job.args.keep_last)
        except (OSError, RuntimeError, FloatingPointError) as error:
            left = "the one before is still there" if path.exists() else "none was written before"
            raise StopTraining(f"{path} could not be written ({error}); {left}") from error
        if position is None:
            keep(folder, epoch, best, job.args.checkpoint_hist, accuracy)

    job.writer.start(write)


def keep(folder: Path, epoch: int, best: dict[str, float], history: int, accuracy: dict[int, float]) -> None:
    """Keeps the checkpoint of an epoch as the best, if it is, and while it is among the `history` ones of highest
    accuracy also under its number."""
    last = folder / LAST
    try:
        if best.get("epoch") == epoch:
            keep_as(last, folder / BEST)
        if history:
            keep_as(last, folder / f"checkpoint-{epoch}.pth")
            numbered = [path for path in folder.glob("checkpoint-*.pth") if path.stem[11:].isdigit()]
            kept = sorted(numbered, key=lambda path: accuracy.get(int(path.stem[11:]), -1.0))
            for path in kept[:-history]:
                path.unlink()
    except OSError as error:
        raise StopTraining(f"{last} could not be kept under a second name ({error})") from error


def summarise(job: Job, seconds: float) -> None:
    """The closing lines: accuracy, best epoch, time, where things lie."""
    if job.best:
        job.log.line(f"best accuracy {job.best['acc1']:.2f} % in epoch {int(job.best['epoch']) + 1}, "
                     f"trained in {duration(seconds)}")  # fmt: skip
    if job.folder is not None:
        job.log.line(f"checkpoints, log.txt and {SETTINGS} in {job.folder}; curves: tensorboard --logdir "
                     f"{job.args.log_dir or job.folder / CURVES}")  # fmt: skip


def evaluate_only(job: Job) -> None:
    """Prints the accuracy."""
    results = evaluate_all(job)
    lost = len(job.unreadable_val.known)
    images = f"{int(results['images'])} of {int(results['images']) + lost}" if lost else f"{int(results['images'])}"
    job.log.line(f"{images} images: {accuracies(results)}  loss {results['loss']:.4f}")


def evaluate_all(job: Job) -> dict[str, float]:
    """Accuracy and loss of the model, and with an average of the weights also its, as "ema_acc1", …"""
    settings = job.process, job.trainer.autocast, job.trainer.memory_format, job.unreadable_val
    results = evaluate(job.model, job.val_loader, *settings)
    ema = job.trainer.ema
    if ema is not None and not job.args.model_ema_force_cpu:
        averaged = evaluate(ema.module, job.val_loader, *settings)
        results |= {f"ema_{name}": value for name, value in averaged.items() if name != "images"}
    return results


def accuracies(results: dict[str, float]) -> str:
    """Both accuracies, and that of the averaged weights, in words."""
    ema = f"  (average of the weights: {results['ema_acc1']:.2f} %)" if "ema_acc1" in results else ""
    return f"acc@1 {results['acc1']:.2f} %  acc@5 {results['acc5']:.2f} %{ema}"


def measure_throughput(job: Job, warmup: int = 50, rounds: int = 30) -> None:
    """Prints images/s of the model in evaluation on one batch, the mean of 30 passes after 50."""
    images, labels, _ = next(iter(job.val_loader))
    images = images[labels != NONE].to(job.process.device, memory_format=job.trainer.memory_format)
    if not len(images):
        raise StopTraining("not one image of the first evaluation batch could be read")
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
