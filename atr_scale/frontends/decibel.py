"""The front end of PANNs, HTS-AT and LAION-CLAP: Slaney's mel bank and decibels, as torchlibrosa computes them.

Source: `Spectrogram` and `LogmelFilterBank` of qiuqiangkong/torchlibrosa with ref 1 and no top_db.

Shape suffixes: B batch, M mel bands, F frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from atr_scale.frontends.spectrogram import FrontEnd

# Of recordings' spectrograms in dB, digital silence left out.
TYPICAL_MEAN, TYPICAL_DEVIATION = -30.0, 25.0


class DecibelMel(FrontEnd):
    """10 log10(max(mel power, floor)), [B, num_mels, 1 + S // hop]; normalised by the encoder's first batch norm."""

    def __init__(self, *, floor: float = 1e-10, **spectrogram: Any) -> None:
        super().__init__(mel_scale="slaney", **spectrogram)
        self.floor = floor

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return 10 * mel_BMF.clamp(min=self.floor).log10()


class DecibelNorm(nn.BatchNorm2d):
    """Batch norm over mel bands, [B, M, F] -> [B, M, F].

    Without a checkpoint its statistics are typical ones: frozen batch norm, the default, would otherwise hand raw
    decibels to a network that expects unit variance.
    """

    def __init__(self, num_mels: int) -> None:
        super().__init__(num_mels)
        assert self.running_mean is not None and self.running_var is not None
        nn.init.constant_(self.running_mean, TYPICAL_MEAN)
        nn.init.constant_(self.running_var, TYPICAL_DEVIATION**2)

    def forward(self, decibels_BMF: Tensor) -> Tensor:
        return super().forward(decibels_BMF.unsqueeze(3)).squeeze(3)
