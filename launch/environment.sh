#!/usr/bin/env bash
# Makes .venv in the repository's root, with this project and the package versions of launch/constraints.txt, and of
# launch/cuda.txt where pip's index gives torch's CUDA build.
#   launch/environment.sh          for training
#   launch/environment.sh search   for training and for search (an extra of pyproject.toml)
#   launch/environment.sh export   for training and for ONNX and sentence-transformers
#   launch/environment.sh dev      for training and the tests
# Later calls return at once, until pyproject.toml or the constraints change. pip's own settings apply, for example
# PIP_EXTRA_INDEX_URL for an index that has torch's CPU build. PYTHON names the interpreter to use.
# A folder that `atr-scale init` made has no environment of its own: the one that atr-scale is installed in must be active.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
extra=${1:-}

fail() {
    echo "error: $*" >&2
    exit 2
}

if [[ ! -d atr_scale ]]; then # a folder that `atr-scale init` made
    python -c 'import atr_scale' 2>/dev/null ||
        fail "no atr-scale in the active environment: activate the one that it is installed in"
    exit
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on the PATH: install one, or set PYTHON to its path"
}

exec 9<pyproject.toml
flock 9 # two scripts started together install once

stamp=.venv/installed
wanted=$(cat pyproject.toml launch/constraints.txt launch/cuda.txt | sha256sum | cut -c 1-64)
# An environment holds its own path: in a copied or moved repository it is made anew.
if ! grep -qsF "$root/.venv" .venv/bin/activate; then
    # venv empties the folder that a link leads to, perhaps the environment of another checkout, and then refuses the link.
    [[ ! -L .venv ]] ||
        fail "$root/.venv is a link to $(readlink .venv), which is no environment of this repository: remove the link"
    python=$(find_python)
    "$python" -c 'import ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments: install its venv package, for example python3-venv"
    echo "making $root/.venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
if ! grep -qsx "$wanted${extra:+ $extra}" "$stamp"; then
    echo "installing the tested versions (launch/constraints.txt, launch/cuda.txt)"
    rm -f "$stamp"
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
        -c launch/constraints.txt -c launch/cuda.txt -e ".${extra:+[$extra]}"
    # An environment with an extra also serves calls without it.
    printf '%s\n' "$wanted" ${extra:+"$wanted $extra"} >"$stamp"
fi
