"""Runs that are killed end with the same bits as an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.chaos.kills import KILL_POINTS
from tests.chaos.soak import list_children
from tests.commands import ROOT, command, environment, run
from tests.compare_runs import diff_runs
from tests.runs import FLAGS
from tests.sample_data import make_jpegs

SAVING = ["--save-every", "2", "--num-workers", "1"]


def test_five_kills_at_each_point(finished, tmp_path):
    """kill -9; what is left are torn files, a run that is resumed, and models that timm loads."""
    flags, baseline, _ = finished
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.kills", str(5 * len(KILL_POINTS)), "0", *FLAGS, *flags, *SAVING], cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    console = (tmp_path / "console.txt").read_text()
    assert done.returncode == 0, done.stderr + console[-3000:]
    result = json.loads(done.stdout)
    assert result["kills"].keys() == KILL_POINTS.keys() and set(result["kills"].values()) == {5}, result["kills"]
    assert result["folders"] and result["loaded"] > 30
    for folder in result["folders"]:
        assert diff_runs(baseline, tmp_path / folder) == [], folder
    assert console.count("continuing at epoch") > 30
    assert "a DataLoader worker was killed" in console


def test_rank_1_of_2_is_killed_under_torchrun(tmp_path):
    """torchrun starts both ranks again; they resume from the last checkpoint."""
    data = make_jpegs(tmp_path / "images")
    flags = [*FLAGS, "--data-path", str(data), "--batch-size", "2", "--augsub", "masking", "--log-interval", "1"]
    baseline, disturbed, console = tmp_path / "baseline", tmp_path / "disturbed", tmp_path / "console.txt"
    done = run(*flags, "--output-dir", str(baseline), cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    words = command(*flags, "--output-dir", str(disturbed), "--save-every", "1", processes=2)
    at = words.index("--standalone")
    rng, killed = random.Random(0), list[psutil.Process]()
    with open(console, "wb") as output:
        launcher = psutil.Popen([*words[:at], "--max-restarts", "9", *words[at:]], cwd=tmp_path, stdout=output,
                                stderr=output, env=environment())  # fmt: skip
        end = time.monotonic() + 200
        while launcher.poll() is None and time.monotonic() < end:
            trainers = [child for child in list_children(launcher) if child not in killed and rank_of(child) == "1"]
            if trainers and len(killed) < 3 and has_stepped(console, len(killed)):
                time.sleep(rng.uniform(0, 0.2))
                trainers[0].kill()
                killed.append(trainers[0])
            time.sleep(0.02)
    text = console.read_text()
    assert launcher.wait(30) == 0, text
    assert len(killed) == 3 and text.count("continuing at epoch") == 3, text
    assert diff_runs(baseline, disturbed) == []


def rank_of(process: psutil.Process) -> str | None:
    """The rank that torchrun gave to a process."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.environ().get("RANK")
    return None


def has_stepped(console: Path, start: int) -> bool:
    """Whether the start of that number, counted from 0, has made a step."""
    parts = console.read_text().split("training: ")
    return len(parts) > start + 1 and " step " in parts[start + 1]


def test_a_short_soak(tmp_path):
    """The script itself, with at least ten disturbances; other recipes and more disturbances are for longer soaks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.soak", "--kills", "10", "--recipes", "deit",
         "--folder", str(tmp_path / "soak")], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(", 0 mismatches") and "same bits" in done.stdout
    count = int(done.stdout.rstrip().rpartition("\n")[2].partition(": ")[2].partition(" ")[0])
    assert count >= 10


def test_a_difference_between_two_runs_is_named(finished, continued):
    baseline, copy = finished[1], continued[1]
    assert diff_runs(baseline, copy) == []
    lines = (copy / "log.txt").read_text().splitlines()
    (copy / "log.txt").write_text("\n".join([*lines[:-1], lines[-1].replace("1", "2", 1)]) + "\n")
    assert diff_runs(baseline, copy) == ["log.txt"]
