"""Whole runs of the entry point: what they say and write, and that their steps are the right ones."""

from __future__ import annotations

import contextlib
import copy
import csv
import fcntl
import io
import json
import os
import pty
import random
import re
import struct
import subprocess
import termios

import numpy as np
import pytest
import timm
import torch
import torchvision

from common import train
from common.args import parse
from common.checkpoint.state import as_json
from common.class_report import BY_CLASS, CONFUSION
from common.data_config import resolve_preprocessing
from common.distributed import Process
from common.engine import evaluate
from common.run import Run, build_run
from common.trainer import autocast_dtype
from deit.recipe import RECIPE
from tests.commands import ROOT, command, environment, run
from tests.compare_runs import diff_nested
from tests.runs import (
    FLAGS,
    ONE_PROCESS,
    load_checkpoint,
    log_entries,
    read_scalars,
    start,
    train_for,
)


def test_what_a_run_says(finished):
    _, out, said = finished
    assert "3 classes\n" in said and "AugSub(masking, ratio=0.5, token drop)" in said
    assert "training: 2 epochs of 6 steps of 8 images; 1 process on cpu, float32" in said
    assert re.search(r"epoch 2/2  step 6/6  loss [\d.]+  sub [\d.]+  lr [\d.e-]+  \d+ img/s  left 0:00", said)
    best = max(entry["test_acc1"] for entry in log_entries(out))
    assert re.search(rf"best accuracy {best:.2f} % in epoch [12], trained in 0:\d\d\n", said)
    assert f"checkpoints, log.txt and args.json in {out}; curves: tensorboard --logdir {out}/tensorboard" in said


