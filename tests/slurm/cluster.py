"""A real Slurm of two nodes on this machine, in a folder of its own, for as long as the tests last."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "runuser")
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
KillWait=20
ReturnToService=2
MpiDefault=none
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=1000
PartitionName=tests Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What stands in the way of a cluster; "" for nothing."""
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    if programs:
        return f"Slurm is not installed: {', '.join(programs)} missing"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started by root"


@contextmanager
def cluster() -> Iterator[Path]:
    """Start the daemons and set SLURM_CONF → their folder; stops them at the end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge has a user of its own
    for name in ("munge", "state"):
        (folder / name).mkdir()
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (folder / "munge" / "key").chmod(0o400)
    subprocess.run(["chown", "-R", "munge", str(folder / "munge")], check=True)
    text = CONFIGURATION.format(folder=folder, host=socket.gethostname(), ports=free_ports())
    (folder / "slurm.conf").write_text(text)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    places = [
        f"--{name}={folder}/munge/{name.split('-')[0]}"
        for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    daemons = [["runuser", "-u", "munge", "--", "munged", "--foreground", *places], ["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", name] for name in ("n1", "n2")]
    started = []
    try:
        for command in daemons:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(0.5)
        wait_for(lambda: sinfo().count("idle") == 2, 60, "two idle nodes")
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def sinfo() -> str:
    """A word for each node: idle, alloc, down."""
    return subprocess.run(["sinfo", "--noheader", "--Node", "--format=%t"], capture_output=True, text=True).stdout


def free_ports() -> list[int]:
    """Three ports in a row that nobody listens to."""
    for first in range(17_100, 19_000, 10):
        try:
            for port in range(first, first + 3):
                with socket.socket() as trial:
                    trial.bind(("127.0.0.1", port))
        except OSError:
            continue
        return [first, first + 1, first + 2]
    raise RuntimeError("no free ports")


def wait_for(happened, seconds: float, what: str):
    """Look again and again → the first thing that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = happened()
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")
