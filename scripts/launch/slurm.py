"""Slurm: flags of a cluster, submission through submitit, and what squeue, sacct and scontrol report."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.flag_types import non_negative_int, number, positive_int
from scripts.launch.registry import ROOT

if TYPE_CHECKING:
    from submitit import SlurmExecutor


MAX_SIGNAL_DELAY_S = 65535  # of sbatch's --signal

signal_delay = number(int, lambda value: 1 <= value <= MAX_SIGNAL_DELAY_S, f"seconds from 1 to {MAX_SIGNAL_DELAY_S}")


def sbatch_option(text: str) -> str:
    """Accept KEY=VALUE."""
    key, equals, _ = text.partition("=")
    if not key.strip("-") or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE, such as exclude=n7")
    return text


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `Cluster`."""
    add = parser.add_argument_group("cluster").add_argument
    add("--nodes", type=positive_int, default=None, help="nodes of a job")
    add("--gpus-per-node", type=positive_int, default=None, help="GPUs of a node, and processes on it")
    add("--cpu", action="store_true", help="ask for no GPUs: --gpus-per-node is the number of processes on a node")
    add("--partition", default=None, help="as sbatch's")
    add("--account", default=None, help="as sbatch's")
    add("--qos", default=None, help="as sbatch's")
    add("--constraint", default=None, help="as sbatch's")
    add("--time", type=parse_time_limit, default="72:00:00", help="limit of a start, [days-]hours:minutes:seconds")
    add("--cpus-per-task", type=positive_int, help="cores of a process; by default 8 with a GPU, else 1")
    add("--mem", default=None, help="memory of a node, such as 400G")
    add(
        "--signal-before",
        type=signal_delay,
        default=300,
        help="seconds before the time limit at which a job is asked to stop",
    )
    add(
        "--sbatch",
        type=sbatch_option,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="other options of sbatch, such as exclude=n7",
    )
    add("--most-idle-starts", type=non_negative_int, default=5, help="starts without progress before it fails")
    add("--local", action="store_true", help="run here, through torchrun, even where there is Slurm")


@dataclass(frozen=True)
class Cluster:
    """Where jobs run, and what they request."""

    slurm: bool  # else they run on this machine
    nodes: int  # of a job
    gpus: int  # of a node, with a process on each
    options: dict[str, Any]  # of submitit's `SlurmExecutor`
    most_idle_starts: int  # starts of a job without a new checkpoint before it fails

    @classmethod
    def from_args(cls, args: argparse.Namespace, nodes: int, gpus: int) -> Cluster:
        """Raise ValueError where several nodes are requested without Slurm."""
        local = args.local or shutil.which("sbatch") is None
        if local and nodes > 1:
            raise ValueError(f"--nodes {nodes}: several nodes need Slurm (no sbatch here, or --local); use --nodes 1")
        options = {
            "time": args.time,
            "partition": args.partition,
            "account": args.account,
            "qos": args.qos,
            "constraint": args.constraint,
            "mem": args.mem,
            "cpus_per_task": args.cpus_per_task or (1 if args.cpu else 8),
            "signal_delay_s": args.signal_before,
            "gpus_per_node": None if args.cpu else gpus,
            "additional_parameters": {"requeue": True, **dict(item.partition("=")[::2] for item in args.sbatch)},
        }
        return cls(not local, nodes, gpus, options, args.most_idle_starts)


def parse_time_limit(text: str) -> int:
    """sbatch's --time → minutes, rounded up.

    Formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected [days-]hours:minutes:seconds, such as 72:00:00")
    first, second, third = (int(part or 0) for part in match.groups()[1:])
    if match[1] is not None or match[4] is not None:
        hours, minutes, seconds = first, second, third
    else:  # without days, one number is minutes, and two are minutes and seconds
        hours, minutes, seconds = 0, first, second
    return max(1, int(match[1] or 0) * 1440 + hours * 60 + minutes + (seconds > 0))


def submit_to_slurm(
    function: Callable[[], None], folder: Path, cluster: Cluster, name: str, after: str | None = None
) -> str:
    """Submit a job through submitit → its id.

    Args:
        function: called in each process of the job; pickled.
        folder: for submitit's files and the job's output.
        after: id of a job that has to succeed first.

    Raises:
        ValueError: sbatch fails; with its message.
    """
    from submitit.core.utils import FailedJobError

    executor = create_executor(folder, cluster, name, after)
    try:
        with outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
            return str(executor.submit(function).job_id)
    except (FailedJobError, subprocess.CalledProcessError) as error:
        message = getattr(error, "stderr", None) or getattr(error.__cause__, "stderr", None) or str(error)
        text = message.decode() if isinstance(message, bytes) else message
        raise ValueError(f"job {name}: sbatch failed: {' '.join(text.split())}") from error


def create_executor(folder: Path, cluster: Cluster, name: str, after: str | None = None) -> SlurmExecutor:
    """submitit's executor for `submit_to_slurm`."""
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder)
    options = {key: value for key, value in cluster.options.items() if value is not None}
    if after is not None:
        options["dependency"] = f"afterok:{after}"
        options["additional_parameters"] = options["additional_parameters"] | {"kill-on-invalid-dep": "yes"}
    executor.update_parameters(
        job_name=name,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.gpus,
        stderr_to_stdout=True,
        # since Slurm 22.05 srun does not inherit sbatch's --cpus-per-task
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.options['cpus_per_task']}"],
        setup=[
            # `python -m submitit…` unpickles the job in a new process, which must find this repository's modules, and
            # must not find another common/ or scripts/ in the folder of the submission
            "export PYTHONSAFEPATH=1",
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        ],
        **options,
    )
    return executor


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the SLURM_* variables of the job that this process runs in, which sbatch would take as options.

    Not submitit's `clean_env`: it also removes SBATCH_*, with which users set their defaults.
    """
    hidden = {name: value for name, value in os.environ.items() if name.startswith("SLURM_") and name != "SLURM_CONF"}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def query_queue() -> dict[str, str]:
    """Jobs in squeue: id → state and reason, such as "PENDING Priority"; empty without Slurm.

    Raises:
        ValueError: squeue fails; with its message.
    """
    if shutil.which("squeue") is None:
        return {}
    lines = run_slurm("squeue", "--noheader", "--states=all", "--format=%i|%T|%r").splitlines()
    return {job: f"{state} {reason}" for job, state, reason in (line.split("|", 2) for line in lines)}


def query_accounting(job: str) -> str:
    """State of a job that has left the queue, from sacct; "" where Slurm keeps no accounts."""
    if shutil.which("sacct") is None:
        return ""
    command = ["sacct", "--noheader", "--allocations", "--format=State", "--jobs", job]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def query_job(job: str) -> dict[str, str]:
    """Fields of a job in `scontrol show job`."""
    return _fields(run_slurm("scontrol", "--oneliner", "show", "job", job))


def node_address(nodelist: str) -> str:
    """Address of the first node of a list such as "n[1-4]"."""
    name = run_slurm("scontrol", "show", "hostnames", nodelist).split()[0]
    return _fields(run_slurm("scontrol", "--oneliner", "show", "node", name)).get("NodeAddr", name)


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def run_slurm(*command: str) -> str:
    """Standard output of one of Slurm's commands.

    Raises:
        ValueError: it fails; with its message.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout
