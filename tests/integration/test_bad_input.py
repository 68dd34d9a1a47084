"""Bad input, bad data, full disks and losses that are not finite: one sentence, status 2, nothing lost."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

from common import run as runs
from common import train
from common.engine import Trainer
from tests.commands import ROOT, command, environment, run
from tests.runs import (
    FLAGS,
    load_checkpoint,
    run_refused,
    shard_flags,
    start,
)
from tests.sample_data import make_shards


def test_too_many_unreadable_images_in_shards_stop_the_run(tmp_path, capsys):
    broken = {("train", 0, index) for index in range(10)}
    error = run_refused(capsys, *shard_flags(tmp_path / "shards", broken=broken))
    assert "10 of 24 training images could not be read, more than 1 %: not an image (10)\n" in error


@pytest.mark.slow
def test_two_processes_train_and_a_nan_on_one_stops_both(jpegs, tmp_path):
    """The second process's sixth loss is NaN; the first hears of it within the logging interval."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
import torch
from common.cli import run
from deit.recipe import RECIPE

calls = 0
create_loss = RECIPE.loss

def loss(args, mixed):
    usual = create_loss(args, mixed)
    def injected(logits, target):
        global calls
        calls += 1
        value = usual(logits, target)
        return value * float("nan") if os.environ["RANK"] == "1" and calls == 6 else value
    return injected

RECIPE.loss = loss
run(RECIPE)
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
    assert load_checkpoint(out)["epoch"] == 0, "the last good checkpoint is left"
    assert sorted(os.listdir(out)) == [".running", "args.json", "best", "best_checkpoint.pth", "checkpoint.pth", "last",
                                       "log.txt", "tensorboard"]  # fmt: skip


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
    error = run_refused(capsys, *flags)
    assert re.search(r"training stopped: .* is not finite\); the previous checkpoint is intact", error)
    assert (out / "checkpoint.pth").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(continued, capsys):
    flags, out = continued
    before = (out / "checkpoint.pth").read_bytes()
    error = run_refused(capsys, *flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"), "--unscale-lr",
                    "--lr", "1e38", "--warmup-lr", "1e38", "--min-lr", "1e38")  # fmt: skip
    assert "training stopped: the loss was not finite at step 2 of 6 in epoch 3" in error
    assert (out / "checkpoint.pth").read_bytes() == before


