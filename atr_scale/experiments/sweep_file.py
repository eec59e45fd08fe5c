"""sweep.json of a sweep folder: grid, runs with their commands, SLURM jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atr_scale.errors import UserError

SWEEP = "sweep.json"


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of the folder's sweep.json; empty if there is none. Raises UserError if it is not readable."""
    path = folder / SWEEP
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it; the run folders beside it are kept") from None
