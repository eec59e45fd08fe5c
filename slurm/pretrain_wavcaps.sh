#!/usr/bin/env bash
# Pretrains on AudioCaps, Clotho and WavCaps:
#   launch/environment.sh                                     once, in a folder that all nodes share
#   atr-scale fetch-weights mn40                              once, on a machine with a network
#   sbatch slurm/pretrain_wavcaps.sh                          configs/pretrain_wavcaps.yaml
#   sbatch --nodes 4 slurm/pretrain_wavcaps.sh train.lr=2e-5 run.dir=runs/lower_lr
# or any other recipe, for example a member of the paper's first stage (passt, atst or mn; 64 pairs in all, one node):
#   CONFIG=configs/papers/estimated_correspondences/stage1_passt.yaml sbatch --nodes 1 slurm/pretrain_wavcaps.sh
# One task for each GPU. Options of sbatch override those below, for example --gpus-per-node 4 --ntasks-per-node 4. Five
# minutes before the time limit, or whenever USR1 arrives, the job saves and requeues itself; the run then continues.
#SBATCH --job-name=pretrain_wavcaps
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
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
train "${CONFIG:-configs/pretrain_wavcaps.yaml}" "$@"
