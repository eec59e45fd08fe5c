"""Which encoder a checkpoint belongs to, by the names and shapes in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atr_scale.encoders.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from atr_scale.encoders.audio import AudioEncoder


def identify(path: str | Path) -> list[str]:
    """Names of the encoders that load the checkpoint at `path`. Raises UserError where it is no checkpoint at all."""
    return fitting_encoders(read_checkpoint(path))


def fitting_encoders(contents: dict[str, Any]) -> list[str]:
    """Names of the encoders that load these contents of a checkpoint; values are not looked at."""
    from atr_scale.encoders import AUDIO_ENCODERS

    return [name for name in AUDIO_ENCODERS if _fits(_blueprint(name), contents)]


@cache
def _blueprint(name: str) -> AudioEncoder:
    """The encoder without the memory of its weights."""
    from atr_scale.encoders import AUDIO_ENCODERS

    with torch.device("meta"):
        return AUDIO_ENCODERS[name]()


def _fits(encoder: AudioEncoder, contents: dict[str, Any]) -> bool:
    entries = ((layout, layout.entries(contents)) for layout in encoder.layouts if layout.refusal is None)
    return any(found is not None and not layout.misfit(encoder, found) for layout, found in entries)
