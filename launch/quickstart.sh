#!/usr/bin/env bash
# From nothing to a trained, evaluated retriever: environment -> demo corpora -> shards -> training -> evaluation.
#   launch/quickstart.sh [key.sub=value ...]     for example: launch/quickstart.sh train.epochs=2 run.dir=runs/short
# One process for each GPU, two on a machine without GPUs. Results of an earlier call are used again, and an interrupted
# training continues from its last checkpoint.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

run=runs/quickstart
for override in "$@"; do
    [[ $override != run.dir=* ]] || run=${override#run.dir=}
done

# shellcheck source=launch/demo.sh
source launch/demo.sh

step "environment" launch/environment.sh
export PATH="$root/.venv/bin:$PATH"
step "demo corpora" atr-scale demo-data --out demo/corpora
step "shards" build_shards "audiocaps train" "audiocaps val" "audiocaps test" "clotho development" "wavcaps train"
step "training" train configs/quickstart/pretrain.yaml "$@"
step "evaluation" atr-scale evaluate "$run" --split test
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
Report:       $run/report.md
TensorBoard:  $(command -v tensorboard) --logdir $run --host 127.0.0.1
END
