"""The launcher on a real Slurm of two nodes: jobs that wait for each other, that are cut off and go on, that fail."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.checkpoint import io as files
from scripts.launch.slurm import Cluster, add_cluster_flags, create_executor, query_queue
from scripts.launch.status import find_state, update_status
from tests.commands import ROOT, command, environment
from tests.runs import FLAGS, assert_same_bits, log_entries
from tests.sample_data import make_jpegs
from tests.slurm.cluster import cluster, missing, wait_for

CLUSTER = ["--cpu", "--gpus-per-node", "1"]
LONG = ["--log-interval", "1", "--epochs", "40", "--augsub", "masking", "--drop-path", "0.1"]


@pytest.fixture(scope="module")
def slurm():
    reason = missing()
    if reason and os.environ.get("AUGSUB_TEST_SLURM") == "required":
        pytest.fail(f"the tests on Slurm must run here: {reason}")
    if reason:
        pytest.skip(reason)
    with cluster() as folder:
        yield folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_jpegs(tmp_path_factory.mktemp("slurm") / "images", train=128, val=4)


def call(script: str, *words: str, cwd: Path = ROOT, status: int = 0) -> str:
    """What a script prints; what it complains of, where it is to fail with status 2."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *words],
        cwd=cwd, capture_output=True, text=True, env=environment(), timeout=240,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status == 2 else done.stdout


def submit(out: Path, images: Path, *flags: str, cluster: tuple[str, ...] = (), status: int = 0) -> str:
    flags = (*FLAGS, "--data-path", str(images), "--output-dir", str(out), *flags)
    return call("submit.py", "deit", *CLUSTER, *cluster, "--", *flags, status=status)


