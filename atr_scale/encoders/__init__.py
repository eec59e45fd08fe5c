"""Audio and text encoders, all returning a TokenSequence.

A new audio encoder is one file, one line in AUDIO_ENCODERS and one golden test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from atr_scale.config import AudioEncoderOptions
from atr_scale.encoders.atst import ATSTFrame
from atr_scale.encoders.audio import AudioEncoder
from atr_scale.encoders.checkpoints import load_strictly
from atr_scale.encoders.clap import CLAP
from atr_scale.encoders.htsat import HTSAT
from atr_scale.encoders.mobilenet import MobileNet
from atr_scale.encoders.options import check_options
from atr_scale.encoders.panns import Cnn14, ResNet38
from atr_scale.encoders.passt import PaSST
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
    "cnn14": Cnn14,
    "resnet38": ResNet38,
    "htsat": HTSAT,
    "clap": CLAP,
    "clap_base": partial(CLAP, embed_dim=128, depths=(2, 2, 12, 2)),
    "passt_s16": partial(PaSST, stride=16),
    "passt_s10": partial(PaSST, stride=10),
    "atst_frame": ATSTFrame,
    "mn04": partial(MobileNet, width=0.4),
    "mn10": partial(MobileNet, width=1.0),
    "mn40": partial(MobileNet, width=4.0),
    "small_cnn": SmallCNN,
    "tiny_cnn14": partial(Cnn14, channels=(8, 16, 24, 32, 48, 64)),
    "tiny_resnet38": partial(ResNet38, channels=(8, 16, 24, 32, 64)),
    "tiny_htsat": partial(HTSAT, embed_dim=16, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8)),
    "tiny_clap": partial(CLAP, embed_dim=16, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8)),
    "tiny_passt": partial(PaSST, stride=16, dim=64, depth=2, heads=2),
    "tiny_atst": partial(ATSTFrame, dim=64, depth=2, heads=2),
}


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
