"""Run: everything that a run is made of, built from its arguments."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.utils.data import DataLoader

from common.args import RESUME_MAY_CHANGE, SETTINGS_OF_OLD_RUNS, STREAMS
from common.checkpoint.class_names import CLASS_NAMES
from common.checkpoint.hub_format import begin_folder, hub_config
from common.checkpoint.manager import CheckpointManager
from common.checkpoint.resume import (
    ResumeOptions,
    ResumePoint,
    ResumeSource,
    archive_stale_checkpoints,
    find_resume_source,
    latest_fingerprint,
    restore,
    run_settings,
)
from common.checkpoint.sources import describe_unused_weights, find_weights
from common.checkpoint.state import RunIdentity, as_json
from common.checkpoint.weights import InitialWeights, read_initial_weights
from common.data.bad_samples import BadSampleCounter
from common.data.datasets import check_classes, open_dataset
from common.data.loader import build_eval_loader, build_train_loader
from common.data.shards import ShardDataset
from common.data.transforms import Preprocessing, evaluation_transform
from common.data_config import (
    augment_config,
    dataset_config,
    loader_config,
    preprocessing_config,
    resolve_preprocessing,
)
from common.distributed import Process
from common.flag_types import MODEL_SOURCES
from common.logger import Logger
from common.model_card import describe_run
from common.model_checks import has_batch_norm
from common.models import read_model_config
from common.optim import check_learning_rates
from common.recipe import Recipe
from common.run_dir import BEST_MODEL, LAST_MODEL, SETTINGS, atomic_write, lock_run_dir, remove_stale_tmp
from common.run_report import describe, run_metadata
from common.signals import StopRequest
from common.train_args import TrainArgs
from common.trainer import Trainer, build_trainer, weights_adapter

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """All that a run is made of."""

    recipe: Recipe
    args: TrainArgs
    process: Process
    trainer: Trainer
    train_loader: DataLoader | None  # None without training
    val_loader: DataLoader
    batches: int  # of an epoch, on each rank
    bad_train_samples: BadSampleCounter
    bad_val_samples: BadSampleCounter
    logger: Logger
    folder: Path | None  # for checkpoints and logs
    lock: FileLock | None  # on the folder
    checkpoints: CheckpointManager
    identity: RunIdentity
    class_names: list[str] | None  # in the order of the labels; None where the dataset does not say
    preprocessing: Preprocessing
    description: dict[str, str]  # for model cards
    start: ResumePoint
    stop: StopRequest

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return self.identity.steps_per_epoch

    def close(self, drain_s: float | None = None) -> None:
        """Let the checkpoint in progress reach the disk, for at most `drain_s` seconds, and release the folder."""
        self.checkpoints.drain(drain_s)
        self.logger.close()
        if self.lock is not None:
            self.lock.release()


def build_run(recipe: Recipe, args: TrainArgs, process: Process, stop: StopRequest | None = None) -> Run:
    """Build everything and restore the checkpoint that the run starts from; the output folder is written last.

    Args:
        stop: set by the signals that ask the run to stop.

    Raises:
        ValueError: bad input, in one sentence.
    """
    notes = check_training(recipe, args, process) if args.trains else []
    named = find_weights(args.resume, args.model) if args.resume else None
    fingerprint = latest_fingerprint(Path(args.output_dir))
    options = ResumeOptions(
        output_dir=args.output_dir,
        resume=args.resume,
        weights=named,
        auto_resume=args.auto_resume,
        evaluate=args.eval,
        requires_checkpoint=args.eval and not (args.throughput or args.finetune),
        start_epoch=args.start_epoch,
        finetune=args.finetune,
    )
    source = find_resume_source(options, process)
    initial = read_initial_weights(args.finetune, args.model) if args.finetune and source is None else None
    finetunes = initial is not None and args.trains
    saved, saved_notes = read_saved_settings(source, initial, finetunes)
    notes += saved_notes
    weights = initial.source if initial is not None else source
    pretrained_cfg = weights.pretrained_cfg if weights is not None else None
    if pretrained_cfg is None and args.model.startswith(MODEL_SOURCES):
        pretrained_cfg = read_model_config(args.model).pretrained_cfg
    args = resolve_preprocessing(recipe, args, saved, pretrained_cfg, finetunes)

    val_data = open_dataset(dataset_config(args), train=False)
    train_data = open_dataset(dataset_config(args), train=True) if args.trains else val_data
    classes = count_classes(recipe, args, check_classes(train_data, val_data))
    if recipe.classes is not None:  # as checkpoints of this recipe have it
        args = args.replace(nb_classes=classes)
    check_targets(args, classes)
    train_loader, batches = None, 1
    if args.trains:
        train_loader, batches = build_train_loader(train_data, loader_config(args), augment_config(args), process)
    class_names, preprocessing = train_data.class_names, preprocessing_config(args)
    trainer = build_trainer(recipe, args, process, classes, batches, class_names, initial, resuming=source is not None)
    # on a stream each worker reads a part of its own: another number of them is another order of the images
    may_change = RESUME_MAY_CHANGE - ({"num_workers"} if args.data_set.startswith(STREAMS) else set())
    identity = RunIdentity(
        settings=vars(args),
        may_change=may_change,
        steps_per_epoch=math.ceil(batches / args.accum_iter),
        passes=trainer.passes,
        class_names=class_names,
        preprocessing=as_json(asdict(preprocessing)),
    )
    start = ResumePoint(args.start_epoch)
    if source is not None:
        adapt = weights_adapter(recipe, named if source.named else None)
        start = restore(source, options, identity, trainer, adapt)
    if not start.ema_restored:
        trainer.drop_ema()
    if args.trains and args.batch_size == 1 and has_batch_norm(trainer.raw_model):
        notes.append("--batch-size 1: batch norm takes its statistics from one image at a time")

    val_loader = build_eval_loader(val_data, loader_config(args), evaluation_transform(preprocessing), process)

    folder = Path(args.output_dir) if args.trains and args.output_dir else None
    lock, config, metadata = None, None, run_metadata(args, process)
    notes += trainer.notes
    notes += [note for data in ((train_data, val_data) if args.trains else (val_data,)) for note in data.notes]
    if args.trains and source is None and not args.finetune:
        notes += describe_unused_weights(args.model)
    notes += start.notes
    if folder is not None and process.is_main:
        lock = open_run_dir(folder, source, fingerprint, metadata)
        for data in (train_data, val_data):
            if isinstance(data, ShardDataset):
                data.save_index()
    try:
        if folder is not None and process.is_main:
            config = begin_exports(folder, recipe, args, trainer, identity, notes)
        logger = open_logger(recipe, args, process, folder, identity.steps_per_epoch, start)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    for line in (*describe(recipe, args, process, trainer, identity.steps_per_epoch), *notes):
        logger.print(line)
    return Run(
        recipe=recipe,
        args=args,
        process=process,
        trainer=trainer,
        train_loader=train_loader,
        val_loader=val_loader,
        batches=batches,
        bad_train_samples=BadSampleCounter(len(train_data), "training", logger.print),
        bad_val_samples=BadSampleCounter(len(val_data), "evaluation", logger.print),
        logger=logger,
        folder=folder,
        lock=lock,
        checkpoints=CheckpointManager(
            folder if process.is_main else None, args.keep_last, args.checkpoint_hist, config
        ),
        identity=identity,
        class_names=class_names,
        preprocessing=preprocessing,
        description=describe_run(args, classes, identity.preprocessing, metadata),
        start=start,
        stop=stop if stop is not None else StopRequest(),  # one without a signal is falsy
    )


def read_saved_settings(
    source: ResumeSource | None, initial: InitialWeights | None, finetunes: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """The settings of the run whose checkpoint is loaded, None for a file of another origin; and what to print of them.

    What an older version did not save is added to them, in the checkpoint's content too, as it was then in force.
    """
    if source is not None:
        path, saved = source.name, run_settings(source.content)
    elif initial is not None:
        path, saved = initial.source.label, run_settings(initial.content)
        if finetunes and saved is not None and CLASS_NAMES in initial.content:  # names tell the labels
            saved = {name: value for name, value in saved.items() if name != "class_order"}
    else:
        return None, []
    if saved is None or "mean" in saved:
        return saved, []
    saved.update({name: value for name, value in SETTINGS_OF_OLD_RUNS.items() if name not in saved})
    size = "" if finetunes else "the size and crop of that run, "
    kept = f"ImageNet's mean and std, {size}class folders in the order of strings"
    return saved, [f"{path}: saved by an older version, without preprocessing; what was in force is kept: {kept}"]


def check_training(recipe: Recipe, args: TrainArgs, process: Process) -> list[str]:
    """Check the learning rates that this number of processes leads to; return the lines to print about them.

    Raises:
        ValueError: the learning rate is below the lowest.
    """
    global_batch = args.batch_size * process.world_size * args.accum_iter
    return check_learning_rates(args, recipe.scale_lr(args, global_batch), global_batch)


def count_classes(recipe: Recipe, args: TrainArgs, dataset_classes: int | None) -> int:
    """The classes of the model: `--nb-classes`, as many as the data set has, or the recipe's."""
    if dataset_classes == 1:
        raise ValueError(f"--data-set {args.data_set}: holds one class only; two or more are needed")
    if args.nb_classes is None:
        classes = dataset_classes or recipe.classes
        if classes is None:
            raise ValueError(f"--data-set {args.data_set}: number of classes unknown; pass --nb-classes")
        return classes
    if dataset_classes is not None and dataset_classes > args.nb_classes:
        raise ValueError(f"--nb-classes {args.nb_classes}: the data set has {dataset_classes} classes")
    if args.nb_classes < 2:
        raise ValueError(f"--nb-classes {args.nb_classes}: two or more are needed")
    return args.nb_classes


