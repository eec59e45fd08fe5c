#!/usr/bin/env bash
# Sets up the environment and runs the tests.
#   launch/test.sh [pytest arguments]          the quick tier
#   launch/test.sh --all [pytest arguments]    everything, for example: launch/test.sh --all --real-data DIR
# Tests that need more than the environment (SLURM, chromium, shellcheck, real recordings) are skipped with a reason.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

tier=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    tier=()
    shift
fi
launch/environment.sh dev
export PATH="$root/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start several processes of their own
exec python -m pytest "${tier[@]}" "$@"
