"""A small network of this project, for runs on a CPU and for tests. Its group norms do not depend on other clips.

Shape suffixes: B batch, S samples, C channels, M mel bands, F frames, T tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders.audio import AudioEncoder
from atr_scale.encoders.front_ends import LogMel, MelSettings
from atr_scale.encoders.windows import regular_centres

SAMPLE_RATE = 16_000
NUM_MELS = 64
GROUPS = 8


def halve(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution that halves frequency and time, rounded up."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.GroupNorm(GROUPS, outputs), nn.GELU()
    )


class SmallCNN(AudioEncoder):
    """Patches of four by four on the log-mel, two convolutions that halve it, then two convolutions over time.

    One token per 0.32 s (16 mel frames of 20 ms); its receptive field is about 2 s. pooled: the sum of the mean and the
    maximum of the tokens. The patches are not normalised, so that loudness survives the group norms that follow. The
    frequency axis is joined with the channels rather than averaged, so that pitch survives.
    """

    sample_rate = SAMPLE_RATE
    reads_int16 = True
    dim = 256

    def __init__(self) -> None:
        super().__init__()
        self.front_end = LogMel(
            MelSettings(
                sample_rate=SAMPLE_RATE,
                n_fft=512,
                window_length=512,
                hop=320,
                num_mels=NUM_MELS,
                fmin=50.0,
                fmax=8_000.0,
            ),
            floor=1e-5,
            shift=4.0,
            scale=5.0,
        )
        self.patches = nn.Sequential(nn.Conv2d(1, 48, 4, stride=4), nn.GELU())
        self.halvings = nn.Sequential(halve(48, 96), halve(96, 160))
        self.frames = nn.Conv1d(160 * NUM_MELS // 16, self.dim, 1)
        self.context = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(GROUPS, self.dim), nn.GELU(), nn.Conv1d(self.dim, self.dim, 3, padding=1, bias=False)
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(self.dim)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        mel_BMF = self.spec_augment(self.mel(waveform_BS, augment_seed), waveform_BS, augment_seed).to(
            self.frames.weight.dtype
        )
        mel_BMF = nn.functional.pad(mel_BMF, (0, -mel_BMF.shape[2] % 4))
        map_BCMT = self.run(self.halvings, self.run(self.patches, mel_BMF.unsqueeze(1)))
        x_BCT = self.frames(map_BCMT.flatten(1, 2))
        for layer in self.context:
            x_BCT = x_BCT + self.run(layer, x_BCT)
        tokens_BTC = self.norm(x_BCT.transpose(1, 2))
        return TokenSequence.unpadded(tokens_BTC, tokens_BTC.mean(1) + tokens_BTC.amax(1))

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        # A convolution that halves has its centre on the first of two; a patch, on the middle of its four frames.
        hop = self.front_end.settings.hop
        num_frames = 1 + samples // hop
        return regular_centres(math.ceil(num_frames / 16), 1.5 * hop, 16 * hop)

    @property
    def layers(self) -> list[tuple[str, ...]]:
        return [("patches.",), ("halvings.",), ("frames.",), ("context.", "norm.")]
