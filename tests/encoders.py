"""Audio encoders for tests: the small ones, in training without dropout, or of a known class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from atr_scale.encoders import AUDIO_ENCODERS, AudioEncoder, build_audio_encoder

Kind = TypeVar("Kind", bound=AudioEncoder)
LIGHT = ["mn04", "small_cnn", *(name for name in AUDIO_ENCODERS if name.startswith("tiny_"))]


def built(kind: type[Kind], name: str, checkpoint: Path | None = None, **options: Any) -> Kind:
    """`build_audio_encoder`, whose result is known to be a `kind`."""
    encoder = build_audio_encoder(name, checkpoint, **options)
    assert isinstance(encoder, kind)
    return encoder


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def training(name: str, **options: Any) -> AudioEncoder:
    """In training mode, but without dropout: what is left to draw are the options' augmentations."""
    encoder = build_audio_encoder(name, **options).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return encoder
