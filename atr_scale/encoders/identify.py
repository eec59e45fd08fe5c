"""Which encoder a checkpoint belongs to, by the names and shapes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atr_scale.encoders.checkpoints import read_checkpoint


def identify(path: str | Path) -> list[str]:
    """Names of the encoders that load the checkpoint at `path`. Raises UserError where it is no checkpoint at all."""
    return fitting_encoders(read_checkpoint(path))


def fitting_encoders(contents: dict[str, Any]) -> list[str]:
    """Names of the encoders that load these contents of a checkpoint; values are not looked at."""
    from atr_scale.encoders import AUDIO_ENCODERS

    names = []
    for name, build in AUDIO_ENCODERS.items():
        with torch.device("meta"):
            encoder = build()
        for layout in encoder.layouts:
            entries = layout.entries(contents)
            if entries is not None and not layout.misfit(encoder, entries):
                names.append(name)
                break
    return names
