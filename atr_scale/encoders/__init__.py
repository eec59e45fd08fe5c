"""Audio and text encoders, all returning a TokenSequence.

A new audio encoder is one file, one line in audio_encoders.py and one golden test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atr_scale.batch import TokenSequence
from atr_scale.encoders.audio import AudioEncoder, AudioEncoderOptions
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS
from atr_scale.encoders.pretrained.load import load_strictly
from atr_scale.encoders.text import TextEncoder, build_text_encoder
from atr_scale.errors import UserError
from atr_scale.sections import check_options

__all__ = [
    "AUDIO_ENCODERS",
    "AudioEncoder",
    "TextEncoder",
    "TokenSequence",
    "build_audio_encoder",
    "build_text_encoder",
]


def build_audio_encoder(name: str, checkpoint: str | Path | None = None, **options: Any) -> AudioEncoder:
    """The encoder called `name`, in evaluation mode.

    checkpoint: the original project's file; without one the weights are random. options: AudioEncoderOptions' fields.
    Raises UserError for an unknown name or option, for an option that this encoder does not have, and where the file is
    not a checkpoint of this encoder.
    """
    if name not in AUDIO_ENCODERS:
        raise UserError(f"unknown audio encoder '{name}'; choose one of {', '.join(AUDIO_ENCODERS)}")
    chosen = check_options(AudioEncoderOptions, options, f"the audio encoder {name}")
    encoder = AUDIO_ENCODERS[name]()
    if checkpoint is not None:
        load_strictly(encoder, encoder.layouts, name, checkpoint)
    encoder.configure(chosen, name)
    return encoder.eval()
