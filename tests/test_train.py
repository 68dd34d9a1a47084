"""Whole runs of the entry point: what is written, resumed, refused, and how a run stops."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import checkpoint, train
from common.args import parse
from common.dist import Process
from common.engine import train_one_epoch
from deit.recipe import RECIPE
from tests.conftest import ROOT, command, environment, run

FLAGS = ["--model", "deit_pico_patch8_LS", "--input-size", "32", "--num-workers", "0", "--batch-size", "8", "--epochs",
         "2", "--warmup-epochs", "0", "--amp", "off", "--reprob", "0", "--aa", "none", "--no-repeated-aug",
         "--model-ema-decay", "0.5", "--log-interval", "2", "--lr", "1e-2"]  # fmt: skip


def start(*flags: str) -> None:
    """Runs the recipe in this process."""
    train.run(RECIPE, [*FLAGS, *flags])


def refused(capsys, *flags: str) -> str:
    """What a run that ends with status 2 says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        start(*flags)
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def final(folder: Path) -> dict:
    return checkpoint.load(folder / "checkpoint.pth")


def same_state(some: Path, other: Path) -> bool:
    """Whether weights, averaged weights and optimizer state are equal to the bit."""
    a, b = final(some), final(other)
    pairs = [(a[part][name], b[part][name]) for part in ("model", "model_ema") for name in a[part]]
    moments = [
        (a["optimizer"]["state"][i][name], b["optimizer"]["state"][i][name])
        for i in a["optimizer"]["state"]
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return all(torch.equal(x, y) for x, y in pairs + moments) and a["best"] == b["best"] and a["epoch"] == b["epoch"]


@pytest.fixture
def finished(jpegs, tmp_path, monkeypatch, capsys):
    """A finished run with AugMask → its flags, its folder and what it said."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data-path", str(jpegs()), "--augsub", "masking", "--output-dir", str(tmp_path / "out")]
    start(*flags)
    return flags, tmp_path / "out", capsys.readouterr().out


def test_a_run_writes_what_it_should_and_resumes_evaluates_and_refuses(finished, capsys):
    flags, out, said = finished
    assert "AugSub(masking, ratio=0.5, token drop)" in said
    assert "epoch 2/2  step 4/4  loss " in said and "  sub " in said and "img/s" in said
    assert "best accuracy" in said and f"checkpoints, log.txt and args.json in {out}" in said
    assert {"args.json", "best_checkpoint.pth", "checkpoint.pth", "log.txt", "tensorboard"} == set(os.listdir(out))

    entries = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert {"train_lr", "train_loss", "train_sub_loss", "test_loss", "test_acc1", "test_acc5", "test_ema_acc1",
            "epoch", "n_parameters"} <= set(entries[0])  # fmt: skip
    assert entries[0]["train_sub_loss"] != entries[0]["train_loss"]

    settings = json.loads((out / "args.json").read_text())
    assert settings["args"]["augsub"] == "masking" and settings["versions"]["timm"] and settings["processes"] == 1

    curves = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"train/loss", "train/sub_loss", "train/lr", "test/acc1", "test/ema_acc1"} <= set(curves.Tags()["scalars"])
    assert [point.step for point in curves.Scalars("train/loss")] == [2, 4, 6, 8]
    assert curves.Scalars("test/acc1")[-1].value == pytest.approx(entries[-1]["test_acc1"])

    # relaunched: nothing to do
    before = (out / "checkpoint.pth").read_bytes()
    start(*flags)
    assert "all 2 epochs are trained already" in capsys.readouterr().out
    assert (out / "checkpoint.pth").read_bytes() == before

    # evaluated: the accuracy that was logged
    start(*flags, "--eval")
    assert f"12 images: acc@1 {entries[-1]['test_acc1']:.2f} %" in capsys.readouterr().out

    # other settings in its folder: refused, and continued where asked for by name
    error = refused(capsys, *flags, "--epochs", "3")
    assert "holds a run with other settings (epochs 2 → 3): choose another --output-dir" in error
    start(*flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"))
    assert "continuing at epoch 3" in capsys.readouterr().out
    assert final(out)["epoch"] == 2

    # another model: named tensors
    error = refused(capsys, *flags, "--resume", str(out / "checkpoint.pth"), "--model", "deit_tiny_patch16_LS")
    assert "is of another architecture: cls_token (1, 1, 64) where the model has (1, 1, 192)" in error


def test_a_killed_run_ends_with_the_same_bits(jpegs, tmp_path):
    """kill -9 within the second epoch; the same command then continues."""
    base = ["--data-path", str(jpegs(train=120)), "--augsub", "masking", "--output-dir"]
    start(*base, str(tmp_path / "undisturbed"))
    flags = [*base, str(tmp_path / "killed")]
    killed = subprocess.Popen(command(*FLAGS, *flags), cwd=tmp_path, stdout=subprocess.DEVNULL, env=environment())
    while not (tmp_path / "killed" / "checkpoint.pth").exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert final(tmp_path / "killed")["epoch"] == 0
    done = run(*FLAGS, *flags, cwd=tmp_path)
    assert "continuing at epoch 2" in done.stdout, done.stderr
    assert same_state(tmp_path / "undisturbed", tmp_path / "killed")
    entries = [json.loads(line)["epoch"] for line in (tmp_path / "killed" / "log.txt").read_text().splitlines()]
    assert entries == [0, 1]


def test_two_processes_from_another_folder_evaluate_as_one(finished, tmp_path):
    flags, out, _ = finished
    (tmp_path / "elsewhere").mkdir()
    done = run(*FLAGS, *flags, "--eval", "--dist-eval", cwd=tmp_path / "elsewhere", processes=2)
    last = json.loads((out / "log.txt").read_text().splitlines()[-1])
    assert f"12 images: acc@1 {last['test_acc1']:.2f} %" in done.stdout, done.stderr


def test_two_processes_train_and_a_nan_on_one_stops_both(jpegs, tmp_path):
    """The second process's third step yields NaN; the first hears of it within the logging interval."""
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
    assert "training stopped: the loss was not finite at step 5" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "epoch 2/2  step 2/4" not in done.stdout, "stopped within the interval"
    assert final(out)["epoch"] == 0, "the last good checkpoint is left"


def test_bad_input_before_training(jpegs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data-path", str(jpegs())]
    assert "unknown model 'deit_pico_patch8' : did" not in refused(capsys, *data, "--model", "deit_pico_patch8")
    assert "did you mean deit_pico_patch8_LS" in refused(capsys, *data, "--model", "deit_pico_patch8")
    assert "ResNet has no place for dropout" in refused(capsys, *data, "--model", "resnet18", "--augsub", "dropout")
    assert "--eval needs weights" in refused(capsys, *data, "--eval")
    assert "--opt adamq: timm could not make" in refused(capsys, *data, "--opt", "adamq")
    assert "there is no such checkpoint" in refused(capsys, *data, "--resume", "none.pth")
    assert "--nb-classes 1: the data set has 2 classes" in refused(capsys, *data, "--nb-classes", "1")
    (tmp_path / "file").write_text("")
    assert "--output-dir file: not writable" in refused(capsys, *data, "--output-dir", "file")
    assert os.listdir(tmp_path / "images") and not (tmp_path / "output").exists()


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(finished, tmp_path, capsys, monkeypatch):
    flags, out, _ = finished
    before = (out / "checkpoint.pth").read_bytes()

    def no_space(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", no_space)
    error = refused(capsys, *flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"))
    assert "could not be written ([Errno 28] No space left on device); the one before is still there" in error
    assert (out / "checkpoint.pth").read_bytes() == before


def test_too_many_unreadable_images_stop_the_run(jpegs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = jpegs()
    (folder / "train" / "cat" / "003.jpg").write_bytes(b"")
    error = refused(capsys, "--data-path", str(folder), "--output-dir", "out")
    assert "training stopped: 1 of 32 training images could not be read, more than 1 %" in error
    assert not Path("out", "checkpoint.pth").exists()


def test_finetuning_starts_from_the_weights_with_a_new_head(finished, jpegs, tmp_path, capsys):
    _, out, _ = finished
    three = jpegs(classes=("cat", "dog", "owl"), name="three")
    args = parse(RECIPE, [*FLAGS, "--data-path", str(three), "--finetune", str(out / "checkpoint.pth")])
    job = train.prepare(RECIPE, args, Process(torch.device("cpu")))
    weights = final(out)["model"]
    assert job.model.head.weight.shape == (3, 64)
    assert torch.equal(job.model.state_dict()["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])


def job_for(data: str, *flags: str) -> train.Job:
    args = parse(RECIPE, [*FLAGS, "--data-path", data, "--mixup", "0", "--cutmix", "0", "--opt", "sgd", *flags])
    return train.prepare(RECIPE, args, Process(torch.device("cpu")))


def test_accumulated_batches_update_as_one_large_batch(jpegs):
    data = str(jpegs())
    large = job_for(data, "--batch-size", "16", "--drop-path", "0", "--unscale-lr")
    parts = job_for(data, "--batch-size", "4", "--accum-iter", "4", "--drop-path", "0", "--unscale-lr")
    for job in (large, parts):
        train_one_epoch(job.trainer, job.train_loader, job.batches, 0, 1, lambda report: None, job.unreadable)
    assert (large.batches, parts.batches) == (2, 8)
    for a, b in zip(large.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_epoch_that_accumulation_does_not_divide_uses_every_batch(jpegs):
    job = job_for(str(jpegs()), "--batch-size", "4", "--accum-iter", "3", "--augsub", "droppath")
    reports: list = []
    before = [p.clone() for p in job.model.parameters()]
    means = train_one_epoch(job.trainer, job.train_loader, job.batches, 0, 1, reports.append, job.unreadable)
    assert [report.seen for report in reports] == [12, 12, 8]
    assert [report.update for report in reports] == [1, 2, 3]
    assert set(means) == {"lr", "loss", "sub_loss"}
    assert any(not torch.equal(a, b) for a, b in zip(before, job.model.parameters()))


@pytest.mark.parametrize("flags", [
    ["--amp", "bf16"], ["--amp", "fp16"], ["--channels-last"], ["--attn-only"], ["--src", "--ThreeAugment"],
    ["--clip-grad", "1.0"], ["--opt", "fusedlamb"], ["--bce-loss"], ["--augsub", "none"], ["--augsub", "dropout"],
    ["--sched", "step"], ["--lr-noise", "0.1", "0.9"], ["--data-set", "DIGITS"],
], ids=" ".join)  # fmt: skip
def test_each_way_to_train_takes_finite_steps(flags, jpegs):
    base = ["--augsub", "masking", "--data-path", str(jpegs())]
    job = train.prepare(RECIPE, parse(RECIPE, [*FLAGS, *base, *flags]), Process(torch.device("cpu")))
    means = train_one_epoch(job.trainer, job.train_loader, 3, 0, 2, lambda report: None, job.unreadable)
    assert all(value == value and abs(value) < 100 for value in means.values())
    assert all(p.isfinite().all() for p in job.model.parameters())


def test_compiled_training_equals_eager(jpegs):
    data = str(jpegs())
    results = []
    for flags in ([], ["--compile"]):
        job = job_for(data, "--augsub", "dropout", "--augsub-ratio", "0", "--drop-path", "0", *flags)
        results.append(train_one_epoch(job.trainer, job.train_loader, 3, 0, 1, lambda r: None, job.unreadable)["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_nothing_is_written_without_an_output_folder(jpegs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = jpegs()
    before = sorted(os.listdir(tmp_path))
    start("--data-path", str(data), "--epochs", "1")
    assert sorted(os.listdir(tmp_path)) == before
    assert "nothing will be saved" in capsys.readouterr().out


def test_a_terminal_of_80_columns_gets_a_bar_with_all_figures(jpegs, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    flags = [*FLAGS, "--data-path", str(jpegs()), "--augsub", "masking", "--epochs", "1", "--log-interval", "1"]
    process = subprocess.Popen(command(*flags), cwd=tmp_path, stdout=theirs, stderr=theirs)
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
