"""One run as a job: does it, and writes down where it stands.

    torchrun --standalone --nproc-per-node 2 scripts/stage.py output/table/deit/small_400-masking/train

The folder holds job.json (what to run), status.json (where it stands) and the run's own checkpoints and logs.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.errors import Leaving, is_main_before_start  # noqa: E402
from common.folder import LAST, replacing  # noqa: E402
from common.run import run  # noqa: E402

JOB, STATUS = "job.json", "status.json"
STATES = ("queued", "running", "stopped", "requeued", "done", "failed")


def read(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: it holds no JSON") from error
    known = path.name != STATUS or (isinstance(found, dict) and found.get("state") in STATES)
    if not isinstance(found, dict) or not known:
        raise ValueError(f"{path} is damaged: it does not say what it should")
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, complete or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def update_status(folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes the status of a job's folder; `state` is one of `STATES`."""
    status = read(folder / STATUS) | changes | {"time": time.time()}
    write(folder / STATUS, status)
    return status


def carry_out(folder: Path) -> str | None:
    """Runs what the folder says → None if it is done, or the signal on whose request it stopped before.

    Raises:
        SystemExit, Exception: the run failed; the status says why.
    """
    job = read(folder / JOB)
    recipe = importlib.import_module(f"{Path(job['entry']).parent}.recipe").RECIPE
    if is_main_before_start():
        begin(folder, job["most_idle_starts"])
    sys.argv = [job["entry"], *job["flags"]]
    try:
        stopped = run(recipe, job["flags"])
    except Leaving as leaving:
        if leaving.sentence:  # the first of all processes to leave
            update_status(folder, state="failed", reason=leaving.sentence)
        raise
    except Exception as error:
        kind = "out of memory" if is_memory(error) else type(error).__name__
        update_status(folder, state="failed", reason=f"{kind}: {' '.join(str(error).split())[:200]}")
        raise
    if is_main_before_start():
        update_status(folder, state="stopped" if stopped else "done", reason=f"by {stopped}" if stopped else "")
    return stopped


def is_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    import torch

    of_host = ("not enough memory", "can't allocate memory")  # PyTorch's words
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in of_host)


def begin(folder: Path, most_idle_starts: int) -> None:
    """Counts a start, and how many there were since the checkpoint last moved on.

    Raises:
        Leaving: too many.
    """
    status = read(folder / STATUS)
    files = list(folder.rglob(LAST))  # the Swin recipe makes folders of its own in it
    saved = max((file.stat().st_mtime_ns for file in files), default=0)
    idle = status.get("idle", -1) + 1 if status.get("saved", saved) == saved else 0
    starts = status.get("starts", 0) + 1
    update_status(folder, state="running", reason="", starts=starts, saved=saved, idle=idle)
    if idle > most_idle_starts:
        sentence = f"no progress in {idle} starts, so it is not started again"
        update_status(folder, state="failed", reason=sentence)
        raise Leaving(sentence, 2)


STOPPED = 3  # status of a run that was asked to stop before its end


class Queued:
    """What Slurm runs in each task of a job, through submitit: a process of the run in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        meet()
        stopped = carry_out(self.folder)
        if stopped == "SIGUSR2" or (stopped == "SIGTERM" and preempted()):  # ahead of a time limit or a preemption
            requeue(self.folder)
        if stopped:
            raise SystemExit(STOPPED)  # what comes after this job in a chain must not begin


def meet() -> None:
    """Tells the processes of a job where to meet, at a place of its own for each start."""
    job, starts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    names = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    node = slurm("scontrol", "--oneliner", "show", "node", names[0])
    address = dict(word.split("=", 1) for word in node.split() if "=" in word).get("NodeAddr", names[0])
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(20_000 + (job * 64 + starts) % 12_000),  # below the ports that systems give out themselves
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }


def preempted() -> bool:
    """Whether Slurm has begun to preempt this job; who cancels one sends SIGTERM too."""
    job = slurm("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"])
    found = dict(word.split("=", 1) for word in job.split() if "=" in word)
    return found.get("JobState") != "CANCELLED" and found.get("PreemptTime", "None") not in ("None", "N/A", "")


def requeue(folder: Path) -> None:
    """Puts this job back into the queue, which ends it; the process waits for that."""
    if is_main_before_start():
        update_status(folder, state="requeued", reason="")
        slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    time.sleep(300)
    raise RuntimeError("Slurm did not end the job that was to be requeued")


def slurm(*command: str) -> str:
    """What a command of Slurm's prints.

    Raises:
        ValueError: it fails; in Slurm's own words.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    if not (place / JOB).exists():
        sys.exit(f"{Path(sys.argv[0]).name}: error: {place} holds no {JOB}: scripts/submit.py makes such a folder")
    carry_out(place)
