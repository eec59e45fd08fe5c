"""The audio encoders by name. A new one needs one file, one line here and one golden test.

A plug-in adds its encoders to `AUDIO_ENCODERS` when its module is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from atr_scale.encoders.atst import ATSTFrame
from atr_scale.encoders.audio import SPECIAL_OPTIONS, AudioEncoder, AudioEncoderOptions
from atr_scale.encoders.clap import CLAP
from atr_scale.encoders.htsat import HTSAT
from atr_scale.encoders.mobilenet import MobileNet
from atr_scale.encoders.panns import Cnn14, ResNet38
from atr_scale.encoders.passt import PaSST
from atr_scale.encoders.small_cnn import SmallCNN
from atr_scale.sections import class_of, options_of, own_fields

AUDIO_ENCODERS: dict[str, Callable[..., AudioEncoder]] = {
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


def audio_encoder_options(name: str) -> type[AudioEncoderOptions]:
    """The section that checks the options of the encoder `name`; the common one for an unknown name."""
    return options_of(AUDIO_ENCODERS.get(name), AudioEncoderOptions)


def audio_encoder_keys(name: str) -> frozenset[str]:
    """The options that the encoder `name` has. An encoder that does not tell supports every common one."""
    supported = getattr(class_of(AUDIO_ENCODERS.get(name)), "special_options", SPECIAL_OPTIONS)
    return frozenset(audio_encoder_options(name).model_fields) - (SPECIAL_OPTIONS - supported)


def construct(name: str, options: AudioEncoderOptions) -> AudioEncoder:
    """Build the encoder with random weights from its own options. `configure` applies the common ones."""
    return AUDIO_ENCODERS[name](**own_fields(options, AudioEncoderOptions))
