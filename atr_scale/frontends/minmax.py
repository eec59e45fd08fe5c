"""The front end of ATST-Frame: HTK's mel bank and decibels, scaled by the least and greatest of its training data.

Source: `melspec_t`, `to_db` and `normalize` in Audio-WestlakeU/audiossl, `methods/atstframe/embedding.py`.

Shape suffixes: B batch, M mel bands, F frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atr_scale.frontends.spectrogram import FrontEnd


class MinMaxMel(FrontEnd):
    """Decibels with `minimum` at -1 and `maximum` at 1, [B, num_mels, 1 + S // hop].

    What lies more than `dynamic_range` dB below the loudest value of its own clip is raised to that level.
    """

    def __init__(
        self, *, floor: float, dynamic_range: float, minimum: float, maximum: float, **spectrogram: Any
    ) -> None:
        super().__init__(mel_scale="htk", **spectrogram)
        self.floor, self.dynamic_range, self.minimum, self.maximum = floor, dynamic_range, minimum, maximum

    def compress(self, mel_BMF: Tensor) -> Tensor:
        decibels_BMF = 10 * mel_BMF.clamp(min=self.floor).log10()
        decibels_BMF = decibels_BMF.maximum(decibels_BMF.amax((1, 2), keepdim=True) - self.dynamic_range)
        return (decibels_BMF - self.minimum) / (self.maximum - self.minimum) * 2 - 1
