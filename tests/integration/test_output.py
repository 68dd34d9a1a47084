"""Whole runs whose standard output and error are closed or full, and on folders and files of any name."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import ROOT, command, environment
from tests.runs import FLAGS, load_checkpoint, log_entries

NAME = "caf\udce9 名"  # with a byte that is not UTF-8, as Python decodes names of files
FILES = [".running", "args.json", "best", "best_checkpoint.pth", "checkpoint.pth", "last", "log.txt", "tensorboard"]


def run_in_shell(words: list[str], redirection: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    shell = ["bash", "-c", f"{shlex.join(words)} {redirection}"]
    return subprocess.run(shell, cwd=cwd, env=environment(**env), capture_output=True, timeout=240)


def check_files(folder: Path, curves: bool = True) -> None:
    """A run of one epoch has left all its files."""
    assert sorted(os.listdir(folder)) == (FILES if curves else FILES[:-1])
    assert len(log_entries(folder)) == 1 and load_checkpoint(folder)["epoch"] == 0
    if curves:
        scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("test/acc1")
        assert [point.value for point in scalars] == pytest.approx([log_entries(folder)[0]["test_acc1"]])


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_a_run_ends_and_writes_its_files_without_its_output(redirection, jpegs, tmp_path):
    flags = [*FLAGS, "--data-path", str(jpegs()), "--epochs", "1", "--output-dir", "out", "--num-workers", "1"]
    done = run_in_shell(command(*flags), redirection, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    check_files(tmp_path / "out")


@pytest.mark.slow
def test_two_processes_without_their_output(jpegs, tmp_path):
    flags = [*FLAGS, "--data-path", str(jpegs()), "--epochs", "1", "--batch-size", "4", "--output-dir", "out"]
    assert run_in_shell(command(*flags, processes=2), ">&- 2>&-", tmp_path).returncode == 0
    check_files(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "folder", "printed"), [
    ("ascii", "ünï 名", rb"caf\udce9 \u540d.jpg: unreadable"),
    ("utf-8:strict", NAME, "caf\\udce9 名.jpg: unreadable".encode()),
])  # fmt: skip
def test_names_that_cannot_be_printed(encoding, folder, printed, jpegs, tmp_path):
    """Of the output folder, a class and an unreadable image; only TensorBoard needs a folder in UTF-8, and the run
    goes on without it."""
    data = jpegs(train=60)
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / NAME)
    (data / "train" / NAME / f"{NAME}.jpg").write_bytes(b"broken")
    words = command(*FLAGS, "--data-path", str(data), "--epochs", "1", "--output-dir", folder, "--batch-size", "40")
    done = run_in_shell(words, "", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"") and printed in done.stdout
    assert (b"no TensorBoard curves; they need a name in UTF-8" in done.stdout) == (folder == NAME)
    check_files(tmp_path / folder, curves=folder != NAME)
    assert json.loads((tmp_path / folder / "args.json").read_text())["args"]["output_dir"] == folder
    again = run_in_shell(words, "", tmp_path, PYTHONIOENCODING=encoding)
    assert (again.returncode, again.stderr) == (0, b"") and b"all 1 epochs are trained already" in again.stdout


@pytest.mark.slow
def test_a_run_through_the_launcher_without_its_output(jpegs, tmp_path):
    flags = [*FLAGS, "--data-path", str(jpegs()), "--epochs", "1", "--output-dir", NAME]
    words = [sys.executable, str(ROOT / "scripts" / "submit.py"), "deit", "--local", "--", *flags]
    for redirection in (">/dev/full 2>&1", ">&- 2>&-"):  # the second call finds it done
        assert run_in_shell(words, redirection, tmp_path).returncode == 0
    assert json.loads((tmp_path / NAME / "status.json").read_text())["state"] == "done"
    shown = [sys.executable, str(ROOT / "scripts" / "collect.py"), "--mini", "--output", NAME]
    done = run_in_shell(shown, "", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.splitlines()[1].split()[:4] == [
        b"deit/digits",
        b"plain",
        b"pretrain",
        b"missing",
    ]
    lost = run_in_shell(shown, ">/dev/full", tmp_path)
    assert lost.returncode == 2
    assert lost.stderr.endswith(b"collect.py: error: standard output: could not be written (No space left on device)\n")