def test_what_a_run_writes(finished):
    flags, out, said = finished
    checkpoints = {"checkpoint.pth", "best_checkpoint.pth", "previous_checkpoint_1.pth"}
    assert checkpoints | {".running", "args.json", "log.txt", "tensorboard", "best", "last"} == set(os.listdir(out))
    entries = log_entries(out)
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert entries[0].keys() == {"train_lr", "train_loss", "train_sub_loss", "test_acc1", "test_acc5", "test_loss",
                                 "test_ema_acc1", "test_ema_acc5", "test_ema_loss", "epoch", "n_parameters"}  # fmt: skip
    assert entries[0]["train_sub_loss"] != entries[0]["train_loss"]
    reported = [float(loss) for loss in re.findall(r"epoch 1/2 .* loss ([\d.]+) ", said)]
    assert entries[0]["train_loss"] == pytest.approx(sum(reported) / 3, abs=1e-4), "three windows of 16 images"
    assert entries[0]["train_lr"] == pytest.approx(1e-2 * 8 / 512)

    settings = json.loads((out / "args.json").read_text())
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert settings["commit"] == (head.stdout.strip() or None)
    assert {name: settings["versions"][name] for name in ("torch", "timm", "torchvision")} == {
        "torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}  # fmt: skip
    assert (settings["processes"], settings["device"], settings["args"]["augsub"]) == (1, "cpu", "masking")
    args = resolve_preprocessing(RECIPE, parse(RECIPE, [*FLAGS, *flags, "--output-dir", str(out)]))
    assert settings["args"] == as_json(vars(args))


def test_the_curves(finished):
    _, out, _ = finished
    curves, entries = read_scalars(out), log_entries(out)
    assert set(curves.Tags()["scalars"]) == {
        "train/loss", "train/sub_loss", "train/lr", "speed/images_per_second", "test/acc1", "test/acc5", "test/loss",
        "test/ema_acc1", "test/ema_acc5", "test/ema_loss"}  # fmt: skip
    assert [point.step for point in curves.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    for name in ("loss", "sub_loss"):
        points = [point.value for point in curves.Scalars(f"train/{name}")]
        assert sum(points[:3]) / 3 == pytest.approx(entries[0][f"train_{name}"], rel=1e-5)
    for name in ("acc1", "loss", "ema_loss"):
        assert [(point.step, point.value) for point in curves.Scalars(f"test/{name}")] == [
            (6, pytest.approx(entries[0][f"test_{name}"])), (12, pytest.approx(entries[1][f"test_{name}"]))]  # fmt: skip


def test_the_averaged_weights_are_evaluated(finished):
    flags, out, _ = finished
    run = build_run(RECIPE, parse(RECIPE, [*FLAGS, *flags]), ONE_PROCESS)
    for part, prefix in (("model", "test_"), ("model_ema", "test_ema_")):
        run.trainer.raw_model.load_state_dict(load_checkpoint(out)[part])
        result = evaluate(run.trainer.raw_model, run.val_loader, ONE_PROCESS)
        for name in ("loss", "acc1"):
            assert result[name] == pytest.approx(log_entries(out)[-1][prefix + name], rel=1e-5)
    assert log_entries(out)[-1]["test_loss"] != log_entries(out)[-1]["test_ema_loss"]


def test_the_best_checkpoint_is_the_best_epochs(finished):
    _, out, _ = finished
    scores = [entry["test_acc1"] for entry in log_entries(out)]
    best = load_checkpoint(out, "best_checkpoint.pth")
    assert best["epoch"] == scores.index(max(scores)) == load_checkpoint(out)["best"]["epoch"]
    assert best["best"]["acc1"] == load_checkpoint(out)["best"]["acc1"] == max(scores)


def test_evaluation_gives_what_was_logged(continued, tmp_path, capsys):
    flags, out = continued
    last = log_entries(out)[-1]
    expected = f"15 images: acc@1 {last['test_acc1']:.2f} %  acc@5 100.00 %"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    start(*flags, "--eval")
    said = capsys.readouterr().out
    assert expected in said and f"(average of the weights: {last['test_ema_acc1']:.2f} %)" in said
    assert f"loss {last['test_loss']:.4f}" in said
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    tables = {out / f"{part}{name}" for part in ("", "ema_") for name in (BY_CLASS, CONFUSION)}
    assert after.keys() - tables == before.keys() and before.items() <= after.items(), "nothing else is written"
    torch.save(load_checkpoint(out)["model"], tmp_path / "bare.pth")
    for flag in ("--resume", "--finetune"):
        start(*flags[:2], "--eval", flag, str(tmp_path / "bare.pth"))
        said = capsys.readouterr().out
        assert expected in said and f"loss {last['test_loss']:.4f}" in said


@pytest.mark.slow
def test_two_processes_from_another_folder_evaluate_as_one(continued, tmp_path):
    flags, out = continued
    (tmp_path / "elsewhere").mkdir()
    start(*flags, "--eval")
    names = [f"{part}{name}" for part in ("", "ema_") for name in (BY_CLASS, CONFUSION)]
    tables = {name: (out / name).read_text() for name in names}
    for name in names:
        (out / name).unlink()
    done = run(*FLAGS, *flags, "--eval", "--dist-eval", cwd=tmp_path / "elsewhere", processes=2)
    last = log_entries(out)[-1]
    assert {name: (out / name).read_text() for name in names} == tables
    for part in ("", "ema_"):
        by_class = list(csv.DictReader(io.StringIO(tables[part + BY_CLASS])))
        matrix = list(csv.reader(io.StringIO(tables[part + CONFUSION])))
        assert (
            [row["class"] for row in by_class]
            == [row[0] for row in matrix[1:]]
            == matrix[0][1:]
            == ["cat", "dog", "owl"]
        )
        assert [int(row["images"]) for row in by_class] == [sum(map(int, row[1:])) for row in matrix[1:]] == [5, 5, 5]
        correct = [int(row["correct"]) for row in by_class]
        assert correct == [int(row[1 + label]) for label, row in enumerate(matrix[1:])]
        assert sum(correct) == pytest.approx(15 * last[f"test_{part}acc1"] / 100)
    assert f"15 images: acc@1 {last['test_acc1']:.2f} %" in done.stdout, done.stderr
    assert f"(average of the weights: {last['test_ema_acc1']:.2f} %)  loss {last['test_loss']:.4f}" in done.stdout
    assert done.stdout.count("15 images") == 1, "one process speaks"
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_machine_without_git_trains_too(jpegs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    start("--data-path", str(jpegs()), "--output-dir", str(tmp_path / "out"), "--epochs", "1")
    assert json.loads((tmp_path / "out" / "args.json").read_text())["commit"] is None


def test_finetuning_starts_from_the_weights_with_a_new_head(finished, jpegs):
    _, out, _ = finished
    four = jpegs(classes=("cat", "dog", "hen", "owl"), name="four")
    args = parse(RECIPE, [*FLAGS, "--data-path", str(four), "--finetune", str(out / "checkpoint.pth")])
    run = build_run(RECIPE, args, ONE_PROCESS)
    weights = load_checkpoint(out)["model"]
    ours = run.trainer.raw_model.state_dict()
    assert ours["head.weight"].shape == (4, 64)
    assert all(torch.equal(ours[name], weights[name]) for name in ours if not name.startswith("head."))
    assert diff_nested(run.trainer.ema.module.state_dict(), dict(ours)) == []
    means, _ = train_for(run, 2, report_every=2)
    assert means["loss"] < 10 and run.start.epoch == 0


def build_sgd_run(data: str, *flags: str) -> Run:
    args = parse(RECIPE, [*FLAGS, "--data-path", data, "--mixup", "0", "--cutmix", "0", "--opt", "sgd", "--unscale-lr",
                          "--drop-path", "0", *flags])  # fmt: skip
    return build_run(RECIPE, args, ONE_PROCESS)


def epoch_of(run: Run, batches: int | None = None) -> tuple[dict[str, float], list]:
    return train_for(run, batches)


def assert_same_update(run: Run, other: torch.nn.Module, start_of_both: torch.nn.Module) -> None:
    """Both models moved from the start by the same vectors, to a thousandth of their length."""
    for ours, theirs, before in zip(run.trainer.raw_model.parameters(), other.parameters(), start_of_both.parameters()):
        moved = (theirs - before).norm()
        assert moved > 0 and (ours - theirs).norm() <= 1e-3 * moved + 1e-7


def test_accumulated_batches_update_as_one_large_batch(jpegs):
    data = str(jpegs())
    large, parts = (
        build_sgd_run(data, "--batch-size", "16"),
        build_sgd_run(data, "--batch-size", "8", "--accum-iter", "2"),
    )
    before = copy.deepcopy(large.trainer.raw_model)
    (large_means, _), (part_means, reports) = epoch_of(large), epoch_of(parts)
    assert (large.batches, parts.batches) == (2, 4)
    assert [report.images for report in reports] == [16, 16]
    assert part_means == pytest.approx(large_means, rel=1e-4)
    assert_same_update(parts, large.trainer.raw_model, before)


def test_an_epoch_that_accumulation_does_not_divide_uses_every_batch(jpegs):
    """Against plain steps on 12, 12 and 8 images."""
    run = build_sgd_run(str(jpegs()), "--batch-size", "4", "--accum-iter", "3")
    model, before = copy.deepcopy(run.trainer.raw_model), copy.deepcopy(run.trainer.raw_model)
    optimizer = type(run.trainer.optimizer)(model.parameters(), **{
        name: value for name, value in run.trainer.optimizer.defaults.items() if name != "weight_decay"})  # fmt: skip
    batches = list(run.train_loader)
    means, reports = epoch_of(run)
    assert [(report.images, report.step, report.steps) for report in reports] == [(12, 1, 3), (12, 2, 3), (8, 3, 3)]
    for report, group in zip(reports, (batches[:3], batches[3:6], batches[6:])):
        images, labels = (torch.cat([batch[i] for batch in group]) for i in range(2))
        loss = torch.nn.functional.cross_entropy(model.train()(images), labels, label_smoothing=0.1)
        assert report.loss == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        for parameter, group_of in zip(model.parameters(), groups_of(run)):
            parameter.grad.add_(parameter.detach(), alpha=group_of["weight_decay"])
        for group_of in optimizer.param_groups:
            group_of["lr"] = report.lr
        optimizer.step()
    assert means["loss"] == pytest.approx(sum(r.loss * r.images for r in reports) / 32, rel=1e-5)
    assert_same_update(run, model, before)


def test_what_is_reported_is_each_models_own_loss(jpegs):
    """Not its weighted half. At ratio 0 the sub-model's is the entropy of the main model's output."""
    run = build_sgd_run(str(jpegs()), "--augsub", "masking", "--augsub-ratio", "0", "--batch-size", "32")
    images, labels, _ = next(iter(run.train_loader))
    logits = copy.deepcopy(run.trainer.raw_model).train()(images).detach()
    means, (report,) = epoch_of(run)
    main = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert (means["loss"], means["sub_loss"]) == (pytest.approx(main, rel=1e-4), pytest.approx(entropy, rel=1e-4))
    assert (report.loss, report.sub_loss) == (pytest.approx(means["loss"]), pytest.approx(means["sub_loss"]))


def test_the_average_follows_the_weights(jpegs):
    run = build_sgd_run(str(jpegs()), "--batch-size", "32")
    before = run.trainer.raw_model.head.weight.clone()
    epoch_of(run)
    after = run.trainer.raw_model.head.weight
    assert not torch.equal(before, after)
    assert run.trainer.ema is not None
    torch.testing.assert_close(run.trainer.ema.module.head.weight, (before + after) / 2)


def test_epochs_processes_and_seeds_draw_differently(jpegs, monkeypatch):
    """From a state that an epoch starts with by itself, whatever was drawn before; and in another order of images."""
    data, train_epoch = str(jpegs()), train.train_epoch
    drawn: list = []

    def look(trainer, loader, *rest):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        orders.append(list(run.train_loader.sampler))
        return train_epoch(trainer, loader, *rest)

    monkeypatch.setattr(train, "train_epoch", look)
    for flags, rank in (([], 0), ([], 1), (["--seed", "1"], 0)):
        run = build_sgd_run(data, *flags)
        run.process = Process(run.process.device, rank)
        orders: list = []
        train.fit(run)
        assert len(orders) == 2 and [i for i, _ in orders[0]] != [i for i, _ in orders[1]]
    for i in range(3):
        assert len({draw[i] for draw in drawn}) == len(drawn) == 6


def groups_of(run: Run) -> list[dict]:
    """The optimizer's group of each parameter."""
    group_of = {id(p): group for group in run.trainer.optimizer.param_groups for p in group["params"]}
    return [group_of[id(p)] for p in run.trainer.raw_model.parameters()]


@pytest.mark.parametrize("flags", [
    ["--amp", "bf16"], ["--amp", "fp16"], ["--channels-last"], ["--attn-only"], ["--src", "--ThreeAugment"],
    ["--clip-grad", "1.0"], ["--opt", "fusedlamb"], ["--bce-loss", "--smoothing", "0"], ["--augsub", "none"], ["--augsub", "dropout"],
    ["--augsub", "droppath"], ["--sched", "step"], ["--lr-noise", "0.1", "0.9"], ["--data-set", "DIGITS"],
], ids=" ".join)  # fmt: skip
def test_each_way_to_train_learns_and_stays_finite(flags, jpegs):
    base = ["--augsub", "masking", "--data-path", str(jpegs()), "--batch-size", "16"]
    run = build_run(RECIPE, parse(RECIPE, [*FLAGS, *base, *flags]), ONE_PROCESS)
    before = [p.clone() for p in run.trainer.raw_model.parameters()]
    means, _ = train_for(run, 2, report_every=2)
    assert set(means) == {"lr", "loss"} | ({"sub_loss"} if "none" not in flags else set())
    assert all(0 < value < 10 for value in means.values())
    moved = [not torch.equal(p, b) for p, b in zip(run.trainer.raw_model.parameters(), before)]
    assert moved == [p.requires_grad for p in run.trainer.raw_model.parameters()]
    assert all(p.isfinite().all() for p in run.trainer.raw_model.parameters())
    assert evaluate(run.trainer.raw_model, run.val_loader, ONE_PROCESS, run.trainer.autocast)["loss"] < 10


def test_the_precision_that_is_asked_for_computes(jpegs):
    seen = {}
    for amp in ("bf16", "fp16", "off"):
        run = build_sgd_run(str(jpegs(name=amp)), "--amp", amp)
        kinds: list = []
        run.trainer.raw_model.blocks[0].mlp.fc1.register_forward_hook(
            lambda module, x, y, kinds=kinds: kinds.append(y.dtype)
        )
        epoch_of(run, batches=1)
        seen[amp] = kinds
        assert run.trainer.scaler.is_enabled() == (amp == "fp16")
        assert all(p.dtype is torch.float32 and p.grad is None for p in run.trainer.raw_model.parameters())
        assert {block.attn.fused_attn for block in run.trainer.raw_model.blocks} == {amp != "bf16"}
    assert seen == {"bf16": [torch.bfloat16], "fp16": [torch.float16], "off": [torch.float32]}


@pytest.mark.parametrize(("processor", "instructions", "amx", "expected"), [
    ("AMD EPYC", True, False, torch.bfloat16), ("AMD EPYC", False, False, None), ("Intel(R) Xeon(R)", True, False, None),
    ("Intel(R) Xeon(R)", True, True, torch.bfloat16),
])  # fmt: skip
def test_bf16_is_the_default_where_a_processor_is_faster_in_it(processor, instructions, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": processor}, raising=False)
    assert autocast_dtype(None, torch.device("cpu")) is expected
    assert autocast_dtype("off", torch.device("cpu")) is None


@pytest.mark.slow
def test_compiled_training_equals_eager(jpegs):
    data = str(jpegs())
    flags = ["--augsub", "dropout", "--augsub-ratio", "0"]
    eager, compiled = build_sgd_run(data, *flags), build_sgd_run(data, *flags, "--compile")
    before = copy.deepcopy(eager.trainer.raw_model)
    expected, _ = epoch_of(eager)
    assert epoch_of(compiled)[0] == pytest.approx(expected, rel=1e-4)
    assert_same_update(compiled, eager.trainer.raw_model, before)


def test_nothing_is_written_without_an_output_folder(jpegs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = jpegs()
    start("--data-path", str(data), "--epochs", "1")
    assert os.listdir(tmp_path) == ["images"]
    assert "nothing will be saved" in capsys.readouterr().out


@pytest.mark.slow
def test_a_terminal_of_80_columns_gets_a_bar_with_all_figures(jpegs, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    flags = [*FLAGS, "--data-path", str(jpegs()), "--augsub", "masking", "--epochs", "1", "--log-interval", "1"]
    process = subprocess.Popen(command(*flags), cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end is the process's
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait() == 0
    bars = [line for line in re.split(r"[\r\n]", shown.decode()) if line.startswith("epoch 1/1 ") and "%|" in line]
    assert any(re.search(r"loss [\d.]+  sub [\d.]+  lr [\d.e-]+  \d+ img/s  left 0:00", bar) for bar in bars), shown
    assert max(map(len, bars)) <= 80


def test_the_next_epochs_images_are_on_their_way_while_this_one_is_evaluated(jpegs, monkeypatch):
    events: list[str] = []
    for name in ("iterate_epoch", "evaluate_models"):
        plain = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *given, name=name, plain=plain: events.append(name) or plain(*given))
    start("--data-path", str(jpegs()), "--output-dir", "")
    assert events == ["iterate_epoch", "iterate_epoch", "evaluate_models", "evaluate_models"]
