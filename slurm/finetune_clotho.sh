#!/usr/bin/env bash
# Fine-tunes on Clotho with the teacher tables that slurm/estimate_correspondences.sh has written. The comment at the top
# of that script shows how to chain the jobs of both stages.
#   sbatch slurm/finetune_clotho.sh                           configs/finetune_clotho.yaml
#   sbatch slurm/finetune_clotho.sh train.lr=1e-5 run.dir=runs/lower_lr
#   CONFIG=configs/finetune_audiocaps.yaml sbatch slurm/finetune_clotho.sh
#   CONFIG=configs/papers/estimated_correspondences/stage2_passt.yaml sbatch slurm/finetune_clotho.sh
# One task for each GPU. Options of sbatch override those below, for example --gpus-per-node 4 --ntasks-per-node 4. Five
# minutes before the time limit, or whenever USR1 arrives, the job saves and requeues itself; the run then continues.
#SBATCH --job-name=finetune_clotho
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
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
train "${CONFIG:-configs/finetune_clotho.yaml}" "$@"
