"""Runs that were cut off, killed or finished, and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch

from common.checkpoint import manager
from common.checkpoint.sources import fetch
from common.checkpoint.weights import load_weights
from deit.recipe import RECIPE
from tests.commands import ROOT, command, environment, run
from tests.compare_runs import diff_nested
from tests.runs import (
    FLAGS,
    assert_same_bits,
    build,
    interrupt_epoch,
    load_checkpoint,
    log_entries,
    read_scalars,
    run_refused,
    shard_flags,
    start,
    stop_after,
)


def test_the_curves_of_a_continued_run_have_every_point_once(continued, capsys, monkeypatch):
    """Continued after an interruption, and then started for nothing."""
    flags, out = continued
    flags = [*flags, "--epochs", "4", "--resume", str(out / "checkpoint.pth")]
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 3)
        run_refused(capsys, *flags, status=130)
    for _ in range(2):
        start(*flags)
        curves = read_scalars(out)
        assert [point.step for point in curves.Scalars("train/loss")] == list(range(2, 25, 2))
        assert [point.step for point in curves.Scalars("test/acc1")] == [6, 12, 18, 24]


def test_a_finished_run_trains_nothing_when_relaunched(continued, capsys):
    flags, out = continued
    before = {name: (out / name).read_bytes() for name in ("checkpoint.pth", "best_checkpoint.pth", "log.txt")}
    start(*flags)
    said = capsys.readouterr().out
    assert "all 2 epochs are trained already" in said and "epoch 2/2" not in said
    assert {name: (out / name).read_bytes() for name in before} == before


def test_other_settings_in_its_folder_are_refused(continued, capsys):
    flags, out = continued
    before = (out / "args.json").read_bytes()
    error = run_refused(capsys, *flags, "--epochs", "3", "--lr", "0.5")
    assert "holds a run with other settings (epochs 2 → 3, lr 0.01 → 0.5); choose another --output-dir" in error
    assert f"--resume {out / 'checkpoint.pth'}" in error
    assert "augsub masking → none" in run_refused(capsys, *flags, "--augsub", "none")
    assert (out / "args.json").read_bytes() == before
    start(*flags, "--log-interval", "3", "--num-workers", "1", "--no-pin-mem")
    assert "all 2 epochs" in capsys.readouterr().out, "what does not change the result may change"


@pytest.mark.slow
def test_a_run_continues_from_a_file_that_is_named(finished, tmp_path, capsys, monkeypatch):
    """One epoch of one run, and the second in another folder, are the run that was left alone; also when the second
    start is cut off and made again."""
    flags, out, _ = finished
    start(*flags, "--epochs", "1", "--output-dir", str(tmp_path / "first"))
    capsys.readouterr()
    named = str(tmp_path / "first" / "checkpoint.pth")
    flags = [*flags, "--resume", named, "--output-dir", str(tmp_path / "second")]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        start(*flags)
    assert f"continuing at epoch 2 from {named}" in capsys.readouterr().out
    start(*flags)
    assert f"continuing at epoch 2, after step 2, from {tmp_path / 'second'}" in capsys.readouterr().out
    assert not diff_nested(
        *(
            {k: v for k, v in load_checkpoint(folder).items() if k not in ("args", "log")}
            for folder in (tmp_path / "second", out)
        )
    )
    assert log_entries(tmp_path / "second") == log_entries(out)[1:]
    assert load_checkpoint(tmp_path / "first")["epoch"] == 0, "the file that was named is left alone"


def test_another_runs_folder_is_not_gone_on_in(continued, finished, capsys):
    flags, out = continued
    before = (out / "log.txt").read_bytes()
    error = run_refused(capsys, *flags, "--resume", str(finished[1] / "checkpoint.pth"))
    assert (
        f"--output-dir {out}: holds another run than --resume {finished[1]}/checkpoint.pth; choose another --output-dir"
        in error
    )
    assert (out / "log.txt").read_bytes() == before


@pytest.mark.parametrize("name", ["cait_xxs24_224", "beit_base_patch16_224", "pit_ti_224", "hiera_tiny_224"])
def test_a_model_of_timms_takes_its_own_weights_back(name):
    """Also where its names or positions look like those of upstream's."""
    small = {"cait_xxs24_224": {"depth": 2}, "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 2}}
    model = timm.create_model(name, **small.get(name, {}))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, "x", RECIPE.adapt_weights, content={"model": state})
    assert not diff_nested(dict(model.state_dict()), state)


