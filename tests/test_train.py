"""Whole runs of the entry point: what is written, resumed, refused, and how a run stops."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import checkpoint, train
from common.args import parse
from common.dist import Process
from common.engine import Trainer, evaluate, train_one_epoch
from deit.recipe import RECIPE
from tests.conftest import ROOT, command, environment, make_jpegs, make_shards, run

FLAGS = ["--model", "deit_pico_patch8_LS", "--input-size", "32", "--num-workers", "0", "--batch-size", "8", "--epochs",
         "2", "--warmup-epochs", "0", "--amp", "off", "--reprob", "0", "--aa", "none", "--no-repeated-aug",
         "--model-ema-decay", "0.5", "--log-interval", "2", "--lr", "1e-2"]  # fmt: skip
# every place at which a run draws at random
RANDOM = ["--augsub", "masking", "--drop-path", "0.2", "--drop", "0.1", "--reprob", "0.3", "--aa",
          "rand-m9-mstd0.5-inc1", "--mixup", "0.8", "--cutmix", "1.0"]  # fmt: skip
ALONE = Process(torch.device("cpu"))


def start(*flags: str) -> None:
    """Runs the recipe in this process."""
    train.run(RECIPE, [*FLAGS, *flags])


def refused(capsys, *flags: str, status: int = 2) -> str:
    """The one sentence of a run that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        start(*flags)
    assert leaving.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def final(folder: Path, name: str = "checkpoint.pth") -> dict:
    return checkpoint.load(folder / name)


def differences(some: Any, other: Any, at: str = "") -> list[str]:
    """Where two checkpoints' contents differ, to the bit."""
    if isinstance(some, dict) and isinstance(other, dict) and some.keys() == other.keys():
        return [found for key in some for found in differences(some[key], other[key], f"{at}/{key}")]
    if isinstance(some, (list, tuple)) and isinstance(other, (list, tuple)) and len(some) == len(other):
        return [found for i, pair in enumerate(zip(some, other)) for found in differences(*pair, f"{at}/{i}")]
    same = torch.equal(some, other) if isinstance(some, torch.Tensor) else some == other
    return [] if same else [at]


