#!/usr/bin/env bash
# Sets up the environment and runs the tests, in two processes.
#   launch/test.sh [pytest arguments]          the quick tier
#   launch/test.sh --all [pytest arguments]    everything, for example: launch/test.sh --all --real-data=DIR
#   launch/test.sh -n 0 [pytest arguments]     in one process, for example with a debugger
# Tests that need more than the environment (SLURM, chromium, shellcheck, rclone, real recordings) are skipped with a reason.
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
# Pytest, before it reads tests/conftest.py, would take DIR in `--real-data DIR` for a folder of tests: join the two.
arguments=()
while (($#)); do
    if [[ $1 == --real-data && $# -gt 1 ]]; then
        arguments+=("--real-data=$2")
        shift
    else
        arguments+=("$1")
    fi
    shift
done
# Files in the order of collection: those with several processes, which take longest, come first.
exec python -m pytest -n 2 --dist loadscope --no-loadscope-reorder "${tier[@]}" "${arguments[@]}"