def test_a_run_of_upstreams_continues_with_its_weights(finished, tmp_path, capsys):
    flags, out, _ = finished
    torch.save({"model": load_checkpoint(out)["model"], "epoch": 0}, tmp_path / "upstream.pth")
    start(*flags, "--resume", str(tmp_path / "upstream.pth"))
    said = capsys.readouterr().out
    assert "upstream.pth has no trainer state: loading weights only, starting at epoch 2" in said
    assert "epoch 2/2  step 6/6" in said and "epoch 1/2" not in said


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_and_the_same_command_continues(finished, tmp_path, capsys, monkeypatch):
    flags, out, _ = finished
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        flags = [*flags, "--output-dir", str(tmp_path / "out")]
        error = run_refused(capsys, *flags, status=130)
    assert "interrupted; re-run the command to resume" in error
    assert load_checkpoint(tmp_path / "out")["epoch"] == 0
    start(*flags)
    assert "continuing at epoch 2" in capsys.readouterr().out
    assert_same_bits(tmp_path / "out", out)
    assert_same_bits(tmp_path / "out", out, "best_checkpoint.pth")


@pytest.mark.slow
def test_a_run_killed_between_its_two_files_has_both_in_the_end(finished, tmp_path, capsys, monkeypatch):
    flags, out, _ = finished

    def killed(path, other):
        if other.name == "best_checkpoint.pth":
            calls.append(other)
            if len(calls) > best:
                raise KeyboardInterrupt
        link_or_copy(path, other)

    calls: list = []
    link_or_copy, best = manager.link_or_copy, int(load_checkpoint(out)["best"]["epoch"])
    with monkeypatch.context() as patch:
        patch.setattr(manager, "link_or_copy", killed)
        run_refused(capsys, *flags, "--output-dir", str(tmp_path / "out"), status=130)
    assert len(calls) == best + 1
    start(*flags, "--output-dir", str(tmp_path / "out"))
    assert_same_bits(tmp_path / "out", out, "best_checkpoint.pth")


@pytest.mark.slow
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
    assert said and load_checkpoint(tmp_path / "out")["epoch"] == 0
    with open(tmp_path / "out" / "log.txt", "a") as file:
        file.write('{"epoch": 1, "train_lo')  # as a machine that goes down leaves it
    start(*flags)
    assert "continuing at epoch 2" in capsys.readouterr().out
    assert_same_bits(tmp_path / "out", out)


