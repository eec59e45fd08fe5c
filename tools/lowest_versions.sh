#!/usr/bin/env bash
# Runs the quick tier in an environment of the lowest versions that pyproject.toml allows.
#   tools/lowest_versions.sh [FOLDER] [pytest arguments]     FOLDER is .venv-lowest if none is named
# By hand, before a bound in pyproject.toml changes: the index's builds of torch may be CUDA builds of several GB. pip's
# own settings apply (PIP_EXTRA_INDEX_URL for an index that has CPU builds). PYTHON names the interpreter to use.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=$root/.venv-lowest
if (($#)) && [[ $1 != -* ]]; then
    environment=$(realpath -m "$1")
    shift
fi
cd "$root"

# One line a dependency: its lower bound as the exact version, without extras, which pip's constraints may not have.
pins() {
    "$environment/bin/python" - <<'PYTHON'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
    name, version = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
PYTHON
}

[[ -x $environment/bin/python ]] || "${PYTHON:-python3}" -m venv "$environment"
pins >"$environment/constraints.txt"
"$environment/bin/python" -m pip install -q --disable-pip-version-check -c "$environment/constraints.txt" -e ".[dev]"
"$environment/bin/python" --version
# The versions that were resolved, of everything that pyproject.toml names.
"$environment/bin/python" -m pip freeze --disable-pip-version-check |
    grep -iE "^($(cut -d= -f1 "$environment/constraints.txt" | paste -sd '|'))=="
export PATH="$environment/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start several processes of their own
exec "$environment/bin/python" -m pytest -q -m "not slow" "$@"
