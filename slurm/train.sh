#!/usr/bin/env bash
# Trains any configuration:
#   sbatch slurm/train.sh configs/esc50.yaml
#   sbatch slurm/train.sh configs/esc50.yaml run.seed=1 run.dir=runs/esc50-1
#   sbatch --nodes 1-4 --gpus-per-node 4 --cpus-per-task 32 slurm/train.sh configs/esc50.yaml
#   one=$(sbatch --parsable slurm/train.sh configs/esc50.yaml)
#   sbatch --dependency=afterok:$one slurm/evaluate.sh runs/esc50 --split test
# A rank for each GPU; --cpus-per-task is the number of CPUs on each node, which its ranks share. Options of sbatch override
# those below. Five minutes before the time limit, or whenever USR1 arrives, the job saves and requeues itself; the run then
# continues. With --nodes 1-4 each start is on as many nodes as are free, also after a node was lost, which costs the steps
# since the last checkpoint: see train.checkpoint_every. Not with --ntasks-per-node: see docs/operations.md.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
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
[[ -n ${SWEEP:-} ]] || (($#)) || refuse "no configuration: sbatch slurm/train.sh CONFIG [key.sub=value ...]"
train "$@"