def check_targets(args: TrainArgs, classes: int) -> None:
    """Refuse label smoothing that lifts every class above `--bce-target-thresh`.

    Raises:
        ValueError: names the flag and a value that works.
    """
    threshold = args.bce_target_thresh
    if args.bce_loss and threshold is not None and args.smoothing / classes > threshold:
        raise ValueError(
            f"--smoothing {args.smoothing}: with --bce-loss it lifts all {classes} classes above --bce-target-thresh "
            f"{threshold:g}, so that each becomes a target; use --smoothing 0, as the papers do"
        )


def open_run_dir(
    folder: Path, source: ResumeSource | None, fingerprint: tuple[int, int] | None, metadata: dict[str, Any]
) -> FileLock | None:
    """Create and lock the output folder, archive the checkpoints that the run does not continue, write args.json.

    Args:
        fingerprint: of the newest checkpoint when the run looked for one to resume.

    Raises:
        ValueError: it cannot be written, or another run uses it.
    """
    lock = lock_run_dir(folder)
    try:
        if latest_fingerprint(folder) != fingerprint:
            raise ValueError(
                f"--output-dir {folder}: another run updated this folder; re-run the command to resume from it"
            )
        remove_stale_tmp(folder)
        archive_stale_checkpoints(folder, source)
        with atomic_write(folder / SETTINGS) as file:
            file.write(json.dumps(metadata, indent=2).encode())
    except BaseException as error:
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            raise ValueError(f"--output-dir {folder}: not writable ({error.strerror or error})") from error
        raise
    return lock


