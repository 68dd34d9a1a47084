r"""Run a recipe on a Slurm cluster, or without Slurm on this machine.

    python scripts/submit.py deit --nodes 8 --gpus-per-node 8 --partition gpu --time 72:00:00 -- \
        --variant large_400 --augsub masking --data-path /data/imagenet --output-dir output/large_400

What follows `--` is the entry point's own. A job that its time limit or a preemption ends is saved, put back into the
queue and goes on; a second call submits nothing while the first one's job is queued or running, or when it is done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

from common.args import create_parser, parse  # noqa: E402
from common.flag_types import file_path  # noqa: E402
from common.parser import Parser, normalize_flag  # noqa: E402
from common.streams import protect_output  # noqa: E402
from scripts.cli_errors import cli_errors  # noqa: E402
from scripts.launch.registry import ENTRY_POINTS, RECIPES  # noqa: E402
from scripts.launch.slurm import Cluster, add_cluster_flags, query_queue  # noqa: E402
from scripts.launch.status import IN_PROGRESS, find_state  # noqa: E402
from scripts.launch.submission import lock_submissions, run_here, submit_job  # noqa: E402


def main() -> None:
    """Submit one run, or run it here."""
    argv = sys.argv[1:]
    separator = argv.index("--") if "--" in argv else len(argv)
    protect_output()
    parser = Parser(description=__doc__, prog="submit.py", raw_description=True)
    parser.add_argument("recipe", choices=ENTRY_POINTS)
    add_cluster_flags(parser)
    known, unknown = parser.parse_known_args(argv[:separator])
    flag = normalize_flag(unknown[0].partition("=")[0]) if unknown else ""
    if flag in create_parser(RECIPES[known.recipe])._option_string_actions:
        parser.error(f"{flag}: a flag of {ENTRY_POINTS[known.recipe]}; write it after --")
    args = parser.parse_args(argv[:separator])
    flags = argv[separator + 1 :]
    with cli_errors(parser):
        folder = output_folder(flags)
        parse(RECIPES[args.recipe], flags)
        cluster = Cluster.from_args(args, args.nodes or 1, args.gpus_per_node or 1)
        with lock_submissions(folder):
            state, _ = find_state(folder, query_queue() if cluster.slurm else {})
            if state in (*IN_PROGRESS, "done"):
                print(f"{folder}: {state}, so nothing is submitted")
                return
            job = submit_job(ENTRY_POINTS[args.recipe], flags, folder, cluster, f"augsub-{args.recipe}")
            print(f"{folder}: {f'submitted as job {job}' if job else 'runs here'}", flush=True)
        sys.exit(0 if cluster.slurm else run_here(folder, cluster.gpus))


def output_folder(flags: Sequence[str]) -> Path:
    """Output folder in an entry point's flags; of several, the last one, as in the run."""
    value = ""
    for position, word in enumerate(flags):
        flag, equals, text = word.partition("=")
        if normalize_flag(flag) in ("--output-dir", "--output"):
            value = text if equals else "".join(flags[position + 1 : position + 2])
    if not value:
        raise ValueError("--output-dir is missing after --; a second call finds the run by this folder")
    return Path(file_path(value)).absolute()


if __name__ == "__main__":
    main()
