#!/usr/bin/env bash
# Trains on several machines without a scheduler. Start the same command on every machine, within ten minutes:
#   launch/cloud.sh MACHINES FIRST_MACHINE CONFIG.yaml [key.sub=value ...]
#     MACHINES        number of machines
#     FIRST_MACHINE   address of one of them that all others reach on port 29500 (or MASTER_PORT)
#   for example: launch/cloud.sh 4 10.0.0.11 configs/pretrain_wavcaps.yaml data.train[0].shards=s3://bucket/audiocaps/train
# One process for each GPU (PROCESSES sets another number; 1 without GPUs). The run folder must be a folder that all
# machines share, or at least the same path on each. If a machine fails, the others wait for it, and all start again from
# the last checkpoint, up to MAX_RESTARTS (3) times. On TERM or USR1 this script saves a checkpoint and ends; the same
# command continues from there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if (($# < 3)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: launch/cloud.sh MACHINES FIRST_MACHINE CONFIG.yaml [key.sub=value ...]" >&2
    exit 2
fi
machines=$1 first=$2
shift 2
cd "$root"
launch/environment.sh
export PATH="$root/.venv/bin:$PATH"
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 # by default USR1 kills torchrun, and its workers stay behind
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

processes=${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# With these short timeouts a lost machine is noticed within seconds, not minutes.
exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${MASTER_PORT:-29500}" --rdzv-id atr-scale \
    --rdzv-conf join_timeout=600,last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=5,read_timeout=60 \
    -m atr_scale.train "$@"
