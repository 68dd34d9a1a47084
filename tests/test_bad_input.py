"""Bad input, bad data, full disks and losses that are not finite: one sentence, status 2, nothing lost."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

from common import prepare, train
from common.engine import Trainer
from tests.conftest import ROOT, command, environment, make_shards, run, shard_flags
from tests.runs import (
    FLAGS,
    final,
    refused,
    start,
)


def test_too_many_unreadable_images_in_shards_stop_the_run(tmp_path, capsys):
    error = refused(capsys, *shard_flags(tmp_path / "shards", broken={("train", 0, 4)}))
    assert "1 of 24 training images could not be read, more than 1 %" in error


def test_two_processes_train_and_a_nan_on_one_stops_both(jpegs, tmp_path):
    """The second process's sixth loss is NaN; the first hears of it within the logging interval."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import dataclasses, os, sys
sys.path[0] = {str(ROOT)!r}
import torch
from common.optim import classification_loss
from common.run import run
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
    assert sorted(os.listdir(out)) == [".running", "args.json", "best_checkpoint.pth", "checkpoint.pth", "log.txt",
                                       "tensorboard"]  # fmt: skip


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
    assert "--device gpu: unknown, use cuda or cpu" in refused(capsys, *data, "--device", "gpu")
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
    ["--bce-loss", "--smoothing", "0.1"], ["--opt-betas", "0.9", "1.0"], ["--scale", "1", "0.5"], ["--lr", "nan"], ["--lr", "inf"], ["--scale", "0.5", "inf"],
    ["--ratio", "1", "inf"], ["--seed", "99999999999999999999"], ["--opt", "adahessian"], ["--device", "cpu:abc"],
    ["--augsub-block", "32", "--augsub", "masking", "--model", "resnet10t"], ["--input-size", "8", "--augsub", "masking"],
    ["--opt-eps", "0"], ["--lr-noise", "0.1", "0.2", "0.3"],
]  # fmt: skip


@pytest.mark.parametrize("flags", UNUSABLE, ids=" ".join)
def test_values_that_cannot_be_used_are_refused_by_their_flags(flags, jpegs, capsys):
    assert flags[0] in refused(capsys, "--data-path", str(jpegs()), *flags)


def test_a_negative_seed_is_refused_by_its_flag(jpegs, capsys):
    assert "--seed" in refused(capsys, "--data-path", str(jpegs()), "--seed", "-1")


def test_shards_need_the_number_of_their_classes(tmp_path, capsys):
    flags = make_shards(tmp_path / "shards")
    assert "does not tell its classes: --nb-classes must" in refused(capsys, *flags)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(finished, small_disk, capsys):
    """The first checkpoint has room, the second has not beside it."""
    flags, out, _ = finished
    size = (out / "checkpoint.pth").stat().st_size
    place = small_disk(f"{int(1.5 * size) // 1024}k") / "out"
    error = refused(capsys, *flags, "--output-dir", str(place))
    assert "checkpoint.pth could not be written" in error and "the one before is still there" in error
    assert final(place)["epoch"] == 0
    assert sorted(os.listdir(place)) == [
        ".running",
        "args.json",
        "best_checkpoint.pth",
        "checkpoint.pth",
        "log.txt",
        "tensorboard",
    ]


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


def test_what_one_process_alone_finds_is_told(jpegs, tmp_path):
    """Of two processes only the second meets bad input, or a label beyond the classes."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
from common import engine, errors, prepare
from common.run import run
from deit.recipe import RECIPE

where, second = sys.argv.pop(1), os.environ["RANK"] == "1"
if second and where == "start":
    def create_mixup(args, classes):
        raise ValueError("only here")
    prepare.create_mixup = create_mixup
if second and where == "training":
    def check_labels(labels, classes):
        raise errors.StopTraining("only here")
    engine.check_labels = check_labels

run(RECIPE)
""")
    flags = [*FLAGS, "--data-path", str(jpegs()), "--batch-size", "4"]
    for where, sentence in (("start", "error: only here\n"), ("training", "error: training stopped: only here\n")):
        done = run(where, *flags, cwd=tmp_path, entry=str(driver), processes=2)
        told = [line for line in done.stderr.splitlines(keepends=True) if ": error: " in line]
        assert any(line.endswith(sentence) for line in told), done.stderr
        assert f'File "{driver}"' not in done.stderr, "no traceback"


def test_a_reader_that_leaves_ends_the_run_quietly(jpegs, tmp_path):
    """As in `python deit/main.py … | head -1`."""
    words = " ".join(command(*FLAGS, "--data-path", str(jpegs())))
    done = subprocess.run(
        ["bash", "-c", f"{words} | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (141, 1, "")


def test_ctrl_c_before_the_first_step_ends_with_one_line(jpegs, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "open_data_set", interrupted)
    assert refused(capsys, "--data-path", str(jpegs()), status=130).endswith("error: interrupted\n")


def test_log_files_that_cannot_be_written_stop_the_run(continued, capsys, monkeypatch):
    flags, out = continued
    plain = train.train_one_epoch

    def fill(*args):
        (out / "log.txt").unlink()
        (out / "log.txt").symlink_to("/dev/full")
        return plain(*args)

    monkeypatch.setattr(train, "train_one_epoch", fill)
    error = refused(capsys, *flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"))
    assert f"log.txt in {out} could not be written (No space left on device)" in error
