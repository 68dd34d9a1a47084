"""What `--eval` and `--throughput` do with a run, and the evaluation after each epoch."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from common.class_report import BY_CLASS, CONFUSION, ClassReport, write_report
from common.data.bad_samples import NO_IMAGE
from common.engine import evaluate
from common.errors import StopTraining
from common.run import Run
from common.trainer import autocast


def evaluate_models(run: Run, reports: dict[str, ClassReport] | None = None) -> dict[str, float]:
    """Accuracy and loss of the model and, as "ema_acc1", …, of the average of its weights.

    Args:
        reports: gets each one's labels and predictions, under "" and "ema_".
    """
    trainer = run.trainer
    models = {"": trainer.raw_model}
    if trainer.ema is not None and not run.args.model_ema_force_cpu:
        models["ema_"] = trainer.ema.module
    results: dict[str, float] = {}
    for prefix, model in models.items():
        report = ClassReport() if reports is not None else None
        settings = run.process, trainer.autocast, trainer.memory_format, run.bad_val_samples, report
        scores = evaluate(model, run.val_loader, *settings)
        results |= {f"{prefix}{name}": value for name, value in scores.items() if not prefix or name != "images"}
        if reports is not None and report is not None:
            reports[prefix] = report
    return results


def format_accuracy(results: dict[str, float]) -> str:
    """`evaluate_models`' accuracies in words."""
    ema = f"  (average of the weights: {results['ema_acc1']:.2f} %)" if "ema_acc1" in results else ""
    return f"acc@1 {results['acc1']:.2f} %  acc@5 {results['acc5']:.2f} %{ema}"


def evaluate_only(run: Run) -> None:
    """Print the accuracy, for `--eval`; write that of each class and the confusion matrix to the output folder."""
    reports: dict[str, ClassReport] = {}
    results = evaluate_models(run, reports if run.args.output_dir else None)
    counted, unreadable = int(results["images"]), len(run.bad_val_samples.known)
    images = f"{counted} of {counted + unreadable}" if unreadable else f"{counted}"
    run.logger.print(f"{images} images: {format_accuracy(results)}  loss {results['loss']:.4f}")
    for prefix, report in reports.items():
        pairs = report.gather()
        if run.process.is_main:
            folder = Path(run.args.output_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_report(folder, prefix, pairs, run.trainer.classes, run.class_names)
            except OSError as error:
                raise StopTraining(f"--output-dir {folder}: not writable ({error.strerror or error})") from error
            run.logger.print(f"by class: {folder / (prefix + BY_CLASS)}, {folder / (prefix + CONFUSION)}")


def measure_throughput(run: Run, warmup: int = 50, rounds: int = 30) -> None:
    """Print images/s of the model in evaluation on one batch, the mean of `rounds` passes, for `--throughput`."""
    device, trainer = run.process.device, run.trainer
    images, labels, _ = next(iter(run.val_loader))
    images = images[labels != NO_IMAGE].to(device, memory_format=trainer.memory_format)
    if not len(images):
        raise StopTraining("no image of the first evaluation batch could be read")
    model = trainer.raw_model.eval()
    with torch.no_grad(), autocast(device, trainer.autocast):
        for _ in range(warmup):
            model(images)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(rounds):
            model(images)
        synchronize(device)
    seconds = time.perf_counter() - start
    run.logger.print(f"throughput: {rounds * len(images) / seconds:.1f} images/s in batches of {len(images)}")


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
