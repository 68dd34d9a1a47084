#!/usr/bin/env bash
#SBATCH --job-name=augsub-table
#SBATCH --time=01:00:00
#SBATCH --ntasks=1
#SBATCH --output=augsub-table-%j.txt
# Submits every row of the paper's tables, one job a stage; with --mini, small ones on the embedded digits.
#     sbatch scripts/reproduce_table.sh --data-path /data/imagenet --mae-weights /data/mae --partition gpu
# or the same with bash, on a login node. --help lists the flags.
set -euo pipefail
script=$0
if [[ -n ${SLURM_JOB_ID:-} && ! -f $(dirname "$script")/reproduce.py ]]; then  # Slurm runs a copy of this file
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*reproduce_table\.sh\).*/\1/p')
fi
root=$(cd "$(dirname "$script")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3
exec "$python" "$root/scripts/reproduce.py" "$@"
