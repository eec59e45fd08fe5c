"""Audio and text encoders, all returning a TokenSequence.

A new audio encoder is one file, one line in AUDIO_ENCODERS and one golden test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atr_scale.config import AudioEncoderOptions
from atr_scale.encoders.audio import AudioEncoder
from atr_scale.encoders.checkpoints import load_strictly
from atr_scale.encoders.mobilenet import MobileNet
from atr_scale.encoders.small_cnn import SmallCNN
from atr_scale.encoders.text import TextEncoder, build_text_encoder
from atr_scale.errors import UserError
from atr_scale.sequence import TokenSequence

__all__ = [
    "AUDIO_ENCODERS",
    "AudioEncoder",
    "TextEncoder",
    "TokenSequence",
    "build_audio_encoder",
    "build_text_encoder",
]

AUDIO_ENCODERS: dict[str, Callable[[], AudioEncoder]] = {
    "mn04": partial(MobileNet, width=0.4),
    "mn10": partial(MobileNet, width=1.0),
    "mn40": partial(MobileNet, width=4.0),
    "small_cnn": SmallCNN,
}


def build_audio_encoder(name: str, checkpoint: str | Path | None = None, **options: Any) -> AudioEncoder:
    """The encoder called `name`, in evaluation mode.

    checkpoint: the original project's file; without one the weights are random. options: AudioEncoderOptions' fields.
    Raises UserError for an unknown name or option, for an option that this encoder does not have, and where the file is
    not a checkpoint of this encoder.
    """
    if name not in AUDIO_ENCODERS:
        raise UserError(f"unknown audio encoder '{name}'; choose one of {', '.join(AUDIO_ENCODERS)}")
    try:
        chosen = AudioEncoderOptions(**options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"options of the audio encoder {name}: {problems}") from None
    encoder = AUDIO_ENCODERS[name]()
    if checkpoint is not None:
        load_strictly(encoder, encoder.layouts, name, checkpoint)
    encoder.configure(chosen, name)
    return encoder.eval()
