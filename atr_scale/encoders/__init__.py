"""Audio and text encoders. Each returns a TokenSequence.

A new audio encoder needs one file, one line in audio_encoders.py and one golden test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from atr_scale.batch import TokenSequence
from atr_scale.encoders.audio import AudioEncoder
from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS, audio_encoder_options, construct
from atr_scale.encoders.pretrained.load import load_strictly
from atr_scale.encoders.pretrained.weights import checkpoint_path
from atr_scale.encoders.text import TextEncoder
from atr_scale.encoders.text_encoders import TEXT_ENCODERS, build_text_encoder, load_text_encoder
from atr_scale.errors import UserError
from atr_scale.sections import check_options

__all__ = [
    "AUDIO_ENCODERS",
    "TEXT_ENCODERS",
    "AudioEncoder",
    "TextEncoder",
    "TokenSequence",
    "build_audio_encoder",
    "build_text_encoder",
    "load_text_encoder",
]


def build_audio_encoder(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    equal_rounds: Callable[[int], int] | None = None,
    **options: Any,
) -> AudioEncoder:
    """Build the audio encoder `name` in evaluation mode.

    checkpoint: the file of the original project, or its name in the weights table. Without it the weights are random.
    equal_rounds: see `encode_in_buckets`.
    options: fields of AudioEncoderOptions and of the encoder's own `Options`.
    Raises UserError if the name or an option is unknown, if this encoder does not support an option, or if the file is
    not a checkpoint of this encoder.
    """
    if name not in AUDIO_ENCODERS:
        raise UserError(f"unknown audio encoder '{name}'; choose one of {', '.join(AUDIO_ENCODERS)}")
    path = None if checkpoint is None else checkpoint_path(checkpoint)
    chosen = check_options(audio_encoder_options(name), options, f"the audio encoder {name}")
    encoder = construct(name, chosen)
    encoder.equal_rounds = equal_rounds
    if path is not None:
        load_strictly(encoder, encoder.layouts, name, path)
    encoder.configure(chosen, name)
    return encoder.eval()