@pytest.mark.slow
def test_a_killed_run_on_shards_ends_with_the_same_bits(tmp_path, capsys, monkeypatch):
    flags = [*shard_flags(tmp_path / "shards"), "--output-dir"]
    start(*flags, str(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        run_refused(capsys, *flags, str(tmp_path / "killed"), status=130)
    start(*flags, str(tmp_path / "killed"))
    assert_same_bits(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
def test_another_number_of_processes_keeps_the_images_per_step_or_is_refused(continued, tmp_path):
    """In its own folder, by the same command but for the processes: twice the images a step are another run."""
    flags, out = continued
    before = (out / "checkpoint.pth").read_bytes()
    refusal = run(*FLAGS, *flags, cwd=tmp_path, processes=2)
    assert "images per step 8 → 16, on 1 and 2 processes" in refusal.stderr
    assert (out / "checkpoint.pth").read_bytes() == before
    half = run(*FLAGS, *flags, "--batch-size", "4", cwd=tmp_path, processes=2)
    assert "saved on 1 processes, resumed on 2: not bit-identical to an uninterrupted run" in half.stdout, half.stderr
    assert "all 2 epochs are trained already" in half.stdout


def test_resume_takes_the_optimizer_settings_of_this_command(continued, capsys):
    flags, out = continued
    named = ["--resume", str(out / "checkpoint.pth"), "--epochs", "3"]
    start(*flags, *named, "--weight-decay", "0.3", "--opt-eps", "1e-5")
    groups = load_checkpoint(out)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3} and {group["eps"] for group in groups} == {1e-5}


def test_a_file_without_an_average_of_the_weights_is_not_said_to_have_one(finished, tmp_path, capsys):
    flags, out, _ = finished
    torch.save({"model": load_checkpoint(out)["model"], "epoch": 0}, tmp_path / "plain.pth")
    start(*flags, "--eval", "--resume", str(tmp_path / "plain.pth"))
    said = capsys.readouterr().out
    assert "plain.pth: no EMA weights\n" in said and "(average of the weights:" not in said
    start(*flags, "--resume", str(tmp_path / "plain.pth"))
    said = capsys.readouterr().out
    assert "plain.pth: no EMA weights; the EMA starts from the model's" in said and "(average of" in said


def test_two_addresses_with_the_same_file_name_are_two_files(finished, tmp_path, monkeypatch):
    fetched = []

    def download(source, target, progress):
        fetched.append(source)
        Path(target).write_text(source)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    places = [fetch(f"https://{host}/base.pth") for host in ("a.example", "b.example", "a.example")]
    assert [Path(place).read_text() for place in places] == [f"https://{host}.example/base.pth" for host in "aba"]
    assert fetched == ["https://a.example/base.pth", "https://b.example/base.pth"]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "number", "more"), [
    (1, signal.SIGTERM, []), (4, signal.SIGUSR2, []), (5, signal.SIGINT, ["--num-workers", "1"]), (6, signal.SIGTERM, []),
    (9, signal.SIGTERM, ["--log-interval", "50"]),
])  # fmt: skip
def test_a_run_that_is_asked_to_stop_goes_on_to_the_same_bits(
    steps, number, more, finished, tmp_path, capsys, monkeypatch
):
    """By a real signal: in the first and the second epoch, between reports, at one, and at the end of an epoch."""
    flags, out, _ = finished
    flags = [*flags, *more, "--output-dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        stop_after(patch, steps, number)
        start(*flags)
    where = "before epoch 2" if steps == 6 else f"after step {(steps - 1) % 6 + 1} of 6 in epoch {1 + steps // 6}"
    said = capsys.readouterr().out
    assert f"{number.name}: stopped {where}, checkpoint saved; re-run the command to resume" in said
    assert "trained in" not in said
    start(*flags)
    said = capsys.readouterr().out
    assert "continuing at epoch " in said and "trained in" in said
    assert_same_bits(tmp_path / "out", out)
    assert_same_bits(tmp_path / "out", out, "best_checkpoint.pth")
    if not more:
        ours, theirs = read_scalars(tmp_path / "out"), read_scalars(out)
        for name in ("train/loss", "train/sub_loss", "train/lr", "test/acc1"):
            points = [[(point.step, point.value) for point in curves.Scalars(name)] for curves in (ours, theirs)]
            assert points[0] == points[1], name


@pytest.mark.slow
def test_a_run_on_shards_that_is_asked_to_stop_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    flags = [*shard_flags(tmp_path / "shards"), "--accum-iter", "2", "--output-dir"]
    start(*flags, str(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        start(*flags, str(tmp_path / "stopped"))
    assert load_checkpoint(tmp_path / "stopped")["position"]["update"] == 2
    start(*flags, str(tmp_path / "stopped"))
    assert_same_bits(tmp_path / "undisturbed", tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_go_on_to_the_same_bits(jpegs, tmp_path):
    """With batch statistics, of which each process has its own until the end of the epoch, in the model and in the
    average of its weights. The second one is asked."""
    flags = ["--model", "resnet10t", "--input-size", "32", "--data-path", str(jpegs()), "--batch-size", "2", "--epochs", "2",
             "--warmup-epochs", "0", "--model-ema", "--augsub", "masking", "--augsub-block", "8", "--num-workers", "1",
             "--log-interval", "2", "--opt", "sgd", "--lr", "0.01", "--drop-path", "0.1", "--amp", "off"]  # fmt: skip
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, signal, sys
sys.path[0] = {str(ROOT)!r}
from common.engine import Trainer
from common.cli import run
from resnet_rsb.recipe import RECIPE

update, done = Trainer.update, []

def signalled(trainer):
    update(trainer)
    done.append(None)
    if len(done) == 11 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR2)

if sys.argv.pop(1) == "stop":
    Trainer.update = signalled
run(RECIPE)
""")
    for folder, ways in (("undisturbed", ["run"]), ("stopped", ["stop", "run"])):
        for way in ways:
            done = run(
                way, *flags, "--output-dir", str(tmp_path / folder), cwd=tmp_path, entry=str(driver), processes=2
            )
            assert done.returncode == 0, done.stderr
            if way == "stop":
                assert "SIGUSR2: stopped after step 4 of 8 in epoch 2" in done.stdout
    a, b = load_checkpoint(tmp_path / "undisturbed"), load_checkpoint(tmp_path / "stopped")
    assert a.pop("args").keys() == b.pop("args").keys() and not diff_nested(a, b)
    assert (tmp_path / "undisturbed" / "log.txt").read_text() == (tmp_path / "stopped" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_a_second_time_a_run_leaves_at_once(number, jpegs, tmp_path):
    """A real process, in the middle of an epoch that never gets to its next step."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import sys, time
sys.path[0] = {str(ROOT)!r}
from common.engine import Trainer
from common.cli import run
from deit.recipe import RECIPE

def hang(trainer):
    print("hanging", flush=True)
    while True:
        time.sleep(0.1)

Trainer.update = hang
run(RECIPE)
""")
    process = subprocess.Popen(
        command(*FLAGS, "--data-path", str(jpegs()), entry=str(driver)),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None and any(line == "hanging\n" for line in process.stdout)
    process.send_signal(number)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    said = "\nstopping after this step; Ctrl-C again exits at once\n" if number == signal.SIGINT else ""
    assert error == said + "driver.py: error: interrupted\n"


def test_a_restarted_epochs_checkpoint_is_not_linked_as_the_best(finished, tmp_path, monkeypatch):
    """Resumed under another learning rate the epoch starts over; its checkpoint is of no epoch's end."""
    flags = [*finished[0], "--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        start(*flags)
    assert load_checkpoint(tmp_path)["position"]["update"] == 2
    named = ["--resume", str(tmp_path / "checkpoint.pth")]
    for more in (["--lr", "2e-2"], ["--drop", "0.2"]):
        run = build(*FLAGS, *flags, *named, *more)
        run.close()
        assert run.start.progress is None and not run.start.links_due
    best = load_checkpoint(tmp_path, "best_checkpoint.pth")
    assert (best["epoch"], best["position"]) == (0, None)
