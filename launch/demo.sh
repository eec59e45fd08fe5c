# shellcheck shell=bash
# Shared functions of the scripts that train on the demo corpora. They source this file from the folder that holds launch/.
set -euo pipefail

# step NAME COMMAND ...: run a command under a headline, and print its time.
step() {
    local began=$SECONDS
    echo "== $1"
    "${@:2}"
    echo "== $1: $((SECONDS - began)) s"
}

# build_shards "CORPUS SPLIT" ...
build_shards() {
    local corpus split pair
    for pair in "$@"; do
        read -r corpus split <<<"$pair"
        atr-scale shards build "$corpus" --root "demo/corpora/$corpus" --split "$split" --sample-rate 16000 \
            --out "demo/shards/$corpus/${split/development/train}"
    done
}

# train CONFIG [key.sub=value ...]: one process for each GPU, two on a machine without GPUs.
train() {
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus == 0)); then
        # The processes share the cores: with more threads than cores they would wait for each other.
        local threads=$(($(nproc) / 2))
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
        export DS_ACCELERATOR=cpu # accelerate imports DeepSpeed, which would warn that there is no GPU
        accelerate launch --config_file launch/accelerate/cpu.yaml -m atr_scale.train "$@"
        return
    fi
    while ((64 % gpus)); do gpus=$((gpus - 1)); done # the global batch of 64 must divide among the processes
    accelerate launch --config_file launch/accelerate/one_node.yaml --num_processes "$gpus" -m atr_scale.train "$@"
}