def assert_same_bits(some: Path, other: Path, name: str = "checkpoint.pth") -> None:
    """Two runs' checkpoints and logs are equal, but for the settings that may differ."""
    a, b = final(some, name), final(other, name)
    assert a.pop("args").keys() == b.pop("args").keys()
    assert a["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    assert not differences(a, b)
    assert log_of(some) == log_of(other)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def interrupt_epoch(monkeypatch, number: int) -> None:
    """A Ctrl-C at the end of the epoch of that number, counted from 0, and of no other."""
    plain = train.train_one_epoch

    def interrupted(trainer, loader, batches, epoch, *rest):
        means = plain(trainer, loader, batches, epoch, *rest)
        if epoch == number:
            raise KeyboardInterrupt
        return means

    monkeypatch.setattr(train, "train_one_epoch", interrupted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with AugMask that was left alone → its flags without the folder, its folder, what it said."""
    place = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = make_jpegs(place / "images", train=16, val=5, classes=("cat", "dog", "owl"))
    flags = ["--data-path", str(data), *RANDOM]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        start(*flags, "--output-dir", str(place / "out"))
    torch.set_num_threads(threads)
    return flags, place / "out", said.getvalue()


@pytest.fixture
def continued(finished, tmp_path):
    """A copy of the finished run, to go on with → all its flags, its folder."""
    flags, out, _ = finished
    shutil.copytree(out, tmp_path / "copy")
    return [*flags, "--output-dir", str(tmp_path / "copy")], tmp_path / "copy"


def test_what_a_run_says(finished):
    _, out, said = finished
    assert "3 classes\n" in said and "AugSub(masking, ratio=0.5, token drop)" in said
    assert "training: 2 epochs of 6 steps of 8 images; 1 process on cpu, float32" in said
    assert re.search(r"epoch 2/2  step 6/6  loss [\d.]+  sub [\d.]+  lr [\d.e-]+  \d+ img/s  left 0:00", said)
    best = max(entry["test_acc1"] for entry in log_of(out))
    assert re.search(rf"best accuracy {best:.2f} % in epoch [12], trained in 0:\d\d\n", said)
    assert f"checkpoints, log.txt and args.json in {out}; curves: tensorboard --logdir {out}/tensorboard" in said


def test_what_a_run_writes(finished):
    flags, out, said = finished
    assert {"args.json", "best_checkpoint.pth", "checkpoint.pth", "log.txt", "tensorboard"} == set(os.listdir(out))
    entries = log_of(out)
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
    assert settings["args"] == train.plain(vars(parse(RECIPE, [*FLAGS, *flags, "--output-dir", str(out)])))


def curves_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_the_curves(finished):
    _, out, _ = finished
    curves, entries = curves_of(out), log_of(out)
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


def test_the_curves_of_a_continued_run_have_every_point_once(continued, capsys, monkeypatch):
    """Continued after an interruption, and then started for nothing."""
    flags, out = continued
    flags = [*flags, "--epochs", "4", "--resume", str(out / "checkpoint.pth")]
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 3)
        refused(capsys, *flags, status=130)
    for _ in range(2):
        start(*flags)
        curves = curves_of(out)
        assert [point.step for point in curves.Scalars("train/loss")] == list(range(2, 25, 2))
        assert [point.step for point in curves.Scalars("test/acc1")] == [6, 12, 18, 24]


def test_the_averaged_weights_are_evaluated(finished):
    flags, out, _ = finished
    job = train.prepare(RECIPE, parse(RECIPE, [*FLAGS, *flags]), ALONE)
    for part, prefix in (("model", "test_"), ("model_ema", "test_ema_")):
        job.model.load_state_dict(final(out)[part])
        result = evaluate(job.model, job.val_loader, ALONE)
        for name in ("loss", "acc1"):
            assert result[name] == pytest.approx(log_of(out)[-1][prefix + name], rel=1e-5)
    assert log_of(out)[-1]["test_loss"] != log_of(out)[-1]["test_ema_loss"]


def test_the_best_checkpoint_is_the_best_epochs(finished):
    _, out, _ = finished
    scores = [entry["test_acc1"] for entry in log_of(out)]
    best = final(out, "best_checkpoint.pth")
    assert best["epoch"] == scores.index(max(scores)) == final(out)["best"]["epoch"]
    assert best["best"]["acc1"] == final(out)["best"]["acc1"] == max(scores)


def test_a_finished_run_trains_nothing_when_relaunched(continued, capsys):
    flags, out = continued
    before = {name: (out / name).read_bytes() for name in ("checkpoint.pth", "best_checkpoint.pth", "log.txt")}
    start(*flags)
    said = capsys.readouterr().out
    assert "all 2 epochs are trained already" in said and "epoch 2/2" not in said
    assert {name: (out / name).read_bytes() for name in before} == before


def test_evaluation_gives_what_was_logged(continued, tmp_path, capsys):
    flags, out = continued
    last = log_of(out)[-1]
    expected = f"15 images: acc@1 {last['test_acc1']:.2f} %  acc@5 100.00 %"
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    start(*flags, "--eval")
    said = capsys.readouterr().out
    assert expected in said and f"(average of the weights: {last['test_ema_acc1']:.2f} %)" in said
    assert f"loss {last['test_loss']:.4f}" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before, "nothing is written"
    torch.save(final(out)["model"], tmp_path / "bare.pth")
    for flag in ("--resume", "--finetune"):
        start(*flags[:2], "--eval", flag, str(tmp_path / "bare.pth"))
        said = capsys.readouterr().out
        assert expected in said and f"loss {last['test_loss']:.4f}" in said


def test_other_settings_in_its_folder_are_refused(continued, capsys):
    flags, out = continued
    before = (out / "args.json").read_bytes()
    error = refused(capsys, *flags, "--epochs", "3", "--lr", "0.5")
    assert "holds a run with other settings (epochs 2 → 3, lr 0.01 → 0.5): choose another --output-dir" in error
    assert f"--resume {out / 'checkpoint.pth'}" in error
    assert "augsub masking → none" in refused(capsys, *flags, "--augsub", "none")
    assert (out / "args.json").read_bytes() == before
    start(*flags, "--log-interval", "3", "--num-workers", "1", "--no-pin-mem")
    assert "all 2 epochs" in capsys.readouterr().out, "what does not change the result may change"


def test_a_run_continues_from_a_file_that_is_named(finished, tmp_path, capsys):
    """One epoch of one run, and the second of another, are the run that was left alone."""
    flags, out, _ = finished
    start(*flags, "--epochs", "1", "--output-dir", str(tmp_path / "first"))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    capsys.readouterr()
    named = str(tmp_path / "first" / "checkpoint.pth")
    start(*flags, "--resume", named, "--output-dir", str(tmp_path / "second"))
    assert f"continuing at epoch 2 from {named}" in capsys.readouterr().out
    assert_same_bits(tmp_path / "second", out)
    assert final(tmp_path / "first")["epoch"] == 0, "the file that was named is left alone"


def test_a_run_of_upstreams_continues_with_its_weights(finished, tmp_path, capsys):
    flags, out, _ = finished
    torch.save({"model": final(out)["model"], "epoch": 0}, tmp_path / "upstream.pth")
    start(*flags, "--resume", str(tmp_path / "upstream.pth"))
    said = capsys.readouterr().out
    assert "upstream.pth is not of this trainer: its weights are used from epoch 1 on, with a fresh optimizer" in said
    assert "epoch 2/2  step 6/6" in said and "epoch 1/2" not in said


def test_ctrl_c_ends_with_one_line_and_the_same_command_continues(finished, tmp_path, capsys, monkeypatch):
    flags, out, _ = finished
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        flags = [*flags, "--output-dir", str(tmp_path / "out")]
        error = refused(capsys, *flags, status=130)
    assert "interrupted; the same command continues from the last checkpoint" in error
    assert final(tmp_path / "out")["epoch"] == 0
    start(*flags)
    assert "continuing at epoch 2" in capsys.readouterr().out
    assert_same_bits(tmp_path / "out", out)
    assert_same_bits(tmp_path / "out", out, "best_checkpoint.pth")


def test_a_run_killed_between_its_two_files_has_both_in_the_end(finished, tmp_path, capsys, monkeypatch):
    flags, out, _ = finished

    def killed(*paths):
        raise KeyboardInterrupt

    best = int(final(out)["best"]["epoch"])
    with monkeypatch.context() as patch:
        keep_as = checkpoint.keep_as
        calls: list = []
        patch.setattr(
            checkpoint, "keep_as", lambda *paths: (calls.append(0), (killed if len(calls) > best else keep_as)(*paths))
        )
        refused(capsys, *flags, "--output-dir", str(tmp_path / "out"), status=130)
    start(*flags, "--output-dir", str(tmp_path / "out"))
    assert_same_bits(tmp_path / "out", out, "best_checkpoint.pth")


def test_a_killed_run_ends_with_the_same_bits(finished, tmp_path, capsys):
    """kill -9 in the middle of the second epoch of a run with loader processes; the same command then continues."""
    flags, out, _ = finished
    flags = [*flags, "--output-dir", str(tmp_path / "out")]
    killed = subprocess.Popen(
        command(*FLAGS, *flags, "--num-workers", "1", "--log-interval", "1"),
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    assert killed.stdout is not None
    said = [next(line for line in killed.stdout if line.startswith("epoch 2/2  step 3/6"))]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert said and final(tmp_path / "out")["epoch"] == 0
    with open(tmp_path / "out" / "log.txt", "a") as file:
        file.write('{"epoch": 1, "train_lo')  # as a machine that goes down leaves it
    start(*flags)
    assert "continuing at epoch 2" in capsys.readouterr().out
    assert_same_bits(tmp_path / "out", out)


def shard_flags(folder: Path, **kwargs: Any) -> list[str]:
    return [*make_shards(folder, **kwargs), "--nb-classes", "24", "--batch-size", "4", *RANDOM]


def test_a_killed_run_on_shards_ends_with_the_same_bits(tmp_path, capsys, monkeypatch):
    flags = [*shard_flags(tmp_path / "shards"), "--output-dir"]
    start(*flags, str(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        refused(capsys, *flags, str(tmp_path / "killed"), status=130)
    start(*flags, str(tmp_path / "killed"))
    assert_same_bits(tmp_path / "undisturbed", tmp_path / "killed")


def test_too_many_unreadable_images_in_shards_stop_the_run(tmp_path, capsys):
    error = refused(capsys, *shard_flags(tmp_path / "shards", broken={("train", 0, 4)}))
    assert "1 of 24 training images could not be read, more than 1 %" in error


def test_two_processes_from_another_folder_evaluate_as_one(continued, tmp_path):
    flags, out = continued
    (tmp_path / "elsewhere").mkdir()
    done = run(*FLAGS, *flags, "--eval", "--dist-eval", cwd=tmp_path / "elsewhere", processes=2)
    last = log_of(out)[-1]
    assert f"15 images: acc@1 {last['test_acc1']:.2f} %" in done.stdout, done.stderr
    assert f"(average of the weights: {last['test_ema_acc1']:.2f} %)  loss {last['test_loss']:.4f}" in done.stdout
    assert done.stdout.count("15 images") == 1, "one process speaks"
    assert os.listdir(tmp_path / "elsewhere") == []


def test_two_processes_train_and_a_nan_on_one_stops_both(jpegs, tmp_path):
    """The second process's sixth loss is NaN; the first hears of it within the logging interval."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import dataclasses, os, sys
sys.path[0] = {str(ROOT)!r}
import torch
from common.recipe import classification_loss
from common.train import run
from deit.recipe import RECIPE

calls = 0

def loss(args, mixed):
    usual = classification_loss(args, mixed)
    def injected(logits, target):
        global calls
        calls += 1
        value = usual(logits, target)
        return value * float("nan") if os.environ["RANK"] == "1" and calls == 6 else value
    return injected

run(dataclasses.replace(RECIPE, loss=loss))
""")
    out = tmp_path / "out"
    flags = [*FLAGS, "--data-path", str(jpegs()), "--output-dir", str(out), "--log-interval", "2", "--batch-size", "4"]
    done = run(*flags, cwd=tmp_path, entry=str(driver), processes=2)
    assert "2 processes on cpu" in done.stdout
    assert "epoch 1/2  acc@1" in done.stdout
    stops = [line for line in done.stderr.splitlines() if "training stopped" in line]
    assert len(stops) == 1 and "the loss was not finite at step 2 of 4 in epoch 2" in stops[0], done.stderr
    assert "exitcode  : 2" in done.stderr and f'File "{driver}"' not in done.stderr
    assert "epoch 2/2  step" not in done.stdout, "stopped within the interval"
    assert final(out)["epoch"] == 0, "the last good checkpoint is left"
    assert sorted(os.listdir(out)) == ["args.json", "best_checkpoint.pth", "checkpoint.pth", "log.txt", "tensorboard"]


def test_weights_that_are_not_finite_are_not_saved(continued, capsys, monkeypatch):
    """The last step of an epoch is the one to ruin them: no loss has seen them yet."""
    flags, out = continued
    before = (out / "checkpoint.pth").read_bytes()
    update = Trainer.update

    def ruin(trainer):
        update(trainer)
        with torch.no_grad():
            trainer.parameters[0].view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "update", ruin)
    flags = [*flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"), "--batch-size", "48"]
    error = refused(capsys, *flags)
    assert re.search(r"training stopped: .* holds values that are not finite\); the one before is still there", error)
    assert (out / "checkpoint.pth").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(continued, capsys):
    flags, out = continued
    before = (out / "checkpoint.pth").read_bytes()
    error = refused(capsys, *flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"), "--unscale-lr",
                    "--lr", "1e38", "--warmup-lr", "1e38", "--min-lr", "1e38")  # fmt: skip
    assert "training stopped: the loss was not finite at step 2 of 6 in epoch 3" in error
    assert (out / "checkpoint.pth").read_bytes() == before


def test_bad_input_ends_before_training(jpegs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data-path", str(jpegs()), "--output-dir", "out"]
    assert "did you mean deit_pico_patch8_LS" in refused(capsys, *data, "--model", "deit_pico_patch8")
    assert "ResNet has no place for dropout" in refused(capsys, *data, "--model", "resnet18", "--augsub", "dropout")
    assert "--eval needs weights" in refused(capsys, *data, "--eval")
    assert "--opt adamq: timm could not make" in refused(capsys, *data, "--opt", "adamq")
    assert "cosin" in refused(capsys, *data, "--sched", "cosin")
    assert "unknown device 'gpu': use cuda or cpu" in refused(capsys, *data, "--device", "gpu")
    assert "there is no such checkpoint" in refused(capsys, *data, "--resume", "none.pth")
    assert "there is no such checkpoint" in refused(capsys, *data, "--finetune", "none.pth")
    assert "--nb-classes 1: the data set has 2 classes" in refused(capsys, *data, "--nb-classes", "1")
    assert "are fewer than one batch: --batch-size 64" in refused(capsys, *data, "--batch-size", "64")
    assert "none: there is no such folder" in refused(capsys, *data, "--data-path", str(tmp_path / "none"))
    assert os.listdir(tmp_path) == ["images"], "nothing is written"
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        assert f"--output-dir {place}: not writable" in refused(capsys, *data, "--output-dir", place)
    (tmp_path / "images" / "val" / "dog").rename(tmp_path / "images" / "val" / "hen")
    assert "different classes" in refused(capsys, *data)
    assert sorted(os.listdir(tmp_path)) == ["file", "images"]


def test_another_model_is_refused_by_its_tensors(continued, capsys):
    flags, out = continued
    error = refused(capsys, *flags, "--resume", str(out / "checkpoint.pth"), "--model", "deit_tiny_patch16_LS")
    assert "is of another architecture: cls_token (1, 1, 64) where the model has (1, 1, 192)" in error
    error = refused(capsys, *flags, "--resume", str(out / "checkpoint.pth"), "--opt", "sgd", "--attn-only")
    assert "its optimizer state does not fit --opt sgd" in error


UNUSABLE = [
    ["--opt-betas", "0.9"], ["--aa", "rnad-m9"], ["--aa", "rand-x9"], ["--train-interpolation", "cubic"],
    ["--remode", "pixels", "--reprob", "0.5"], ["--cutmix-minmax", "0.5"], ["--cutmix-minmax", "0.8", "0.2"],
    ["--ratio", "0", "0"], ["--input-size", "4"], ["--start-epoch", "-1"], ["--decay-epochs", "0", "--sched", "step"],
    ["--bce-loss", "--smoothing", "0.1"], ["--opt-betas", "0.9", "1.0"], ["--scale", "1", "0.5"], ["--lr", "nan"],
]  # fmt: skip


@pytest.mark.parametrize("flags", UNUSABLE, ids=" ".join)
def test_values_that_cannot_be_used_are_refused_by_their_flags(flags, jpegs, capsys):
    assert flags[0] in refused(capsys, "--data-path", str(jpegs()), *flags)


def test_a_negative_seed_is_refused_by_its_flag(jpegs, capsys):
    assert "--seed" in refused(capsys, "--data-path", str(jpegs()), "--seed", "-1")


def test_shards_need_the_number_of_their_classes(tmp_path, capsys):
    flags = make_shards(tmp_path / "shards")
    assert "does not tell its classes: --nb-classes must" in refused(capsys, *flags)


def test_a_machine_without_git_trains_too(jpegs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    start("--data-path", str(jpegs()), "--output-dir", str(tmp_path / "out"), "--epochs", "1")
    assert json.loads((tmp_path / "out" / "args.json").read_text())["commit"] is None


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(finished, small_disk, capsys):
    """The first checkpoint has room, the second has not beside it."""
    flags, out, _ = finished
    size = (out / "checkpoint.pth").stat().st_size
    place = small_disk(f"{int(1.5 * size) // 1024}k") / "out"
    error = refused(capsys, *flags, "--output-dir", str(place))
    assert "checkpoint.pth could not be written" in error and "the one before is still there" in error
    assert final(place)["epoch"] == 0
    assert sorted(os.listdir(place)) == ["args.json", "best_checkpoint.pth", "checkpoint.pth", "log.txt", "tensorboard"]


def test_a_label_beyond_the_classes_stops_the_run(tmp_path, capsys):
    assert "--nb-classes" in refused(capsys, *make_shards(tmp_path / "shards"), "--nb-classes", "4")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_from_the_start(finished, small_disk, capsys):
    flags, _, _ = finished
    assert "disk/out" in refused(capsys, *flags, "--output-dir", str(small_disk("4k") / "out"))


def test_unreadable_images_are_named_once_and_training_goes_on(jpegs, capsys):
    folder = jpegs(train=60)
    broken = folder / "train" / "cat" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    start("--data-path", str(folder), "--batch-size", "40")
    said = capsys.readouterr().out
    assert said.count(f"unreadable training image, another takes its place: {broken}\n") == 1
    assert "epoch 2/2  acc@1" in said


def test_too_many_unreadable_images_stop_the_run(jpegs, tmp_path, capsys):
    folder = jpegs()
    (folder / "train" / "cat" / "003.jpg").write_bytes(b"")
    error = refused(capsys, "--data-path", str(folder), "--output-dir", str(tmp_path / "out"))
    assert "training stopped: 1 of 32 training images could not be read, more than 1 %" in error
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.parametrize("split", [
    "train", "val"
])  # fmt: skip
def test_images_none_of_which_can_be_read_stop_the_run(split, jpegs, capsys):
    folder = jpegs()
    for path in folder.glob(f"{split}/*/*"):
        path.write_bytes(b"")
    assert "training stopped: " in refused(capsys, "--data-path", str(folder))


def test_unreadable_evaluation_images_are_named(jpegs, capsys):
    folder = jpegs()
    broken = folder / "val" / "cat" / "003.jpg"
    broken.write_bytes(b"")
    start("--data-path", str(folder), "--epochs", "1")
    assert str(broken) in capsys.readouterr().out


def test_finetuning_starts_from_the_weights_with_a_new_head(finished, jpegs):
    _, out, _ = finished
    four = jpegs(classes=("cat", "dog", "hen", "owl"), name="four")
    args = parse(RECIPE, [*FLAGS, "--data-path", str(four), "--finetune", str(out / "checkpoint.pth")])
    job = train.prepare(RECIPE, args, ALONE)
    weights = final(out)["model"]
    ours = job.model.state_dict()
    assert ours["head.weight"].shape == (4, 64)
    assert all(torch.equal(ours[name], weights[name]) for name in ours if not name.startswith("head."))
    assert differences(job.trainer.ema.module.state_dict(), dict(ours)) == []
    means = train_one_epoch(job.trainer, job.train_loader, 2, 0, 2, lambda report: None, job.unreadable)
    assert means["loss"] < 10 and job.epoch == 0


def job_for(data: str, *flags: str) -> train.Job:
    args = parse(RECIPE, [*FLAGS, "--data-path", data, "--mixup", "0", "--cutmix", "0", "--opt", "sgd", "--unscale-lr",
                          "--drop-path", "0", *flags])  # fmt: skip
    return train.prepare(RECIPE, args, ALONE)


def epoch_of(job: train.Job, batches: int | None = None) -> tuple[dict[str, float], list]:
    reports: list = []
    batches = job.batches if batches is None else batches
    return train_one_epoch(job.trainer, job.train_loader, batches, 0, 1, reports.append, job.unreadable), reports


def assert_same_update(job: train.Job, other: torch.nn.Module, start_of_both: torch.nn.Module) -> None:
    """Both models moved from the start by the same vectors, to a thousandth of their length."""
    for ours, theirs, start in zip(job.model.parameters(), other.parameters(), start_of_both.parameters()):
        moved = (theirs - start).norm()
        assert moved > 0 and (ours - theirs).norm() <= 1e-3 * moved + 1e-7


def test_accumulated_batches_update_as_one_large_batch(jpegs):
    data = str(jpegs())
    large, parts = job_for(data, "--batch-size", "16"), job_for(data, "--batch-size", "8", "--accum-iter", "2")
    before = copy.deepcopy(large.model)
    (large_means, _), (part_means, reports) = epoch_of(large), epoch_of(parts)
    assert (large.batches, parts.batches) == (2, 4)
    assert [report.seen for report in reports] == [16, 16]
    assert part_means == pytest.approx(large_means, rel=1e-4)
    assert_same_update(parts, large.model, before)


def test_an_epoch_that_accumulation_does_not_divide_uses_every_batch(jpegs):
    """Against plain steps on 12, 12 and 8 images."""
    job = job_for(str(jpegs()), "--batch-size", "4", "--accum-iter", "3")
    model, before = copy.deepcopy(job.model), copy.deepcopy(job.model)
    optimizer = type(job.trainer.optimizer)(model.parameters(), **{
        name: value for name, value in job.trainer.optimizer.defaults.items() if name != "weight_decay"})  # fmt: skip
    batches = list(job.train_loader)
    means, reports = epoch_of(job)
    assert [(report.seen, report.update, report.updates) for report in reports] == [(12, 1, 3), (12, 2, 3), (8, 3, 3)]
    for report, group in zip(reports, (batches[:3], batches[3:6], batches[6:])):
        images, labels = (torch.cat([batch[i] for batch in group]) for i in range(2))
        loss = torch.nn.functional.cross_entropy(model.train()(images), labels, label_smoothing=0.1)
        assert report.loss == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        for parameter, group_of in zip(model.parameters(), groups_of(job)):
            parameter.grad.add_(parameter.detach(), alpha=group_of["weight_decay"])
        for group_of in optimizer.param_groups:
            group_of["lr"] = report.lr
        optimizer.step()
    assert means["loss"] == pytest.approx(sum(r.loss * r.seen for r in reports) / 32, rel=1e-5)
    assert_same_update(job, model, before)


def test_what_is_reported_is_each_models_own_loss(jpegs):
    """Not its weighted half. At ratio 0 the sub-model's is the entropy of the main model's output."""
    job = job_for(str(jpegs()), "--augsub", "masking", "--augsub-ratio", "0", "--batch-size", "32")
    images, labels, _ = next(iter(job.train_loader))
    logits = copy.deepcopy(job.model).train()(images).detach()
    means, (report,) = epoch_of(job)
    main = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert (means["loss"], means["sub_loss"]) == (pytest.approx(main, rel=1e-4), pytest.approx(entropy, rel=1e-4))
    assert (report.loss, report.sub_loss) == (pytest.approx(means["loss"]), pytest.approx(means["sub_loss"]))


def test_the_average_follows_the_weights(jpegs):
    job = job_for(str(jpegs()), "--batch-size", "32")
    before = job.model.head.weight.clone()
    epoch_of(job)
    after = job.model.head.weight
    assert not torch.equal(before, after)
    assert job.trainer.ema is not None
    torch.testing.assert_close(job.trainer.ema.module.head.weight, (before + after) / 2)


def test_epochs_processes_and_seeds_draw_differently(jpegs, monkeypatch):
    """From a state that an epoch starts with by itself, whatever was drawn before; and in another order of images."""
    data, plain = str(jpegs()), train.train_one_epoch
    drawn: list = []

    def look(trainer, loader, *rest):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        orders.append(list(loader.sampler))
        return plain(trainer, loader, *rest)

    monkeypatch.setattr(train, "train_one_epoch", look)
    for flags, rank in (([], 0), ([], 1), (["--seed", "1"], 0)):
        job = job_for(data, *flags)
        job.process = Process(job.process.device, rank)
        orders: list = []
        train.train(job)
        assert len(orders) == 2 and [i for i, _ in orders[0]] != [i for i, _ in orders[1]]
    for i in range(3):
        assert len({draw[i] for draw in drawn}) == len(drawn) == 6


def groups_of(job: train.Job) -> list[dict]:
    """The optimizer's group of each parameter."""
    group_of = {id(p): group for group in job.trainer.optimizer.param_groups for p in group["params"]}
    return [group_of[id(p)] for p in job.model.parameters()]


@pytest.mark.parametrize("flags", [
    ["--amp", "bf16"], ["--amp", "fp16"], ["--channels-last"], ["--attn-only"], ["--src", "--ThreeAugment"],
    ["--clip-grad", "1.0"], ["--opt", "fusedlamb"], ["--bce-loss", "--smoothing", "0"], ["--augsub", "none"], ["--augsub", "dropout"],
    ["--augsub", "droppath"], ["--sched", "step"], ["--lr-noise", "0.1", "0.9"], ["--data-set", "DIGITS"],
], ids=" ".join)  # fmt: skip
def test_each_way_to_train_learns_and_stays_finite(flags, jpegs):
    base = ["--augsub", "masking", "--data-path", str(jpegs()), "--batch-size", "16"]
    job = train.prepare(RECIPE, parse(RECIPE, [*FLAGS, *base, *flags]), ALONE)
    before = [p.clone() for p in job.model.parameters()]
    means = train_one_epoch(job.trainer, job.train_loader, 2, 0, 2, lambda report: None, job.unreadable)
    assert set(means) == {"lr", "loss"} | ({"sub_loss"} if "none" not in flags else set())
    assert all(0 < value < 10 for value in means.values())
    moved = [not torch.equal(p, b) for p, b in zip(job.model.parameters(), before)]
    assert moved == [p.requires_grad for p in job.model.parameters()]
    assert all(p.isfinite().all() for p in job.model.parameters())
    assert evaluate(job.model, job.val_loader, ALONE, job.trainer.autocast)["loss"] < 10


def test_the_precision_that_is_asked_for_computes(jpegs):
    seen = {}
    for amp in ("bf16", "fp16", "off"):
        job = job_for(str(jpegs(name=amp)), "--amp", amp)
        kinds: list = []
        job.model.blocks[0].mlp.fc1.register_forward_hook(lambda module, x, y, kinds=kinds: kinds.append(y.dtype))
        epoch_of(job, batches=1)
        seen[amp] = kinds
        assert job.trainer.scaler.is_enabled() == (amp == "fp16")
        assert all(p.dtype is torch.float32 and p.grad is None for p in job.model.parameters())
    assert seen == {"bf16": [torch.bfloat16], "fp16": [torch.float16], "off": [torch.float32]}


def test_compiled_training_equals_eager(jpegs):
    data = str(jpegs())
    flags = ["--augsub", "dropout", "--augsub-ratio", "0"]
    eager, compiled = job_for(data, *flags), job_for(data, *flags, "--compile")
    before = copy.deepcopy(eager.model)
    expected, _ = epoch_of(eager)
    assert epoch_of(compiled)[0] == pytest.approx(expected, rel=1e-4)
    assert_same_update(compiled, eager.model, before)


def test_nothing_is_written_without_an_output_folder(jpegs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = jpegs()
    start("--data-path", str(data), "--epochs", "1")
    assert os.listdir(tmp_path) == ["images"]
    assert "nothing will be saved" in capsys.readouterr().out


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
