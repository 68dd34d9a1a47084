"""fit(): the training loop – step, report, save, stop, evaluate – in line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from timm.utils import distribute_bn

from common import distributed, rng
from common.checkpoint.hub_format import Export, is_current
from common.checkpoint.state import checkpoint_state, load_rank_state, rank_state, trainer_state
from common.data.loader import iterate_epoch
from common.engine import LossMeter, Step, train_epoch
from common.evaluation import evaluate_models, format_accuracy
from common.model_card import best_epoch, best_part, model_card
from common.progress import EpochProgress
from common.run import Run
from common.run_dir import BEST_MODEL, LAST, LAST_MODEL, SETTINGS, duration


def fit(run: Run) -> str | None:
    """Train from where the run starts to the end; each epoch ends with an evaluation and a checkpoint.

    Returns:
        None at the end, or the name of the signal that stopped the run before.

    Raises:
        StopTraining: a loss was not finite, the data cannot be read, or a file cannot be written.
    """
    args, trainer, logger, checkpoints, start = run.args, run.trainer, run.logger, run.checkpoints, run.start
    train_loader, start_time, best = run.train_loader, time.time(), dict(start.best)
    assert train_loader is not None
    parameters = sum(p.numel() for p in trainer.parameters)
    if start.links_due and run.folder is not None:  # an earlier start may have been killed after its save
        checkpoints.retain_best_and_top_k(start.epoch - 1, best, logger.json_log.accuracy_by_epoch())
        exports = list_exports(run, start.epoch, ends=start.epoch >= args.epochs)
        newest = run.folder / LAST
        checkpoints.export(trainer_state(trainer), [e for e in exports if not is_current(e.folder, newest)])
    if start.epoch >= args.epochs:
        logger.print(f"all {args.epochs} epochs are trained already")
    run.stop.defer()
    batches = None
    for epoch in range(start.epoch, args.epochs):
        # the order fixes what is drawn: seed, a rank's restored generators, the loader's iterator
        progress = start.progress if epoch == start.epoch else None
        rng.seed_everything(args.seed, run.process.rank, epoch)
        if progress is not None and start.rank_state is not None:
            load_rank_state(trainer, start.rank_state)
        meter = LossMeter(trainer, epoch, run.steps_per_epoch, progress)
        logger.start_epoch(epoch, meter.step)
        if batches is None:
            batches = iterate_epoch(train_loader, epoch, meter.step * args.accum_iter)

        for step in train_epoch(trainer, batches, run.batches, meter, run.bad_train_samples, args.log_interval):
            logger.step()
            checkpoints.check()  # raises what the last write in the background failed with
            if step.report is not None:
                logger.report(epoch, step.report)
            if step.last:
                continue  # the end of the epoch saves and stops
            if stop_agreed(run, step):
                progress = meter.progress()
                save(run, epoch - 1, best, progress, list_exports(run, epoch, ends=True, steps=progress.step))
                logger.end_epoch()
                return finish_stop(run, f"after step {progress.step} of {run.steps_per_epoch} in epoch {epoch + 1}")
            if save_due(run, epoch, step):
                save(run, epoch - 1, best, meter.progress())
        logger.end_epoch()

        # workers load the next epoch's first batches while this one is evaluated
        batches = None
        if epoch + 1 < args.epochs:
            batches = iterate_epoch(train_loader, epoch + 1)
        average_batch_statistics(run)
        results = evaluate_models(run)
        improved = results["acc1"] > best.get("acc1", -1.0)
        if improved:
            best = {"acc1": results["acc1"], "epoch": epoch}
        scores = {name: value for name, value in results.items() if name != "images"}
        logger.epoch(epoch, meter.means(), scores, parameters)
        logger.print(f"epoch {epoch + 1}/{args.epochs}  {format_accuracy(results)}  best {best['acc1']:.2f} %")
        stopping = epoch + 1 < args.epochs and distributed.any_rank(bool(run.stop))
        exports = list_exports(run, epoch + 1, ends=stopping or epoch + 1 == args.epochs)
        if improved or exports or stopping or (epoch + 1) % args.save_freq == 0 or epoch + 1 == args.epochs:
            save(run, epoch, best, exports=exports)
        if run.recipe.writes_summary:
            logger.json_log.write_summary()
        if stopping:
            return finish_stop(run, f"before epoch {epoch + 2}")
    checkpoints.wait()
    if run.recipe.writes_summary:
        logger.json_log.write_summary()  # where an earlier start was killed before it
    print_summary(run, best, time.time() - start_time)
    return None


def stop_agreed(run: Run, step: Step) -> bool:
    """Whether all ranks stop after this step.

    A single rank stops after any step. Several ask each other where a report makes them wait for each other anyway.
    """
    if run.process.world_size == 1:
        return bool(run.stop)
    return step.report is not None and distributed.any_rank(bool(run.stop))


def save_due(run: Run, epoch: int, step: Step) -> bool:
    """Whether `--save-every`, counted over the whole run, asks for a checkpoint after this step."""
    save_every = run.args.save_every if run.folder is not None else 0
    return bool(save_every) and (epoch * run.steps_per_epoch + step.number) % save_every == 0


def save(
    run: Run,
    epoch: int,
    best: dict[str, float],
    progress: EpochProgress | None = None,
    exports: Sequence[Export] = (),
) -> None:
    """Save the state after `epoch`, or at `progress` in the middle of the next one; to be called on all ranks."""
    if run.folder is None:
        return
    run.logger.flush()
    log = run.logger.json_log
    rank_states: list[dict[str, Any]] | None = None
    if progress is not None:
        rank_states = distributed.all_gather(rank_state(run.trainer, progress))
    state = checkpoint_state(run.trainer, run.identity, epoch, best, log.entries, progress, rank_states)
    run.checkpoints.save(state, log.accuracy_by_epoch(), exports)


def list_exports(run: Run, epochs: int, ends: bool, steps: int = 0) -> list[Export]:
    """The folders in timm's hub format to write: best/ after an epoch of the highest accuracy, last/ where a run ends.

    Args:
        epochs: that are complete.
        ends: whether this start trains no further.
        steps: done in the next epoch.
    """
    if run.folder is None or run.checkpoints.config is None:
        return []
    entries = run.logger.json_log.entries
    entry = entries[-1] if entries else None
    position = f"after epoch {epochs} of {run.args.epochs}"
    if steps:
        position = f"after step {steps} of {run.steps_per_epoch} in epoch {epochs + 1} of {run.args.epochs}"
    card = model_card(run.description, best_part(entry), entry, position, run.args.model)
    names = [BEST_MODEL] if not steps and best_epoch(entries) == epochs - 1 else []
    names += [LAST_MODEL] if ends else []
    return [Export(run.folder / name, best_part(entry), card) for name in names]


def finish_stop(run: Run, position: str) -> str:
    """Wait for the checkpoint and say how to resume.

    Returns:
        The name of the signal that stopped the run, of the lowest rank that received one.
    """
    run.checkpoints.wait()
    names = distributed.all_gather(run.stop.signal_name)
    signal_name = next(name for name in names if name is not None)
    outcome = "nothing is saved without --output-dir"
    if run.folder is not None:
        outcome = "checkpoint saved; re-run the command to resume"
    run.logger.print(f"{signal_name}: stopped {position}, {outcome}")
    return signal_name


def average_batch_statistics(run: Run) -> None:
    """Average batch norm's running statistics over the ranks, or take rank 0's, as `--dist-bn` says."""
    if run.process.world_size == 1 or not run.args.dist_bn:
        return
    models = [run.trainer.raw_model] + ([run.trainer.ema.module] if run.trainer.ema is not None else [])
    for model in models:
        distribute_bn(model, run.process.world_size, reduce=run.args.dist_bn == "reduce")


def print_summary(run: Run, best: dict[str, float], seconds: float) -> None:
    """Print the best accuracy, the time, and where the files are."""
    if best:
        epochs = {entry["epoch"] for entry in run.logger.json_log.entries}
        place = "" if best["epoch"] in epochs else f" before --resume {run.args.resume}, of which no file is here"
        accuracy = f"{best['acc1']:.2f} % in epoch {int(best['epoch']) + 1}{place}"
        run.logger.print(f"best accuracy {accuracy}, trained in {duration(seconds)}")
    if run.folder is not None:
        curves = run.logger.tensorboard.folder
        hint = f"; curves: tensorboard --logdir {curves}" if curves is not None else ""
        run.logger.print(f"checkpoints, log.txt and {SETTINGS} in {run.folder}{hint}")
    if run.folder is not None and run.checkpoints.config is not None:
        models = f"{run.folder / BEST_MODEL} and {run.folder / LAST_MODEL}"
        run.logger.print(f"models for timm in {models}; python scripts/predict.py {run.folder / BEST_MODEL} IMAGES")
