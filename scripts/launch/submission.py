"""Start a run as a job: its folder, then Slurm or this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.run_dir import acquire_lock
from common.signals import defer_sigint
from scripts.launch.job import EXIT_STOPPED, TrainJob
from scripts.launch.registry import ROOT
from scripts.launch.slurm import Cluster, submit_to_slurm
from scripts.launch.status import JOB_FILE, STATUS_FILE, read_json, update_status, write_json

JOB_SCRIPT = Path(__file__).with_name("job.py")


@contextlib.contextmanager
def lock_submissions(folder: Path) -> Iterator[None]:
    """Let one command at a time read the states of the runs in a folder and act on them.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(folder / ".lock", timeout_s=-1)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def submit_job(
    entry: str, flags: Sequence[str], folder: Path, cluster: Cluster, name: str, after: str | None = None
) -> str | None:
    """Create the folder of a job and submit it → the job's id; None without Slurm, where `run_here` is to follow.

    Args:
        entry: entry point, such as "deit/main.py", with its `flags`.
        after: id of a job that has to succeed first.

    Raises:
        ValueError: sbatch fails; with its message. OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = read_json(folder / STATUS_FILE).get("starts", 0)
    job_file = {"entry": entry, "flags": list(flags), "most_idle_starts": cluster.most_idle_starts}
    write_json(folder / JOB_FILE, job_file)
    if not cluster.slurm:
        mark_running_here(folder)
        return None
    with defer_sigint():  # else a job could be in the queue without its id in status.json
        job = submit_to_slurm(TrainJob(folder), folder / "slurm", cluster, name, after)
        update_status(folder, state="queued", job=job, reason="", idle=-1, starts=starts)
    return job


def mark_running_here(folder: Path) -> None:
    """Write this process and machine into status.json."""
    host, process = socket.gethostname(), os.getpid()
    update_status(folder, state="running", job=None, reason="", idle=-1, host=host, process=process)


def run_here(folder: Path, gpus: int) -> int:
    """Run a job's folder on this machine → exit code: 0 done, 3 stopped, 1 failed.

    Args:
        gpus: processes; several are started through torchrun.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    mark_running_here(folder)
    # as in a Slurm job: whatever process a run starts finds this repository's modules
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, *torchrun, str(JOB_SCRIPT), str(folder)], env=environment)
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to the run too, which saves and exits
            process.wait()
    state = read_json(folder / STATUS_FILE).get("state")
    if state == "running":  # killed, or it failed before it could write
        update_status(folder, state="failed", reason=f"exited with code {process.returncode} and no message")
    return {"done": 0, "stopped": EXIT_STOPPED}.get(str(state), 1)
