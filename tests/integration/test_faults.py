"""What breaks around a run: checkpoints that are damaged, folders that refuse, loaders that hang or die."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from torch.utils.data import DataLoader

from common import run_dir, train
from common.args import parse
from common.checkpoint import io as files
from common.checkpoint import manager
from common.data.loader import explain_worker_failure
from common.errors import StopTraining
from common.run import build_run
from common.trainer import Trainer
from deit.recipe import RECIPE
from tests.commands import ROOT, command, environment, run
from tests.compare_runs import diff_runs
from tests.runs import (
    FLAGS,
    ONE_PROCESS,
    assert_same_bits,
    build,
    interrupt_epoch,
    load_checkpoint,
    log_entries,
    run_refused,
    start,
    stop_after,
)

LAST, PREVIOUS = "checkpoint.pth", "previous_checkpoint_1.pth"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit, in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def cut_off(finished, tmp_path, capsys, monkeypatch):
    """A run that was killed in its third save → its flags, its folder. It has two checkpoints, of steps 4 and 2."""
    flags, out = [*finished[0], "--save-every", "2", "--output-dir", str(tmp_path / "out")], tmp_path / "out"
    with monkeypatch.context() as patch:
        update, done = Trainer.update, []

        def interrupted(trainer):
            update(trainer)
            done.append(None)
            if len(done) == 5:
                raise KeyboardInterrupt

        patch.setattr(Trainer, "update", interrupted)
        run_refused(capsys, *flags, status=130)
    assert [load_checkpoint(out, name)["position"]["update"] for name in (LAST, PREVIOUS)] == [4, 2]
    for name in (LAST, PREVIOUS):  # each a file of its own, as on a disk
        content = (out / name).read_bytes()
        (out / name).unlink()
        (out / name).write_bytes(content)
    return flags, out


@pytest.mark.parametrize("damage", [truncated, empty, flipped])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, cut_off, finished, capsys):
    flags, out = cut_off
    damage(out / LAST)
    start(*flags)
    said = capsys.readouterr().out
    why = {truncated: "truncated, or", empty: "the file is empty", flipped: "corrupt: SHA-256 does not match"}[damage]
    assert f"{out / LAST}: {why}" in said and "falling back to the previous checkpoint" in said
    assert f"continuing at epoch 1, after step 2, from {out / PREVIOUS}" in said
    assert (out / f"damaged_{LAST}").exists()
    assert diff_runs(finished[1], out) == []


def test_a_damaged_checkpoint_that_is_named_is_passed_over_too(cut_off, finished, capsys):
    """As upstream's users go on: --resume with the output folder's own checkpoint."""
    flags, out = cut_off
    flipped(out / LAST)
    start(*flags, "--resume", str(out / LAST))
    assert "falling back to the previous checkpoint" in capsys.readouterr().out
    assert [entry["epoch"] for entry in log_entries(out)] == [0, 1] and log_entries(out) == log_entries(finished[1])


@pytest.mark.parametrize("more", [["--batch-size", "16"], ["--seed", "3"], ["--augsub", "none"]])
def test_under_other_settings_an_epoch_begins_anew(more, cut_off, tmp_path, capsys):
    """Since the same step of it is of other images; in another folder, which is how it is asked for."""
    flags, out = cut_off
    start(*flags, *more, "--resume", str(out / LAST), "--output-dir", str(tmp_path / "new"))
    said = capsys.readouterr().out
    assert f"{out / LAST}: saved in the middle of an epoch under other settings; restarting that epoch\n" in said
    assert f"continuing at epoch 1 from {out / LAST}" in said
    assert [entry["epoch"] for entry in log_entries(tmp_path / "new")] == [0, 1]


def test_other_data_in_the_same_folder_are_another_run(cut_off, jpegs, capsys):
    flags, _ = cut_off
    other = str(jpegs(train=30, classes=("cat", "dog", "owl"), name="other"))
    error = run_refused(capsys, *flags, "--data-path", other)
    assert "holds a run with other settings (steps per epoch 6 → 11, so other data)" in error


def test_a_torn_line_of_an_epoch_that_is_done_comes_back(continued, finished):
    """As a loss of power leaves it, which may keep the checkpoint and lose the line before it."""
    flags, out = continued
    (out / "log.txt").write_bytes((out / "log.txt").read_bytes()[:-20])
    start(*flags)
    assert (out / "log.txt").read_bytes() == (finished[1] / "log.txt").read_bytes()


def test_a_folder_is_given_back_when_the_last_write_is_done(finished, tmp_path, capsys, monkeypatch):
    """Also where training stops for another reason meanwhile."""
    order: list[str] = []
    rotate, release, update = manager.rotate, FileLock.release, Trainer.update

    def slow(*args):
        time.sleep(1)
        rotate(*args)
        order.append("written")

    def released(lock, force=False):
        if lock.is_locked:
            order.append("released")
        release(lock, force)

    def stopping(trainer):
        update(trainer)
        steps.append(None)
        if len(steps) == 3:
            raise StopTraining("for a test")

    steps: list = []
    monkeypatch.setattr(manager, "rotate", slow)
    monkeypatch.setattr(FileLock, "release", released)
    monkeypatch.setattr(Trainer, "update", stopping)
    run_refused(capsys, *finished[0], "--save-every", "2", "--output-dir", str(tmp_path / "out"))
    assert order == ["written", "released"]


def test_a_run_that_begins_anew_puts_the_earlier_ones_checkpoints_aside(finished, tmp_path):
    """--no-auto-resume, as Swin's flag has it, or the weights of a file of the same folder."""
    flags = [*finished[0], "--output-dir", str(tmp_path)]
    start(*flags)
    args = parse(RECIPE, [*FLAGS, *flags])
    args.auto_resume = False
    run = build_run(RECIPE, args, ONE_PROCESS)
    train.fit(run)
    run.close()
    earlier = {path.name for path in tmp_path.glob("earlier_*")}
    assert earlier == {f"earlier_{name}" for name in (LAST, PREVIOUS, "best_checkpoint.pth", "best", "last")}
    assert_same_bits(tmp_path, finished[1])