def status_of(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def ended(out: Path, state: str = "done", seconds: float = 120, hasten: bool = True) -> dict:
    """Wait for a job's end, through as many starts as it takes → its status."""

    def look():
        status = status_of(out)
        if hasten:
            start_requeued_job(status["job"])
        return status if status["state"] in ("done", "failed", "stopped") and not in_queue(status["job"]) else None

    status = wait_for(look, seconds, f"the end of {out.name}")
    assert status["state"] == state, (status, said(out))
    return status


def squeue(job: str, what: str) -> str:
    done = subprocess.run(["squeue", "--noheader", "--jobs", job, f"--format={what}"], capture_output=True, text=True)
    return done.stdout.strip()


def in_queue(job: str) -> bool:
    return bool(squeue(job, "%i"))


def start_requeued_job(job: str) -> None:
    """Slurm lets two minutes pass before it starts a requeued job, for the sake of the nodes: this asks for less, and for
    a time limit that a slow machine does not reach a second time."""
    state, _, reason = squeue(job, "%T %r").partition(" ")
    if state == "PENDING" and reason == "BeginTime":
        update = ["scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=15"]
        subprocess.run(update, capture_output=True)


def said(out: Path) -> str:
    """What the processes of a job printed."""
    return "".join(path.read_text() for path in sorted((out / "slurm").glob("*_log.out")))


def begun(out: Path, epoch: int = 1, seconds: float = 60) -> None:
    """Wait until a job is in the middle of an epoch."""
    wait_for(lambda: f"epoch {epoch}/40  step 3/" in said(out), seconds, f"epoch {epoch} of {out.name}")


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """A run on this machine, without Slurm."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = subprocess.run(
        command(*FLAGS, *LONG, "--data-path", str(images), "--output-dir", str(out)),
        capture_output=True, text=True, env=environment(), timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_two_nodes_train_as_one_with_two_processes(slurm, images, tmp_path):
    flags = ["--augsub", "masking", "--batch-size", "16"]
    said_of = submit(tmp_path / "two", images, *flags, cluster=("--nodes", "2"))
    assert "submitted as job" in said_of
    ended(tmp_path / "two")
    assert "2 processes on cpu" in said(tmp_path / "two")
    one = subprocess.run(
        command(*FLAGS, "--data-path", str(images), "--output-dir", str(tmp_path / "one"), *flags, processes=2),
        capture_output=True, text=True, env=environment(), timeout=240,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert_same_bits(tmp_path / "two", tmp_path / "one")
    assert "done, so nothing is submitted" in submit(tmp_path / "two", images, *flags, cluster=("--nodes", "2"))


def test_a_job_that_is_requeued_ends_with_the_same_bits(slurm, images, undisturbed, tmp_path):
    out = tmp_path / "out"
    submit(out, images, *LONG)
    begun(out, epoch=2)
    assert "running, so nothing is submitted" in submit(out, images, *LONG)
    subprocess.run(["scontrol", "requeue", status_of(out)["job"]], check=True)
    status = ended(out, seconds=240)
    assert status["starts"] == 2
    assert "SIGTERM: stopped after step" in said(out) and "continuing at epoch" in said(out)
    assert_same_bits(out, undisturbed)


def test_a_job_that_its_time_limit_ends_requeues_itself_and_ends_with_the_same_bits(slurm, images, tmp_path):
    """Slurm's signal comes up to a minute earlier than it is asked for."""
    out, flags = tmp_path / "out", [*LONG, "--epochs", "140"]
    submit(out, images, *flags, cluster=("--time", "2", "--signal-before", "30"))
    local = subprocess.Popen(
        command(*FLAGS, *flags, "--data-path", str(images), "--output-dir", str(tmp_path / "undisturbed")),
        stdout=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    wait_for(lambda: status_of(out)["state"] == "requeued", 130, "the time limit")
    assert "requeued, so nothing is submitted" in submit(out, images, *flags)
    status = ended(out, seconds=800)
    assert status["starts"] >= 2
    assert "SIGUSR2: stopped after step" in said(out)
    assert local.wait(480) == 0
    assert_same_bits(out, tmp_path / "undisturbed")


def test_a_killed_node_is_no_bug_and_a_second_call_goes_on(slurm, images, undisturbed, tmp_path):
    out = tmp_path / "out"
    submit(out, images, *LONG)
    begun(out, epoch=3)
    subprocess.run(["pkill", "-KILL", "--full", f"submitit.core._submit {out}/slurm"], check=True)
    wait_for(lambda: not in_queue(status_of(out)["job"]), 60, "the job's end")
    assert status_of(out)["state"] == "running", "it had no time to say anything"
    assert find_state(out, query_queue()) == ("failed", "exited without a status (node failure or out of memory?)")
    assert "submitted as job" in submit(out, images, *LONG)
    ended(out)
    assert_same_bits(out, undisturbed)


def test_a_run_that_fails_is_not_started_again(slurm, images, tmp_path):
    out = tmp_path / "out"
    submit(out, images, "--unscale-lr", "--lr", "1e36", "--warmup-lr", "1e36", "--min-lr", "1e36")
    status = ended(out, "failed")
    assert "training stopped: the loss was not finite at step" in status["reason"]
    assert status["starts"] == 1


def test_a_job_that_an_earlier_version_queued_runs(slurm, images, tmp_path):
    """Submitted as submitit does it, with the pickle of that version; its folder is relative to sbatch's."""
    out = tmp_path / "queued_run"
    (out / "slurm").mkdir(parents=True)
    flags = [*FLAGS, "--data-path", str(images), "--output-dir", str(out)]
    (out / "job.json").write_text(json.dumps({"entry": "deit/main.py", "flags": flags, "most_idle_starts": 5}))
    parser = argparse.ArgumentParser()
    add_cluster_flags(parser)
    executor = create_executor(out / "slurm", Cluster.from_args(parser.parse_args(CLUSTER), 1, 1), "augsub-deit")
    script = tmp_path / "submission.sh"
    script.write_text(executor._make_submission_file_text(executor._submitit_command_str, "by hand"))
    command = ["sbatch", "--parsable", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    update_status(out, state="queued", job=job, reason="", idle=-1, starts=0)
    shutil.copyfile(ROOT / "tests" / "reference" / "queued_job.pkl", out / "slurm" / f"{job}_submitted.pkl")
    status = ended(out)
    assert status["starts"] == 1 and len(log_entries(out)) == 2


def test_starts_without_progress_come_to_an_end(images, tmp_path):
    """Killed three times before a first checkpoint; without Slurm, which would start such a job again and again."""
    out = tmp_path / "out"
    out.mkdir()
    flags = [*FLAGS, "--data-path", str(images), "--output-dir", str(out)]
    (out / "job.json").write_text(json.dumps({"entry": "deit/main.py", "flags": flags, "most_idle_starts": 2}))
    stage = [sys.executable, str(ROOT / "scripts" / "launch" / "job.py"), str(out)]
    for _ in range(3):
        process = subprocess.Popen(stage, stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None and any("training: 2 epochs" in line for line in process.stdout)
        process.kill()
        process.communicate()
    done = subprocess.run(stage, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    status = status_of(out)
    assert (status["state"], status["starts"]) == ("failed", 4)
    assert status["reason"] == "no progress in 3 starts, so it is not started again"


def test_a_table_of_two_stages(slurm, tmp_path):
    """The mini table's chain: the second stage waits for the first, a failing row does not hold up the others."""
    words = ["--mini", "deit/digits", "resnet_rsb/digits", "--augsub", "masking", "--output", str(tmp_path)]
    said_of = call("reproduce.py", *words, "--append", "--epochs", "1")
    first, second, third = (line for line in said_of.splitlines() if "submitted as job" in line)
    job = first.rpartition(" ")[2]
    assert second.endswith(f"after job {job}") and "after" not in third
    for stage in ("deit/digits-masking/pretrain", "deit/digits-masking/finetune", "resnet_rsb/digits-masking/train"):
        assert f"{stage}: done" in said_of
    folder = tmp_path / "deit" / "digits-masking--epochs-1"
    assert not folder.exists()
    folder = tmp_path / "deit" / "digits-masking-epochs-1"
    assert log_entries(folder / "finetune")[0]["epoch"] == 0
    again = call("reproduce.py", *words, "--append", "--epochs", "1")
    assert "submitted" not in again
    weights = files.load(folder / "finetune" / "checkpoint.pth")
    assert weights["args"]["finetune"] == str(folder / "pretrain" / "checkpoint.pth")


def test_slurms_own_words_are_told(slurm, images, tmp_path):
    error = submit(tmp_path / "out", images, cluster=("--partition", "none"), status=2)
    assert "submit.py: error: job augsub-deit: sbatch failed: " in error and "invalid partition specified" in error
    assert error.count("\n") == 1


def test_a_failing_row_does_not_hold_up_the_others(slurm, tmp_path):
    """What it starts from is no checkpoint; its second stage is not begun, and both are submitted again when mended."""
    words = ["--mini", "deit/digits", "resnet_rsb/digits", "--augsub", "masking", "--output", str(tmp_path)]
    broken = tmp_path / "deit" / "digits-masking-epochs-1" / "pretrain" / "checkpoint.pth"
    broken.parent.mkdir(parents=True)
    broken.write_text("no checkpoint")
    said_of = call("reproduce.py", *words, "--append", "--epochs", "1", status=1)
    unreadable = f"--output-dir {broken.parent}: none of the checkpoints can be read"
    assert f"deit/digits-masking/pretrain: failed: {unreadable}" in said_of
    assert "deit/digits-masking/finetune: failed: cancelled by a user, or because the stage before it failed" in said_of
    assert "resnet_rsb/digits-masking/train: done" in said_of
    shown = call("collect.py", "--mini", "--output", str(tmp_path), "--append", "--epochs", "1")
    (line,) = (line for line in shown.splitlines() if line.startswith("deit/digits AugMask pretrain"))
    assert "failed" in line and "or not a checkpoint" in line
    broken.unlink()
    again = call("reproduce.py", *words, "--append", "--epochs", "1")
    assert again.count("submitted as job") == 2 and "deit/digits-masking/finetune: done" in again


def test_sbatch_from_another_folder(slurm, tmp_path):
    """Slurm runs a copy of the script, which finds the project that it is of, also at a path with a space; and the jobs
    that it submits do not take its own limits for theirs."""
    (tmp_path / "my clone").symlink_to(ROOT)
    script = str(tmp_path / "my clone" / "scripts" / "reproduce_table.sh")
    for number, words in enumerate((
        ["--plan", "swin/tiny", "--data-path", "/data"],
        ["--mini", "resnet_rsb", "--augsub", "masking", "--mem", "900", "--output", "out", "--append", "--epochs", "1"],
    )):  # fmt: skip
        done = subprocess.run(
            ["sbatch", "--wait", f"--output={tmp_path}/said{number}", "--mem-per-cpu=50", script, *words],
            cwd=tmp_path, env=environment(PYTHON=sys.executable), capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + (tmp_path / f"said{number}").read_text()
    assert "in all: 2 runs" in (tmp_path / "said0").read_text()
    assert "resnet_rsb/digits-masking/train: done" in (tmp_path / "said1").read_text()


def test_submission_from_a_folder_with_modules_of_the_same_names(slurm, images, tmp_path):
    """The job's process unpickles `scripts.launch.job`, and its DataLoader workers import `common`: this repository's."""
    for name in ("common", "scripts", "deit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a module of the folder of the submission')\n")
    words = ["--cpu", "--nodes", "2", "--gpus-per-node", "1", "--", *FLAGS, "--num-workers", "1", "--batch-size", "16"]
    call("submit.py", "deit", *words, "--data-path", str(images), "--output-dir", "out", cwd=tmp_path)
    ended(tmp_path / "out")
    assert len(log_entries(tmp_path / "out")) == 2


def test_a_stage_that_is_stopped_does_not_begin_the_next(slurm, tmp_path):
    """By a SIGTERM, as from somebody's scancel; the second call goes on with it, and begins the next after it."""
    words = ["--mini", "deit/digits", "--augsub", "masking", "--output", str(tmp_path)]
    append = ["--append", "--epochs", "12", "--log-interval", "1"]
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *words, *append],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    row = wait_for(lambda: next(tmp_path.glob("deit/*"), None), 60, "a row")
    wait_for(lambda: "epoch 1/12  step 3/" in said(row / "pretrain"), 60, "the pretraining")
    job = status_of(row / "pretrain")["job"]
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    told, _ = first.communicate(timeout=120)
    assert "pretrain: stopped: by SIGTERM" in told, told
    assert "finetune: failed: cancelled by a user, or because the stage before it failed" in told
    assert first.returncode == 1
    assert not (row / "finetune" / "checkpoint.pth").exists()
    again = call("reproduce.py", *words, *append)
    assert again.count("submitted as job") == 2 and "finetune: done" in again


def test_a_job_on_a_node_that_fails_is_started_again(slurm, images, undisturbed, tmp_path):
    """The node comes back, as its daemon is there. The two minutes that Slurm lets pass are needed here: a node that still
    knows the job's first start refuses the second ("Duplicate jobid"), and Slurm holds the job then."""
    out = tmp_path / "out"
    submit(out, images, *LONG)
    begun(out, epoch=2)
    job = status_of(out)["job"]
    node = squeue(job, "%N")
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], check=True)
    assert f"requeue job JobId={job} due to failure of node {node}" in (slurm / "slurmctld.log").read_text()
    status = ended(out, seconds=480, hasten=False)
    assert status["starts"] == 2
    assert_same_bits(out, undisturbed)
