#!/usr/bin/env bash
# The two stages of estimated correspondences on the demo corpora:
#   three small models with different scorers are pretrained on all three corpora -> their scores of every caption and
#   clip of the Clotho-format corpus become teacher tables -> a model is fine-tuned on that corpus with the soft labels
#   of these tables, and once without. About 20 minutes on two cores.
#   launch/two_stage_demo.sh [key.sub=value ...]     the overrides go to the three first-stage trainings
# Results of an earlier call are used again, and an interrupted training continues from its last checkpoint.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/demo.sh
source launch/demo.sh

runs=runs/two_stage
members=("$runs/meanmax" "$runs/attention" "$runs/tap")

pretrain() {
    local seed=0 member
    for member in "${members[@]}"; do
        step "pretraining ${member##*/}" train configs/quickstart/pretrain.yaml train.epochs=2 "run.dir=$member" \
            "run.seed=$seed" "model.scorer.name=${member##*/}" "$@"
        seed=$((seed + 1))
    done
}

finetune() { # NAME [key.sub=value ...]
    train configs/quickstart/finetune.yaml "run.dir=$runs/$1" "${@:2}"
    atr-scale evaluate "$runs/$1" --split test --relevance demo/corpora/relevance/clotho-evaluation.npz
}

step "environment" launch/environment.sh
export PATH="$root/.venv/bin:$PATH"
step "demo corpora" atr-scale demo-data --out demo/corpora
step "shards" build_shards "audiocaps train" "audiocaps val" "audiocaps test" "wavcaps train" \
    "clotho development" "clotho validation" "clotho evaluation"
pretrain "$@"
step "estimating correspondences" atr-scale estimate "${members[@]}" --shards demo/shards/clotho/train \
    --out "$runs/correspondences"
step "fine-tuning on captions alone" finetune supervised \
    "objective.distillation={weight: 0, tables: []}"
step "fine-tuning on captions and estimated correspondences" finetune estimated
echo "== before fine-tuning"
atr-scale evaluate "$runs/meanmax" --shards demo/shards/clotho/evaluation --split clotho \
    --relevance demo/corpora/relevance/clotho-evaluation.npz
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
The ensemble:                $runs/correspondences/report.md
Fine-tuned on captions:      $runs/supervised/report.md
... and on correspondences:   $runs/estimated/report.md
END
