"""The front end of PANNs, HTS-AT and LAION-CLAP: Slaney's mel bank and decibels, as torchlibrosa computes them.

Source: `Spectrogram` and `LogmelFilterBank` of qiuqiangkong/torchlibrosa with ref 1 and no top_db.

Shape suffixes: B batch, M mel bands, F frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atr_scale.frontends.spectrogram import FrontEnd


class DecibelMel(FrontEnd):
    """10 log10(max(mel power, floor)), [B, num_mels, 1 + S // hop]; normalised by the encoder's first batch norm."""

    def __init__(self, *, floor: float = 1e-10, **spectrogram: Any) -> None:
        super().__init__(mel_scale="slaney", **spectrogram)
        self.floor = floor

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return 10 * mel_BMF.clamp(min=self.floor).log10()
