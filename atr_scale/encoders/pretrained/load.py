"""Load an original checkpoint into its encoder, and find the encoders that a checkpoint fits."""

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
    """Copy the checkpoint at `path` into `module`. name: name of the encoder, for messages.

    Raises UserError that names the first missing, unexpected, misshapen or non-finite entry as the file names it. Then
    `module` is unchanged.
    """
    contents = read_checkpoint(path)
    fitting = [(layout, entries) for layout in layouts if (entries := layout.entries(contents)) is not None]
    if not fitting:
        places = " or ".join(
            f"'{layout.prefix}*' under '{layout.container or 'its top'}'" for layout in layouts if not layout.refusal
        )
        raise UserError(f"{path} does not hold the named tensors of {name} (entries {places}): {_remedy(contents)}")
    if refusal := next((layout.refusal for layout, _ in fitting if layout.refusal), None):
        raise UserError(f"{path} {refusal}")
    misfits = [(layout.misfit(module, entries), layout, entries) for layout, entries in fitting]
    misfit, layout, entries = min(misfits, key=lambda found: len(found[0]))
    if misfit:
        raise UserError(f"{path} {misfit}: it is no checkpoint of {name}; {_remedy(contents)}")
    if key := layout.damaged(module, entries):
        raise UserError(f"{path} has non-finite values in '{key}': it is damaged, fetch it again")
    layout.load(module, entries)
    derived, unused = layout.ignored(entries)
    return Loaded(layout, len({key for _, key, _ in layout.sources(module, entries)}), len(derived), len(unused))


def identify(path: str | Path) -> list[str]:
    """Names of the encoders that the checkpoint at `path` fits. Raises UserError if the file is not a checkpoint."""
    return fitting_encoders(read_checkpoint(path))


def fitting_encoders(contents: dict[str, Any]) -> list[str]:
    """Names of the encoders that these contents of a checkpoint fit. Values are not read."""
    return [name for name in AUDIO_ENCODERS if _fits(_blueprint(name), contents)]


@cache
def _blueprint(name: str) -> AudioEncoder | None:
    """The encoder on the meta device, which takes no memory. None if it has options without a default."""
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


def _remedy(contents: dict[str, Any]) -> str:
    others = fitting_encoders(contents)
    return f"it is one of {' or '.join(others)}, choose that encoder" if others else "give its original file"