@pytest.mark.slow
def test_every_bit_of_a_checkpoint_that_matters_is_in_its_digest(cut_off):
    """Any single bit: the file is refused, or holds what was written."""
    _, out = cut_off
    whole, content = (out / LAST).read_bytes(), files.load(out / LAST)
    draw, caught = random.Random(0), 0
    for _ in range(200):
        at = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        (out / LAST).write_bytes(damaged)
        try:
            again = files.load(out / LAST)
        except ValueError:
            caught += 1
            continue
        assert files.digest(again) == files.digest(content)
    assert caught > 150


def test_without_a_whole_checkpoint_a_run_is_not_begun_anew(cut_off, capsys):
    flags, out = cut_off
    for name in (LAST, PREVIOUS):
        truncated(out / name)
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    error = run_refused(capsys, *flags)
    assert f"--output-dir {out}: none of the checkpoints can be read" in error and "choose another folder" in error
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before


@pytest.mark.slow
def test_two_processes_agree_on_the_checkpoint_before(jpegs, tmp_path):
    flags = [*FLAGS, "--data-path", str(jpegs()), "--batch-size", "4", "--output-dir"]
    alone = run(*flags, str(tmp_path / "undisturbed"), cwd=tmp_path, processes=2)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "undisturbed", out)
    truncated(out / LAST)  # also the best one's other name, or the other way round
    done = run(*flags, str(out), cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "falling back to the previous checkpoint" in done.stdout and "continuing at epoch 2 from" in done.stdout
    assert diff_runs(tmp_path / "undisturbed", out) == []


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_checkpoints_are_kept(keep, tmp_path):
    path = tmp_path / LAST
    for step in range(6):
        manager.save_checkpoint(path, {"model": {"weight": torch.full((3,), float(step))}}, keep)
    kept = [files.load(found)["model"]["weight"][0].item() for found in manager.list_newest_first(tmp_path)]
    assert kept == [5.0, 4.0, 3.0, 2.0][:keep]
    manager.save_checkpoint(path, {"model": {"weight": torch.zeros(3)}}, 1)
    assert os.listdir(tmp_path) == [LAST], "fewer, where fewer are asked for"


@pytest.mark.slow
def test_saving_in_the_middle_of_epochs_changes_nothing(finished, tmp_path):
    flags, out, _ = finished
    for every in ("1", "4"):
        start(*flags, "--save-every", every, "--keep-last", "9", "--output-dir", str(tmp_path / every))
        assert_same_bits(tmp_path / every, out)
        steps = [content["position"]["update"] if content["position"] else 6 * content["epoch"] + 6
                 for content in map(files.load, manager.list_newest_first(tmp_path / every))]  # fmt: skip
        assert steps[:-1] == {"1": [12, 5, 4, 3, 2, 1, 6, 5, 4], "4": [12, 2, 6, 4]}[every]


def test_a_folder_that_nothing_can_be_written_to(finished, tmp_path, capsys):
    """A real read-only file system."""
    place = tmp_path / "read-only"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        error = run_refused(capsys, *finished[0], "--output-dir", str(place / "out"))
        assert f"--output-dir {place / 'out'}: not writable (Read-only file system)" in error
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_folder_that_becomes_read_only_keeps_the_checkpoint_before(finished, small_disk, capsys, monkeypatch):
    out = small_disk("50m") / "out"
    train_epoch, calls = train.train_epoch, []

    def remounted(*args):
        calls.append(None)
        if len(calls) == 2:
            writers[0].wait()
            subprocess.run(["mount", "--bind", str(out), str(out)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(out)], check=True)
        return train_epoch(*args)

    writers: list[manager.BackgroundWriter] = []
    init = manager.BackgroundWriter.__init__
    monkeypatch.setattr(manager.BackgroundWriter, "__init__", lambda self: (writers.append(self), init(self))[1])
    monkeypatch.setattr(train, "train_epoch", remounted)
    try:
        error = run_refused(capsys, *finished[0], "--output-dir", str(out))
    finally:
        subprocess.run(["umount", "--lazy", str(out)], check=True)
    assert "could not be written" in error and "Read-only file system" in error
    assert load_checkpoint(out)["epoch"] == 0


def test_an_error_in_the_background_stops_the_run(finished, tmp_path, capsys, monkeypatch):
    """Within the steps that follow, not at the end."""
    steps: list = []
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda trainer: (steps.append(None), time.sleep(0.05), update(trainer))[2])
    monkeypatch.setattr(manager, "rotate", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    error = run_refused(capsys, *finished[0], "--save-every", "2", "--output-dir", str(tmp_path / "out"))
    assert "could not be written ([Errno 5] Input/output error); there is no previous checkpoint" in error
    assert len(steps) < 6


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(finished, tmp_path, monkeypatch):
    """A disk that takes a second a file; three saves of which none is waited for by the next steps."""
    began: list[float] = []
    steps: list[float] = []
    rotate, update = manager.rotate, Trainer.update

    def slow(*args):
        began.append(len(steps))
        time.sleep(1)
        began.append(len(steps))
        rotate(*args)

    monkeypatch.setattr(manager, "rotate", slow)
    monkeypatch.setattr(Trainer, "update", lambda trainer: (steps.append(time.monotonic()), update(trainer))[1])
    start(*finished[0], "--output-dir", str(tmp_path / "out"))
    assert began[1] > began[0], "steps were done while the first was written"
    assert load_checkpoint(tmp_path / "out")["epoch"] == 1


def replace_by_pipe(path: Path) -> None:
    """By one that nobody writes to: who reads it waits."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.slow
def test_a_loader_that_hangs_is_named(jpegs, tmp_path):
    """At a pipe that nobody writes to, in the place of an image."""
    data = jpegs()
    replace_by_pipe(data / "train" / "cat" / "003.jpg")
    done = run(*FLAGS, "--data-path", str(data), "--num-workers", "2", "--data-timeout", "4", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "main.py: error: training stopped: no batch from the DataLoader workers for 4 s (--data-timeout); stuck on "
        f"{data}/train/cat/003.jpg\n"
    )


@pytest.mark.slow
def test_a_loader_that_is_killed_ends_the_run_with_one_sentence(finished, tmp_path, capsys):
    flags, out, _ = finished
    flags = [*flags, "--num-workers", "1", "--output-dir", str(tmp_path / "out")]
    process = subprocess.Popen(command(*FLAGS, *flags), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment())  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch 2/2  step 2/6"))
    loaders = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(loaders[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("main.py: error: training stopped: a DataLoader worker was killed by SIGKILL")
    assert ", probably out of memory: lower --num-workers; re-run the command to resume\n" in error
    assert error.count("\n") == 1, error
    start(*flags)
    assert diff_runs(out, tmp_path / "out") == []


@pytest.mark.slow
def test_a_loader_that_crashes_at_an_image_names_it(jpegs, tmp_path):
    """And says nothing of memory."""
    data = jpegs()
    image = data / "train" / "cat" / "003.jpg"
    replace_by_pipe(image)
    words = command(*FLAGS, "--data-path", str(data), "--num-workers", "1", "--input", "fast")
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment())  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("training:"))
    workers: list[psutil.Process] = []
    while not any(waits_for_pipe(worker.pid) for worker in workers):
        time.sleep(0.1)
        workers = psutil.Process(process.pid).children()
    workers[0].send_signal(signal.SIGSEGV)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.endswith(  # after PyTorch's "Unexpected segmentation fault encountered in worker"
        f"main.py: error: training stopped: a DataLoader worker was killed by SIGSEGV while it read {image}; remove "
        "this file if it is damaged; re-run the command to resume\n"
    )


def waits_for_pipe(pid: int) -> bool:
    """Whether the process waits in the kernel for the other end of a pipe to be opened."""
    return Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open")


def give_and_wait(queue: Any) -> None:
    queue.put(torch.zeros(3))
    time.sleep(60)


def test_a_loader_that_is_killed_while_it_hands_over_a_batch_is_told_from_a_full_disk():
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    giving = context.Process(target=give_and_wait, args=(queue,))
    giving.start()
    assert queue._reader.poll(30)
    giving.kill()
    giving.join()
    with pytest.raises((OSError, EOFError)) as torn:
        queue.get()
    loader = DataLoader([0])
    assert explain_worker_failure(loader, torn.value) == "a DataLoader worker died; re-run the command to resume"
    with pytest.raises(OSError, match="No space left") as full:
        raise OSError(28, "No space left on device")
    assert explain_worker_failure(loader, full.value) is None


def test_too_many_open_files_are_not_taken_for_a_loader_that_was_killed(monkeypatch):
    def rebuild(*args: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    queue.put(torch.zeros(3))
    assert queue._reader.poll(30)
    monkeypatch.setattr("torch.multiprocessing.reductions.fd_id", rebuild)
    with pytest.raises(OSError, match="Too many open files") as short:
        queue.get()
    assert explain_worker_failure(DataLoader([0]), short.value) is None


@pytest.mark.slow
def test_two_runs_in_one_folder_do_not_mix(finished, tmp_path, capsys, monkeypatch):
    """The second waits a while, and is then refused, or goes on where the first has ended."""
    flags = [*finished[0], "--output-dir", str(tmp_path / "out")]
    held = "from common.run_dir import acquire_lock; import pathlib, sys, time; lock = acquire_lock(pathlib.Path(sys.argv[1]), 0); "
    (tmp_path / "out").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", f"{held} print('held', flush=True); time.sleep(60)", str(tmp_path / "out" / ".running")],
        stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    monkeypatch.setattr(run_dir, "LOCK_TIMEOUT_S", 1.0)
    assert f"--output-dir {tmp_path / 'out'}: in use by another run" in run_refused(capsys, *flags)
    assert os.listdir(tmp_path / "out") == [".running"]
    other.kill()
    other.wait()
    start(*flags)
    assert_same_bits(tmp_path / "out", finished[1])


def test_half_written_checkpoints_are_cleared_away(finished, tmp_path):
    flags = [*finished[0], "--output-dir", str(tmp_path)]
    (tmp_path / f".{LAST}.4711.part").write_bytes(b"half")
    start(*flags)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_another_number_of_processes_in_the_middle_of_an_epoch(jpegs, tmp_path):
    """Stopped after 3 steps of 1 process, continued on 2."""
    flags = [*FLAGS, "--data-path", str(jpegs()), "--augsub", "masking", "--epochs", "1", "--log-interval", "2",
             "--output-dir", str(tmp_path / "out")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        start(*flags)
    done = run(*flags, "--batch-size", "4", cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "saved on 1 processes, resumed on 2: not bit-identical to an uninterrupted run" in done.stdout
    assert "continuing at epoch 1, after step 3," in done.stdout
    assert load_checkpoint(tmp_path / "out")["epoch"] == 0


def test_sums_of_more_processes_than_there_are_now_are_not_lost(jpegs, tmp_path):
    """Of the images since the last report, which each process keeps to itself until the next."""
    flags = ["--data-path", str(jpegs()), "--augsub", "masking", "--epochs", "1", "--log-interval", "2", "--output-dir",
             str(tmp_path)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        start(*flags)
    content = load_checkpoint(tmp_path)
    window = content["own"][0]["window"]
    assert window[0] == 8
    content["position"]["update"] = 1  # of two of twice the images
    manager.save_checkpoint(tmp_path / LAST, content | {"processes": 2, "updates": 2, "own": 2 * content["own"]})
    run = build(*FLAGS, *flags, "--batch-size", "16")
    assert run.start.progress is not None and run.start.progress.interval_totals == [2 * value for value in window]


@pytest.mark.slow
def test_deterministic_kernels_are_asked_for_and_train_to_the_same_bits(finished, tmp_path, capsys, monkeypatch):
    flags, out, _ = finished
    try:
        start(*flags, "--deterministic", "--output-dir", str(tmp_path / "out"))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert_same_bits(tmp_path / "out", out)


@pytest.mark.slow
def test_the_interrupted_run_of_these_tests_is_one(finished, tmp_path, capsys, monkeypatch):
    """Without damage it goes on from the newest."""
    with monkeypatch.context() as patch:
        interrupt_epoch(patch, 1)
        run_refused(capsys, *finished[0], "--output-dir", str(tmp_path / "out"), status=130)
    start(*finished[0], "--output-dir", str(tmp_path / "out"))
    assert "falling back" not in capsys.readouterr().out
