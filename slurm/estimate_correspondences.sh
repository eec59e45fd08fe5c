#!/usr/bin/env bash
# Writes what trained models say of Clotho's training split, the teachers of slurm/finetune_clotho.sh, and compares them:
#   sbatch slurm/estimate_correspondences.sh                  runs/pretrain_wavcaps alone: self-distillation
#   sbatch slurm/estimate_correspondences.sh runs/one runs/other
#   sbatch slurm/estimate_correspondences.sh runs/one --shards shards/audiocaps/train --out correspondences/audiocaps
# Arguments are those of `atr-scale estimate`. Both stages in one go, each job when the one before it has succeeded:
#   one=$(sbatch --parsable slurm/pretrain_wavcaps.sh)
#   two=$(sbatch --parsable --dependency=afterok:$one slurm/estimate_correspondences.sh)
#   sbatch --dependency=afterok:$two slurm/finetune_clotho.sh
# For an ensemble, one pretraining job a member and --dependency=afterok:$one:$other. Tables that are written are kept, so
# a job that SLURM puts back into the queue goes on with the next model.
#SBATCH --job-name=estimate_correspondences
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: this is a job script: sbatch $0 [RUN ...] [--shards DIR --out DIR]" >&2
    exit 2
fi
# SLURM runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:?}"
if [[ ! -e slurm/prologue.sh ]]; then
    echo "error: $PWD is not the repository's root: submit from there" >&2
    exit 2
fi
# shellcheck source=slurm/prologue.sh
source slurm/prologue.sh
(($#)) || set -- runs/pretrain_wavcaps
# Of an option given twice, the last counts.
exec srun --kill-on-bad-exit=1 python -m atr_scale.cli estimate \
    --shards shards/clotho/train --out correspondences/clotho "$@"
