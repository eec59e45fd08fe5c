"""Audio encoders of a known class, for tests that look inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from atr_scale.encoders import AudioEncoder, build_audio_encoder

Kind = TypeVar("Kind", bound=AudioEncoder)


def built(kind: type[Kind], name: str, checkpoint: Path | None = None, **options: Any) -> Kind:
    """`build_audio_encoder`, whose result is known to be a `kind`."""
    encoder = build_audio_encoder(name, checkpoint, **options)
    assert isinstance(encoder, kind)
    return encoder
