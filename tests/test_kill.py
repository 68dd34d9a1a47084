"""Runs that are killed end with the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.soak import command_of, compare, descendants
from tests.conftest import ROOT, command, environment, make_jpegs, run
from tests.runs import FLAGS

SAVING = ["--save-every", "2", "--num-workers", "1"]


def test_sixty_kills(finished, tmp_path):
    """kill -9 at every kind of moment, five times each; what they leave are torn files, and a run that goes on."""
    flags, reference, _ = finished
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "60", "0", *FLAGS, *flags, *SAVING], cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (tmp_path / "said.txt").read_text()[-3000:]
    result = json.loads(done.stdout)
    assert sum(result["kills"].values()) == 60 and set(result["kills"].values()) == {5}, result["kills"]
    assert result["folders"]
    for folder in result["folders"]:
        assert compare(reference, tmp_path / folder) == [], folder
    said = (tmp_path / "said.txt").read_text()
    assert said.count("continuing at epoch") > 30
    assert "a data-loading process was killed" in said


def test_rank_1_of_2_is_killed_under_torchrun(tmp_path):
    """Which starts both again; they go on from the last checkpoint."""
    data = make_jpegs(tmp_path / "images")
    flags = [*FLAGS, "--data-path", str(data), "--batch-size", "2", "--augsub", "masking", "--log-interval", "1"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    alone = run(*flags, "--output-dir", str(undisturbed), cwd=tmp_path, processes=2)
    assert alone.returncode == 0, alone.stderr
    words = command(*flags, "--output-dir", str(disturbed), "--save-every", "1", processes=2)
    at = words.index("--standalone")
    draw, kills = random.Random(0), 0
    with open(tmp_path / "said.txt", "wb") as said:
        launcher = subprocess.Popen([*words[:at], "--max-restarts", "9", *words[at:]], cwd=tmp_path, stdout=said,
                                    stderr=said, env=environment())  # fmt: skip
        seen: set[int] = set()
        end = time.monotonic() + 200
        while launcher.poll() is None and time.monotonic() < end:
            second = [pid for pid in descendants(launcher.pid) if rank_of(pid) == "1" and pid not in seen]
            if second and kills < 3 and trains(tmp_path / "said.txt", kills):
                time.sleep(draw.uniform(0, 0.2))
                os.kill(second[0], signal.SIGKILL)
                seen.add(second[0])
                kills += 1
            time.sleep(0.02)
    text = (tmp_path / "said.txt").read_text()
    assert launcher.wait(30) == 0, text
    assert kills == 3 and text.count("continuing at epoch") == 3, text
    assert compare(undisturbed, disturbed) == []


def rank_of(pid: int) -> str | None:
    """The rank of a process, from its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return None
    if "torch.distributed.run" in command_of(pid) or "main.py" not in command_of(pid):
        return None
    return dict(word.partition("=")[::2] for word in variables if "=" in word).get("RANK")


def trains(said: Path, starts: int) -> bool:
    """Whether the start of that number, counted from 0, has made a step."""
    parts = said.read_text().split("training: ")
    return len(parts) > starts + 1 and " step " in parts[starts + 1]


def test_a_short_soak(tmp_path):
    """The script itself, with at least ten disturbances; other recipes and more of them are for longer ones."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kills", "10", "--recipes", "deit", "--folder",
         str(tmp_path / "soak")], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(", 0 mismatches") and "same bits" in done.stdout
    count = int(done.stdout.rstrip().rpartition("\n")[2].partition(": ")[2].partition(" ")[0])
    assert count >= 10


def test_soak_finds_what_differs(finished, continued):
    reference, copy = finished[1], continued[1]
    assert compare(reference, copy) == []
    lines = (copy / "log.txt").read_text().splitlines()
    (copy / "log.txt").write_text("\n".join([*lines[:-1], lines[-1].replace("1", "2", 1)]) + "\n")
    assert compare(reference, copy) == ["log.txt"]
