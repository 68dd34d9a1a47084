"""Runs a recipe on a Slurm cluster, or without Slurm on this machine.

    python scripts/submit.py deit --nodes 8 --gpus-per-node 8 --partition gpu --time 72:00:00 -- \
        --variant large_400 --augsub masking --data-path /data/imagenet --output-dir output/large_400

What follows `--` is the entry point's own. A job that its time limit or a preemption ends is saved, put back into the
queue and goes on; a second call submits nothing while the first one's job is queued or running, or when it is done.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from common.args import Parser, hyphenated, parse  # noqa: E402
from common.signals import uninterrupted  # noqa: E402
from scripts.command import complaining  # noqa: E402
from scripts.stage import JOB, STATUS, STOPPED, Queued, read, slurm, update_status, write  # noqa: E402
from scripts.table import ENTRIES, RECIPES  # noqa: E402

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
UNDER_WAY = ("queued", "running", "requeued")  # states of a run that is not to be submitted again
MOST_IDLE_STARTS = 5


def main() -> None:
    """Submits one run, or runs it here."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(description=__doc__, prog="submit.py")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", choices=ENTRIES)
    add_cluster_flags(parser)
    args = parser.parse_args(words[:cut])
    flags = words[cut + 1 :]
    with complaining(parser):
        check_cluster(args)
        folder = output_folder(flags)
        parse(RECIPES[args.recipe], flags)
        cluster = Cluster.of(args, args.nodes or 1, args.gpus_per_node or 1)
        with locked(folder):
            state, _ = state_of(folder, queue() if cluster.slurm else {})
            if state in (*UNDER_WAY, "done"):
                print(f"{folder}: {state}, so nothing is submitted")
                return
            print(f"{folder}: {submit(ENTRIES[args.recipe], flags, folder, cluster, f'augsub-{args.recipe}')}")
    if not cluster.slurm:
        sys.exit(run_here(folder, cluster))


