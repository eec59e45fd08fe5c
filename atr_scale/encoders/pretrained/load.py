"""Loading an original checkpoint into its encoder, and finding out whose a checkpoint is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from atr_scale.encoders.audio import AudioEncoder
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS, audio_encoder_options, construct
from atr_scale.encoders.pretrained.layout import Layout, Loaded
from atr_scale.encoders.pretrained.read import read_checkpoint
from atr_scale.errors import UserError


def load_strictly(module: nn.Module, layouts: tuple[Layout, ...], name: str, path: str | Path) -> Loaded:
    """Copies the checkpoint at `path` into `module`; `name` is the encoder's, for messages.

    Raises UserError naming the first missing, unexpected, misshapen or non-finite entry as the file calls it; `module`
    is then as it was.
    """
    contents = read_checkpoint(path)
    fitting = [(layout, entries) for layout in layouts if (entries := layout.entries(contents)) is not None]
    if not fitting:
        places = " or ".join(
            f"'{layout.prefix}*' under '{layout.container or 'its top'}'" for layout in layouts if not layout.refusal
        )
        raise UserError(
            f"{path} does not hold the named tensors of {name} (entries {places}): {_remedy(contents, name)}"
        )
    if refusal := next((layout.refusal for layout, _ in fitting if layout.refusal), None):
        raise UserError(f"{path} {refusal}")
    misfits = [(layout.misfit(module, entries), layout, entries) for layout, entries in fitting]
    misfit, layout, entries = min(misfits, key=lambda found: len(found[0]))
    if misfit:
        raise UserError(f"{path} {misfit}: it is no checkpoint of {name}; {_remedy(contents, name)}")
    if key := layout.damaged(module, entries):
        raise UserError(f"{path} has non-finite values in '{key}': it is damaged, fetch it again")
    layout.load(module, entries)
    derived, unused = layout.ignored(entries)
    return Loaded(layout, len({key for _, key, _ in layout.sources(module, entries)}), len(derived), len(unused))


def identify(path: str | Path) -> list[str]:
    """Names of the encoders that load the checkpoint at `path`. Raises UserError if it is no checkpoint at all."""
    return fitting_encoders(read_checkpoint(path))


def fitting_encoders(contents: dict[str, Any]) -> list[str]:
    """Names of the encoders that load these contents of a checkpoint; values are not looked at."""
    return [name for name in AUDIO_ENCODERS if _fits(_blueprint(name), contents)]


@cache
def _blueprint(name: str) -> AudioEncoder | None:
    """The encoder without the memory of its weights; None if it needs to be told options of its own."""
    try:
        options = audio_encoder_options(name)()
    except ValidationError:
        return None
    with torch.device("meta"):
        return construct(name, options)


def _fits(encoder: AudioEncoder | None, contents: dict[str, Any]) -> bool:
    if encoder is None:
        return False
    entries = ((layout, layout.entries(contents)) for layout in encoder.layouts if layout.refusal is None)
    return any(found is not None and not layout.misfit(encoder, found) for layout, found in entries)


def _remedy(contents: dict[str, Any], name: str) -> str:
    others = fitting_encoders(contents)
    return f"it is one of {' or '.join(others)}, choose that encoder" if others else "give its original file"