def begin_exports(
    folder: Path, recipe: Recipe, args: TrainArgs, trainer: Trainer, identity: RunIdentity, notes: list[str]
) -> bytes | None:
    """Create best/ and last/ with their config.json → its content; None, and a line in `notes`, where timm has no such
    model.

    Raises:
        ValueError: they cannot be written.
    """
    try:
        config = hub_config(
            trainer.raw_model, recipe.hub_architecture(args), identity.class_names, identity.preprocessing
        )
    except ValueError as error:
        notes.append(f"--model {args.model}: no {BEST_MODEL}/ and {LAST_MODEL}/ for timm to load ({error})")
        return None
    try:
        for name in (BEST_MODEL, LAST_MODEL):
            begin_folder(folder / name, config)
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: not writable ({error.strerror or error})") from error
    return config


def open_logger(
    recipe: Recipe, args: TrainArgs, process: Process, folder: Path | None, steps_per_epoch: int, start: ResumePoint
) -> Logger:
    """Open the logs where the run starts.

    Raises:
        ValueError: they cannot be written.
    """
    try:
        return Logger(
            folder,
            process.is_main,
            args.epochs,
            steps_per_epoch,
            start_epoch=start.epoch,
            start_step=start.progress.step if start.progress is not None else 0,
            curve_steps=recipe.curve_steps,
            tensorboard_dir=args.log_dir,
            history=start.log,
        )
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: not writable ({error.strerror or error})") from error
