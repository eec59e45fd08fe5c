#!/usr/bin/env bash
# From nothing to a trained, evaluated retriever: environment -> demo corpora -> shards -> training -> evaluation.
#   launch/quickstart.sh [key.sub=value ...]     for example: launch/quickstart.sh train.epochs=2 run.dir=runs/short
# Two processes on a machine without GPUs, one for each GPU elsewhere. What is there from an earlier call is used again;
# an interrupted training goes on where it was saved.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

run=runs/quickstart
for override in "$@"; do
    [[ $override != run.dir=* ]] || run=${override#run.dir=}
done

step() {
    local began=$SECONDS
    echo "== $1"
    "${@:2}"
    echo "== $1: $((SECONDS - began)) s"
}

build_shards() {
    local corpus split
    while read -r corpus split; do
        atr-scale shards build "$corpus" --root "demo/corpora/$corpus" --split "$split" --sample-rate 16000 \
            --out "demo/shards/$corpus/${split/development/train}"
    done <<<$'audiocaps train\naudiocaps val\naudiocaps test\nclotho development\nwavcaps train'
}

train() {
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus == 0)); then
        # The processes share the cores; more threads than cores would make them wait for each other.
        local threads=$(($(nproc) / 2))
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
        export DS_ACCELERATOR=cpu # accelerate looks DeepSpeed up, which would warn that there is no GPU
        accelerate launch --config_file launch/accelerate/cpu.yaml \
            -m atr_scale.train configs/quickstart/pretrain.yaml "$@"
        return
    fi
    while ((64 % gpus)); do gpus=$((gpus - 1)); done # the global batch of 64 divides among the processes
    accelerate launch --config_file launch/accelerate/one_node.yaml --num_processes "$gpus" \
        -m atr_scale.train configs/quickstart/pretrain.yaml "$@"
}

step "environment" launch/environment.sh
export PATH="$root/.venv/bin:$PATH"
step "demo corpora" atr-scale demo-data --out demo/corpora
step "shards" build_shards
step "training" train "$@"
step "evaluation" atr-scale evaluate "$run" --split test
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
Report:       $run/report.md
TensorBoard:  .venv/bin/tensorboard --logdir $run --host 127.0.0.1
END