def check_cluster(args: argparse.Namespace) -> None:
    """Raises ValueError where a number of nodes or GPUs is none."""
    for name in ("nodes", "gpus_per_node", "cpus_per_task"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{hyphenated(f'--{name}')} {value}: at least 1 is needed")


def output_folder(flags: Sequence[str]) -> Path:
    """The folder that a run's flags name; of several the last, as the run has it."""
    found = ""
    for at, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        if hyphenated(flag) in ("--output-dir", "--output"):
            found = value if equals else "".join(flags[at + 1 : at + 2])
    if found:
        return Path(found).absolute()
    raise ValueError("a run's --output-dir is needed, after --: a second call knows it by its folder")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """What a cluster wants to know."""
    add = parser.add_argument_group("cluster").add_argument
    add("--nodes", type=int, default=None, help="nodes of a job")
    add("--gpus-per-node", type=int, default=None, help="GPUs of a node, and processes on it")
    add("--cpu", action="store_true", help="ask for no GPUs: --gpus-per-node is the number of processes on a node")
    add("--partition", default=None)
    add("--account", default=None)
    add("--qos", default=None)
    add("--constraint", default=None)
    add("--time", default="72:00:00", help="limit of a start, [days-]hours:minutes:seconds")
    add("--cpus-per-task", type=int, default=None, help="cores of a process; by default 8 with a GPU, else 1")
    add("--mem", default=None, help="memory of a node, such as 400G")
    add("--signal-before", type=int, default=300, help="seconds before the time limit at which a job is asked to stop")
    add("--sbatch", nargs="+", default=[], metavar="KEY=VALUE", help="other options of sbatch, such as exclude=n7")
    add("--most-idle-starts", type=int, default=MOST_IDLE_STARTS, help="starts without progress before it fails")
    add("--local", action="store_true", help="run here, through torchrun, even where there is Slurm")


@dataclass(frozen=True)
class Cluster:
    """Where jobs run, and what they ask for."""

    slurm: bool
    nodes: int
    gpus: int  # processes of a node
    options: dict[str, Any]  # of submitit's Slurm executor
    most_idle_starts: int

    @classmethod
    def of(cls, args: argparse.Namespace, nodes: int, gpus: int) -> Cluster:
        """Raises ValueError where the flags do not fit together, or there is no Slurm for several nodes."""
        here = args.local or shutil.which("sbatch") is None
        if here and nodes > 1:
            raise ValueError(f"{nodes} nodes are wanted, and no Slurm is here (no sbatch): --nodes 1 runs here")
        other = dict(item.partition("=")[::2] for item in args.sbatch)
        options = {
            "time": minutes(args.time),
            "partition": args.partition,
            "account": args.account,
            "qos": args.qos,
            "constraint": args.constraint,
            "mem": args.mem,
            "cpus_per_task": args.cpus_per_task or (1 if args.cpu else 8),
            "signal_delay_s": args.signal_before,
            "gpus_per_node": None if args.cpu else gpus,
            "additional_parameters": {"requeue": True, **other},
        }
        return cls(not here, nodes, gpus, options, args.most_idle_starts)


def minutes(limit: str) -> int:
    """Slurm's [days-]hours:minutes:seconds, or minutes, as whole minutes."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        raise ValueError(f"--time {limit}: [days-]hours:minutes:seconds is expected, such as 72:00:00")
    days, *rest = (int(part) if part else 0 for part in found.groups())
    hours, mins, seconds = rest
    if found.group(3) is None and found.group(1) is None:  # one number counts minutes
        hours, mins = 0, hours
    elif found.group(4) is None and found.group(1) is None:  # two are minutes and seconds
        hours, mins, seconds = 0, hours, mins
    return max(1, days * 1440 + hours * 60 + mins + (seconds > 0))


def submit(
    entry: str, flags: Sequence[str], folder: Path, cluster: Cluster, name: str, after: str | None = None
) -> str:
    """Makes the folder of a job and hands it to Slurm → what there is to say. Without Slurm the folder alone.

    Args:
        entry: entry point, such as "deit/main.py".
        flags: its command line.
        folder: of the run.
        cluster: where it runs.
        name: of the job.
        after: id of the job that has to succeed first.

    Raises:
        ValueError: Slurm refuses; in its own words. OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = read(folder / STATUS).get("starts", 0)
    write(folder / JOB, {"entry": entry, "flags": list(flags), "most_idle_starts": cluster.most_idle_starts})
    if not cluster.slurm:
        begin_here(folder)
        return "runs here"
    with uninterrupted():  # else a job could be in the queue that no folder knows of
        job = to_slurm(folder, cluster, name, after)
        update_status(folder, state="queued", job=job, reason="", idle=-1, starts=starts)
    return f"submitted as job {job}" + (f", after job {after}" if after else "")


def begin_here(folder: Path) -> None:
    """Writes down that a run is this process's, on this machine."""
    update_status(folder, state="running", job=None, reason="", idle=-1, host=socket.gethostname(),
                  process=os.getpid())  # fmt: skip


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hides the variables of the job that this process is in, which its own jobs would take for theirs."""
    own = {name: value for name, value in os.environ.items() if name.startswith("SLURM_") and name != "SLURM_CONF"}
    for name in own:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(own)


def to_slurm(folder: Path, cluster: Cluster, name: str, after: str | None) -> str:
    """Submits through submitit → the job's id."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    executor = SlurmExecutor(folder / "slurm")
    options = {key: value for key, value in cluster.options.items() if value is not None}
    if after is not None:
        options["dependency"] = f"afterok:{after}"
        options["additional_parameters"] = options["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=name,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.gpus,
        stderr_to_stdout=True,
        # srun does not take the cores of a task from sbatch
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.options['cpus_per_task']}"],
        setup=[
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        ],
        **options,
    )
    try:
        with outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return str(executor.submit(Queued(folder)).job_id)
    except (FailedJobError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or getattr(error.__cause__, "stderr", None) or str(error)
        words = said.decode() if isinstance(said, bytes) else said
        raise ValueError(f"Slurm refuses {name}: {' '.join(words.split())}") from error


def queue() -> dict[str, str]:
    """Jobs that Slurm has, by id → their state, such as PENDING, with the reason why one waits; none without Slurm.

    Raises:
        ValueError: Slurm does not answer; in its own words.
    """
    if shutil.which("squeue") is None:
        return {}
    lines = slurm("squeue", "--noheader", "--states=all", "--format=%i|%T|%r").splitlines()
    return {job: f"{state} {reason}" for job, state, reason in (line.split("|", 2) for line in lines)}


ENDED = {
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "out of memory on a node: fewer --num-workers, or more --mem",
    "TIMEOUT": "its time limit came before it could save: a larger --signal-before",
    "CANCELLED": "cancelled, by somebody or since the stage before it failed",
    "DEADLINE": "its deadline passed",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "a node did not start",
}


def state_of(folder: Path, jobs: dict[str, str] | None) -> tuple[str, str]:
    """A run's state, missing, queued, running, requeued, stopped, done or failed, and the reason.

    Args:
        jobs: what `queue` gave; None takes the folder's word.
    """
    status = read(folder / STATUS)
    if not status:
        lost = [job for job in jobs or () if (folder / "slurm" / f"{job}_submitted.pkl").exists()]
        status = {"state": "queued", "job": max(lost, key=int), "starts": 1} if lost else {}
    if not status:
        return "missing", ""
    state, reason, job = status["state"], status.get("reason", ""), status.get("job")
    if state == "done" or (state == "failed" and reason):
        return state, reason
    if jobs is None:
        return state, reason
    if job is None:  # begun here, without Slurm
        host = status.get("host")
        if host != socket.gethostname() and state == "running":
            return state, f"on {host}, as it wrote last; if it does not, remove {folder / STATUS}"
        alive = _alive(status.get("process", 0))
        return (state, reason) if alive or state in ("stopped", "failed") else ("stopped", "it was cut off")
    slurms, _, why = (jobs.get(job) or accounted(job)).partition(" ")
    if slurms in WAITING:
        return ("requeued" if state == "requeued" else "queued"), why if why not in ("None", "") else ""
    if slurms in ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT"):
        return ("running", "") if state != "requeued" else ("requeued", "")
    ended = ENDED.get(slurms, "")
    if state == "stopped":
        return state, reason
    if state == "queued" and not ended and not status.get("starts"):
        said = last_words(folder, job)
        ended = f"it ended before it began: {said or 'do the nodes share this file system?'} (see {folder / 'slurm'})"
    return "failed", ended or "it ended without a word, as by a failing node or a full memory"


def last_words(folder: Path, job: str) -> str:
    """The last line that a job has printed."""
    for path in (folder / "slurm").glob(f"{job}_*log.out"):
        lines = path.read_text(errors="replace").split("\n")
        for line in reversed(lines):
            if line.strip():
                return line.strip()[:200]
    return ""


def accounted(job: str) -> str:
    """What became of a job that has left the queue, where Slurm keeps accounts; else ""."""
    done = subprocess.run(["sacct", "--noheader", "--allocations", "--format=State", "--jobs", job],
                          capture_output=True, text=True) if shutil.which("sacct") else None  # fmt: skip
    return done.stdout.strip() if done is not None and done.returncode == 0 else ""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return process > 0


def run_here(folder: Path, cluster: Cluster) -> int:
    """Runs a job's folder on this machine, several processes through torchrun → 0 if it is done, 3 if it was asked to
    stop, 1 if it failed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cluster.gpus)]
    if cluster.gpus == 1:
        launcher = [sys.executable]
    begin_here(folder)
    process = subprocess.Popen([*launcher, str(ROOT / "scripts" / "stage.py"), str(folder)])
    while True:
        try:
            process.wait()
            break
        except KeyboardInterrupt:  # the run has it too, and saves
            continue
    state = read(folder / STATUS).get("state")
    if state == "running":  # it could not say
        update_status(folder, state="failed", reason=f"it ended with status {process.returncode} and no word")
    return {"done": 0, "stopped": STOPPED}.get(str(state), 1)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one call at a time look at a folder's state and act upon it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
