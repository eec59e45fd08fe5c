#!/usr/bin/env bash
# Evaluates a trained model on all GPUs of a job, for example after the job that trains it has succeeded:
#   sbatch slurm/evaluate.sh                                  runs/pretrain_wavcaps on its test split
#   sbatch slurm/evaluate.sh runs/one --split validation
#   one=$(sbatch --parsable slurm/pretrain_wavcaps.sh)
#   sbatch --dependency=afterok:$one slurm/evaluate.sh runs/pretrain_wavcaps
# Arguments are those of `atr-scale evaluate`. Options of sbatch override those below. A job that SLURM interrupts starts anew.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" # SLURM runs a copy of this file from elsewhere
if [[ ! -e slurm/prologue.sh ]]; then
    echo "error: no slurm/prologue.sh in $PWD: submit from the folder that holds slurm/" >&2
    exit 2
fi
# shellcheck source=slurm/prologue.sh
source slurm/prologue.sh
(($#)) || set -- runs/pretrain_wavcaps
work evaluation python -m atr_scale.cli evaluate "$@"
