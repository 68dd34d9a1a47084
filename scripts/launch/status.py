"""Status of a run: job.json and status.json in its folder, and what Slurm or the process table says beside them."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from common.run_dir import atomic_write
from scripts.launch.slurm import query_accounting

JOB_FILE, STATUS_FILE = "job.json", "status.json"
STATES = ("queued", "running", "stopped", "requeued", "done", "failed")
IN_PROGRESS = ("queued", "running", "requeued")  # a second call does not submit these


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; {} where it is absent.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: not JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a dict, found {type(content).__name__}")
    if path.name == STATUS_FILE and content.get("state") not in STATES:
        raise ValueError(f"{path} is damaged: unknown state {content.get('state')!r}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def update_status(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of status.json; `state` is one of `STATES`."""
    status = read_json(folder / STATUS_FILE) | changes | {"time": time.time()}
    write_json(folder / STATUS_FILE, status)
    return status


# What is seen of a run from outside, beside its status.json.
PENDING, ACTIVE, ENDED = "pending", "active", "ended"  # a job of Slurm's
ALIVE, DEAD, REMOTE = "alive", "dead", "remote"  # a process: on this machine, no longer there, on another machine
UNKNOWN = "unknown"  # Slurm does not answer
SLURM_STATES = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"), PENDING),
    **dict.fromkeys(("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT"), ACTIVE),
}  # all others have ended, and so have jobs that Slurm no longer lists

# (state in status.json, what is seen) → state. A pair that is absent keeps the state and the reason of status.json.
# "done" and "failed" with a reason are final and not looked up.
SEEN_STATES = {
    ("queued", PENDING): "queued",
    ("running", PENDING): "queued",  # Slurm requeued it without asking, as after a node failure
    ("stopped", PENDING): "queued",  # it stopped on the SIGTERM of a `scontrol requeue`
    ("failed", PENDING): "queued",
    ("requeued", PENDING): "requeued",
    ("queued", ACTIVE): "running",
    ("running", ACTIVE): "running",
    ("stopped", ACTIVE): "running",  # still exiting, or started again and still importing
    ("failed", ACTIVE): "running",
    ("requeued", ACTIVE): "requeued",  # Slurm is still ending the previous start
    ("queued", ENDED): "failed",
    ("running", ENDED): "failed",
    ("failed", ENDED): "failed",
    ("requeued", ENDED): "failed",
    ("queued", DEAD): "stopped",
    ("running", DEAD): "stopped",
    ("requeued", DEAD): "stopped",
    ("running", REMOTE): "running",
}

END_REASONS = {
    "NODE_FAIL": "node failure",
    "OUT_OF_MEMORY": "out of memory on a node; lower --num-workers or raise --mem",
    "TIMEOUT": "time limit reached before a checkpoint was saved; raise --signal-before",
    "CANCELLED": "cancelled by a user, or because the stage before it failed",
    "DEADLINE": "deadline reached",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "a node did not boot",
}


def find_state(folder: Path, queue: dict[str, str] | None) -> tuple[str, str]:
    """State of a run, one of `STATES` or "missing", and the reason.

    Args:
        queue: from `query_queue`; None where Slurm does not answer, and status.json alone decides.
    """
    status = read_json(folder / STATUS_FILE) or _status_of_lost_job(folder, queue)
    if not status:
        return "missing", ""
    state, reason = status["state"], status.get("reason", "")
    if state == "done" or (state == "failed" and reason):
        return state, reason
    seen, slurm_state, slurm_reason = _look_up(status, queue)
    if (state, seen) not in SEEN_STATES:
        return state, reason
    if seen == PENDING:
        reason = slurm_reason if slurm_reason != "None" else ""
    elif seen == ENDED:
        reason = END_REASONS.get(slurm_state) or _explain_end(folder, status)
    elif seen == DEAD:
        reason = "process killed"
    elif seen == REMOTE:
        reason = f"on {status.get('host')} according to {STATUS_FILE}; if it is not, remove {folder / STATUS_FILE}"
    else:
        reason = ""
    return SEEN_STATES[state, seen], reason


def _status_of_lost_job(folder: Path, queue: dict[str, str] | None) -> dict[str, Any]:
    """Status for a folder without status.json whose job is in the queue: its submission was cut off in between."""
    jobs = [job for job in queue or () if (folder / "slurm" / f"{job}_submitted.pkl").exists()]
    return {"state": "queued", "job": max(jobs, key=int), "starts": 1} if jobs else {}


def _look_up(status: dict[str, Any], queue: dict[str, str] | None) -> tuple[str, str, str]:
    """What is seen of a run from outside, Slurm's state of its job, and Slurm's reason for it."""
    if queue is None:
        return UNKNOWN, "", ""
    job = status.get("job")
    if job is None:
        return _look_up_process(status), "", ""
    slurm_state, _, slurm_reason = (queue.get(job) or query_accounting(job)).partition(" ")
    return SLURM_STATES.get(slurm_state, ENDED), slurm_state, slurm_reason


def _look_up_process(status: dict[str, Any]) -> str:
    """What is seen of a run without Slurm."""
    if status["state"] == "running" and status.get("host") != socket.gethostname():
        return REMOTE
    process = status.get("process", 0)
    try:
        os.kill(process, 0)
    except OSError:
        return DEAD
    return ALIVE if process > 0 else DEAD


def _explain_end(folder: Path, status: dict[str, Any]) -> str:
    """Why a job ended that wrote no reason itself and of which Slurm tells none."""
    if status["state"] != "queued" or status.get("starts"):
        return "exited without a status (node failure or out of memory?)"
    outputs = (folder / "slurm").glob(f"{status['job']}_*log.out")
    printed = [path.read_text(errors="replace").strip() for path in outputs]
    last_line = next((text.rpartition("\n")[2].strip()[:200] for text in printed if text), "")
    return f"ended before it started: {last_line or 'do the nodes share this file system?'} (see {folder / 'slurm'})"
