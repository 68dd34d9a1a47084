"""The job of one run: trains what its folder says and keeps status.json up to date.

    torchrun --standalone --nproc-per-node 2 scripts/launch/job.py output/table/deit/small_400-masking/train

The folder holds job.json (the command), status.json (the state) and the run's own checkpoints and logs.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2]) if __name__ == "__main__" else sys.path[0]

from common.cli import run  # noqa: E402
from common.errors import CleanExit, is_rank_zero_from_env  # noqa: E402
from common.flag_types import nonempty_path  # noqa: E402
from common.parser import Parser  # noqa: E402
from common.run_dir import LAST  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import cli_errors  # noqa: E402
from scripts.launch.registry import recipe_of  # noqa: E402
from scripts.launch.slurm import node_address, query_job, run_slurm  # noqa: E402
from scripts.launch.status import JOB_FILE, STATUS_FILE, read_json, update_status  # noqa: E402

EXIT_STOPPED = 3  # exit code of a run that was stopped before its end
REQUEUE_TIMEOUT_S = 300  # far above Slurm's KillWait (30 s by default), after which it kills a requeued job


class TrainJob:
    """What Slurm runs in each process of a job, through submitit."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        init_rendezvous()
        stopped_by = run_stage(self.folder)
        # SIGUSR2 comes ahead of the time limit or a preemption; SIGTERM from a preemption or a user's scancel
        if stopped_by == "SIGUSR2" or (stopped_by == "SIGTERM" and is_preempted()):
            requeue_job(self.folder)
        if stopped_by:
            raise SystemExit(EXIT_STOPPED)  # not 0: jobs that wait for this one (afterok) must not start


def init_rendezvous() -> None:
    """Set torch.distributed's environment variables from Slurm's, with another port for each start of the job.

    Not submitit's TorchDistributedEnvironment: its port depends on the job's id alone, so a requeued job could meet
    ranks of its previous start.
    """
    job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    os.environ |= {
        "MASTER_ADDR": node_address(os.environ["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(20_000 + (job * 64 + restarts) % 12_000),  # below the kernel's ephemeral ports, from 32768
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }


def run_stage(folder: Path) -> str | None:
    """Run the command in a folder's job.json → None when it is done, or the name of the signal that stopped it.

    Raises:
        SystemExit, Exception: the run failed; status.json has the reason.
    """
    job = read_json(folder / JOB_FILE)
    if is_rank_zero_from_env():
        count_start(folder, job["most_idle_starts"])
    sys.argv = [job["entry"], *job["flags"]]
    try:
        stopped_by = run(recipe_of(job["entry"]), job["flags"])
    except CleanExit as clean_exit:
        if clean_exit.message:  # "" on all ranks but the one that reports
            update_status(folder, state="failed", reason=clean_exit.message)
        raise
    except Exception as error:
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        update_status(folder, state="failed", reason=f"{kind}: {' '.join(str(error).split())[:200]}")
        raise
    if is_rank_zero_from_env():
        reason = f"by {stopped_by}" if stopped_by else ""
        update_status(folder, state="stopped" if stopped_by else "done", reason=reason)
    return stopped_by


def count_start(folder: Path, most_idle_starts: int) -> None:
    """Count this start, and the starts since the checkpoint last changed.

    Raises:
        CleanExit: there were more than `most_idle_starts` of those.
    """
    status = read_json(folder / STATUS_FILE)
    checkpoints = list(folder.rglob(LAST))  # the Swin recipe makes subfolders in the run's folder
    saved = max((path.stat().st_mtime_ns for path in checkpoints), default=0)
    idle = status.get("idle", -1) + 1 if status.get("saved", saved) == saved else 0
    starts = status.get("starts", 0) + 1
    update_status(folder, state="running", reason="", starts=starts, saved=saved, idle=idle)
    if idle > most_idle_starts:
        reason = f"no progress in {idle} starts, so it is not started again"
        update_status(folder, state="failed", reason=reason)
        raise CleanExit(reason, 2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    import torch

    host_messages = ("not enough memory", "can't allocate memory")  # of PyTorch's CPU allocator, a RuntimeError
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in host_messages)


def is_preempted() -> bool:
    """Whether Slurm has begun to preempt this job; scancel sends SIGTERM too."""
    job = query_job(os.environ["SLURM_JOB_ID"])
    return job.get("JobState") != "CANCELLED" and job.get("PreemptTime", "None") not in ("None", "N/A", "")


def requeue_job(folder: Path) -> None:
    """Requeue this job, on all ranks; does not return, as Slurm kills the job.

    Not submitit's requeue: it runs in rank 0's signal handler, in mid-step and while the other ranks go on.
    """
    if is_rank_zero_from_env():
        update_status(folder, state="requeued", reason="")
        run_slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    # A rank that exits before Slurm has carried out the request would end the whole job (srun --kill-on-bad-exit), and
    # a job that is over is not requeued. So all ranks wait to be killed.
    time.sleep(REQUEUE_TIMEOUT_S)
    raise RuntimeError(f"job {os.environ['SLURM_JOB_ID']}: requeued, but not ended by Slurm in {REQUEUE_TIMEOUT_S} s")


def main() -> None:
    """Run the job of the folder on the command line."""
    protect_output()
    parser = Parser(description=__doc__, prog="job.py", raw_description=True)
    parser.add_argument("folder", type=nonempty_path, help=f"holds {JOB_FILE}")
    folder = Path(parser.parse_args().folder)
    with cli_errors(parser):
        if not read_json(folder / JOB_FILE):
            raise ValueError(f"{folder}: no {JOB_FILE}; scripts/submit.py creates such folders")
    run_stage(folder)


if __name__ == "__main__":
    main()