def test_bad_input_ends_before_training(jpegs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data-path", str(jpegs()), "--output-dir", "out"]
    assert "did you mean deit_pico_patch8_LS" in run_refused(capsys, *data, "--model", "deit_pico_patch8")
    error = run_refused(capsys, *data, "--model", "resnet18", "--augsub", "dropout")
    assert "--augsub dropout: ResNet has no place for it; use masking or droppath" in error
    assert "--eval: no weights" in run_refused(capsys, *data, "--eval")
    assert "--opt adamq: timm cannot build" in run_refused(capsys, *data, "--opt", "adamq")
    assert "cosin" in run_refused(capsys, *data, "--sched", "cosin")
    assert "argument --device: 'gpu': unknown device; use cuda or cpu" in run_refused(capsys, *data, "--device", "gpu")
    assert "none.pth: no such file" in run_refused(capsys, *data, "--resume", "none.pth")
    assert "none.pth: no such file" in run_refused(capsys, *data, "--finetune", "none.pth")
    assert "--nb-classes 1: the data set has 2 classes" in run_refused(capsys, *data, "--nb-classes", "1")
    assert "--batch-size 64: more than the 32 training images of a process; use a smaller one" in run_refused(
        capsys, *data, "--batch-size", "64"
    )
    assert "none: there is no such folder" in run_refused(capsys, *data, "--data-path", str(tmp_path / "none"))
    assert os.listdir(tmp_path) == ["images"], "nothing is written"
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        assert f"--output-dir {place}: not writable" in run_refused(capsys, *data, "--output-dir", place)
    (tmp_path / "images" / "val" / "dog").rename(tmp_path / "images" / "val" / "hen")
    assert "--data-path: val lacks 1 of the classes of train, such as 'dog'; both need" in run_refused(capsys, *data)
    assert sorted(os.listdir(tmp_path)) == ["file", "images"]


def test_another_model_is_refused_by_its_tensors(continued, capsys):
    flags, out = continued
    error = run_refused(capsys, *flags, "--resume", str(out / "checkpoint.pth"), "--model", "deit_tiny_patch16_LS")
    assert ": another architecture: cls_token (1, 1, 64) where the model has (1, 1, 192)" in error
    error = run_refused(capsys, *flags, "--resume", str(out / "checkpoint.pth"), "--opt", "sgd", "--attn-only")
    assert ": optimizer state does not fit --opt sgd" in error


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
    assert flags[0] in run_refused(capsys, "--data-path", str(jpegs()), *flags)


def test_a_negative_seed_is_refused_by_its_flag(jpegs, capsys):
    assert "--seed" in run_refused(capsys, "--data-path", str(jpegs()), "--seed", "-1")


def test_shards_need_the_number_of_their_classes(tmp_path, capsys):
    flags = make_shards(tmp_path / "shards")
    assert "number of classes unknown; pass --nb-classes" in run_refused(capsys, *flags)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(finished, small_disk, capsys):
    """The first checkpoint has room, the second has not beside it."""
    flags, out, _ = finished
    size = (out / "checkpoint.pth").stat().st_size
    place = small_disk(f"{int(1.5 * size) // 1024}k") / "out"
    error = run_refused(capsys, *flags, "--output-dir", str(place))
    assert "checkpoint.pth: could not be written" in error and "the previous checkpoint is intact" in error
    assert load_checkpoint(place)["epoch"] == 0
    assert sorted(os.listdir(place)) == [
        ".running",
        "args.json",
        "best",
        "best_checkpoint.pth",
        "checkpoint.pth",
        "last",
        "log.txt",
        "tensorboard",
    ]


def test_a_label_beyond_the_classes_stops_the_run(tmp_path, capsys):
    assert "--nb-classes" in run_refused(capsys, *make_shards(tmp_path / "shards"), "--nb-classes", "4")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_from_the_start(finished, small_disk, capsys):
    flags, _, _ = finished
    assert "disk/out" in run_refused(capsys, *flags, "--output-dir", str(small_disk("4k") / "out"))


def test_unreadable_images_are_named_once_and_training_goes_on(jpegs, capsys):
    folder = jpegs(train=60)
    broken = folder / "train" / "cat" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    start("--data-path", str(folder), "--batch-size", "40")
    said = capsys.readouterr().out
    assert said.count(f"{broken}: unreadable training image (Truncated File Read); replaced by another image\n") == 1
    assert "epoch 2/2  acc@1" in said


def test_too_many_unreadable_images_stop_the_run(jpegs, tmp_path, capsys):
    folder = jpegs()
    for number in range(10):
        (folder / "train" / "cat" / f"{number:03}.jpg").write_bytes(b"")
    error = run_refused(capsys, "--data-path", str(folder), "--output-dir", str(tmp_path / "out"))
    assert "training stopped: 10 of 32 training images could not be read, more than 1 %: not an image (10)\n" in error
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_nine_unreadable_images_do_not_stop_a_run(jpegs, capsys):
    folder = jpegs()
    for number in range(9):
        (folder / "train" / "cat" / f"{number:03}.jpg").write_bytes(b"")
    start("--data-path", str(folder), "--epochs", "1")
    said = capsys.readouterr().out
    assert said.count(": unreadable training image (not an image); replaced by another image\n") == 5
    assert (
        sum(int(count) for count in re.findall(r"^(\d) more unreadable training images: not an image", said, re.M)) == 4
    )
    assert "epoch 1/1  acc@1" in said


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_none_of_which_can_be_read_stop_the_run(split, jpegs, capsys):
    folder = jpegs()
    for path in folder.glob(f"{split}/*/*"):
        path.write_bytes(b"")
    assert "training stopped: " in run_refused(capsys, "--data-path", str(folder))


def test_unreadable_evaluation_images_are_named(jpegs, capsys):
    folder = jpegs()
    broken = folder / "val" / "cat" / "003.jpg"
    broken.write_bytes(b"")
    start("--data-path", str(folder), "--epochs", "1")
    assert f"{broken}: unreadable evaluation image (not an image); not counted\n" in capsys.readouterr().out


@pytest.mark.slow
def test_what_one_process_alone_finds_is_told(jpegs, tmp_path):
    """Of two processes only the second meets bad input, or a label beyond the classes."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
from common import errors, trainer
from common.cli import run
from deit.recipe import RECIPE

where, second = sys.argv.pop(1), os.environ["RANK"] == "1"
if second and where == "start":
    def create_mixup(args, classes):
        raise ValueError("only here")
    trainer.create_mixup = create_mixup
if second and where == "training":
    def check_labels(labels, classes):
        raise errors.StopTraining("only here")
    trainer.check_labels = check_labels

run(RECIPE)
""")
    flags = [*FLAGS, "--data-path", str(jpegs()), "--batch-size", "4"]
    for where, sentence in (("start", "error: only here\n"), ("training", "error: training stopped: only here\n")):
        done = run(where, *flags, cwd=tmp_path, entry=str(driver), processes=2)
        told = [line for line in done.stderr.splitlines(keepends=True) if ": error: " in line]
        assert any(line.endswith(sentence) for line in told), done.stderr
        assert f'File "{driver}"' not in done.stderr, "no traceback"


@pytest.mark.slow
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

    monkeypatch.setattr(runs, "open_dataset", interrupted)
    assert run_refused(capsys, "--data-path", str(jpegs()), status=130).endswith("error: interrupted\n")


def test_log_files_that_cannot_be_written_stop_the_run(continued, capsys, monkeypatch):
    flags, out = continued
    train_epoch = train.train_epoch

    def fill(*args):
        (out / "log.txt").unlink()
        (out / "log.txt").symlink_to("/dev/full")
        return train_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", fill)
    error = run_refused(capsys, *flags, "--epochs", "3", "--resume", str(out / "checkpoint.pth"))
    assert f"{out / 'log.txt'}: could not be written (No space left on device)" in error
