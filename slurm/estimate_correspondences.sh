#!/usr/bin/env bash
# Writes teacher tables for slurm/finetune_clotho.sh: scores of trained models on Clotho's training split. Also compares
# the models.
#   sbatch slurm/estimate_correspondences.sh                  runs/pretrain_wavcaps alone: self-distillation
#   sbatch slurm/estimate_correspondences.sh runs/one runs/other
#   sbatch slurm/estimate_correspondences.sh runs/one --shards shards/audiocaps/train --out correspondences/audiocaps
#   sbatch slurm/estimate_correspondences.sh runs/fold0 runs/fold1 --cross-fit
# Arguments are those of `atr-scale estimate` (docs/teachers.md). Both stages at once, each job after the previous one has succeeded:
#   one=$(sbatch --parsable slurm/pretrain_wavcaps.sh)
#   two=$(sbatch --parsable --dependency=afterok:$one slurm/estimate_correspondences.sh)
#   sbatch --dependency=afterok:$two slurm/finetune_clotho.sh
# For an ensemble, start one pretraining job for each teacher, and use --dependency=afterok:$one:$other. Finished tables
# are kept, so a job that SLURM puts back into the queue continues with the next model.
#SBATCH --job-name=estimate_correspondences
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
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
# --shards adds a set each time it is given, of --out the last one counts.
[[ " $* " == *" --shards"[\ =]* ]] || set -- --shards shards/clotho/train "$@"
work estimate python -m atr_scale.cli estimate --out correspondences/clotho "$@"
