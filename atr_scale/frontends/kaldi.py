"""The front end of EfficientAT and PaSST: pre-emphasis, symmetric Hann window, Kaldi's mel bank, natural logarithm.

Source: `AugmentMelSTFT` of fschmid56/EfficientAT and kkoutini/PaSST as it runs in evaluation; the jitter of its band
limits in training is the `band` of a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atr_scale.frontends.log_mel import LogMel


class KaldiLogMel(LogMel):
    """`LogMel` of the pre-emphasised waveform y[n] = x[n + 1] - pre_emphasis * x[n].

    The filter has no value for the last sample, so S samples give 1 + (S - 1) // hop frames.
    """

    def __init__(self, *, pre_emphasis: float, **log_mel: Any) -> None:
        super().__init__(periodic_window=False, mel_scale="kaldi", **log_mel)
        self.pre_emphasis = pre_emphasis

    def prepare(self, waveform_BS: Tensor) -> Tensor:
        return torch.sub(waveform_BS[..., 1:], waveform_BS[..., :-1], alpha=self.pre_emphasis)
