"""EfficientAT's MobileNetV3-large over log-mel spectrograms, scaled in width.

Source: fschmid56/EfficientAT, `models/mn` (Schmid, Koutini, Widmer, ICASSP 2023, arXiv 2211.04772); module names follow
the keys of its checkpoints. Layer table: Howard et al., "Searching for MobileNetV3", ICCV 2019, table 1.

Shape suffixes: B batch, S samples, C channels, M mel bands, F frames, T tokens, L classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders.audio import AUDIOSET_CLASSES, AudioEncoder, as_image, initialise_convolutions
from atr_scale.encoders.front_ends import AUGMENT_MEL_STFT, KaldiLogMel
from atr_scale.encoders.windows import regular_centres

# kernel, expanded channels, output channels, squeeze-excitation, activation, stride
BLOCKS: tuple[tuple[int, int, int, bool, type[nn.Module], int], ...] = (
    (3, 16, 16, False, nn.ReLU, 1),
    (3, 64, 24, False, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 1),
    (5, 72, 40, True, nn.ReLU, 2),
    (5, 120, 40, True, nn.ReLU, 1),
    (5, 120, 40, True, nn.ReLU, 1),
    (3, 240, 80, False, nn.Hardswish, 2),
    (3, 200, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 480, 112, True, nn.Hardswish, 1),
    (3, 672, 112, True, nn.Hardswish, 1),
    (5, 672, 160, True, nn.Hardswish, 2),
    (5, 960, 160, True, nn.Hardswish, 1),
    (5, 960, 160, True, nn.Hardswish, 1),
)


def round_to_eight(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, but at most a tenth below it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv_norm(
    inputs: int, outputs: int, kernel: int, activation: type[nn.Module] | None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class ChannelGate(nn.Module):
    """Scales each channel by a gate that is computed from the means over frequency and time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = round_to_eight(channels // 4)
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x_BCMF: Tensor) -> Tensor:
        gate_BC = torch.sigmoid(self.fc2(torch.relu(self.fc1(x_BCMF.mean((2, 3))))))
        return x_BCMF * gate_BC[:, :, None, None]


class SqueezeExcitation(nn.Module):
    """A list with one gate. The original can gate several axes; its checkpoints gate the channels only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([ChannelGate(channels)])

    def forward(self, x_BCMF: Tensor) -> Tensor:
        gated_BCMF: Tensor = self.conc_se_layers[0](x_BCMF)
        return gated_BCMF


class InvertedResidual(nn.Module):
    """Expand, filter each channel, gate, project. The input is added if the shapes agree."""

    def __init__(
        self,
        inputs: int,
        expanded: int,
        outputs: int,
        kernel: int,
        gated: bool,
        activation: type[nn.Module],
        stride: int,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(conv_norm(inputs, expanded, 1, activation))
        layers.append(conv_norm(expanded, expanded, kernel, activation, stride, groups=expanded))
        if gated:
            layers.append(SqueezeExcitation(expanded))
        layers.append(conv_norm(expanded, outputs, 1, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x_BCMF: Tensor) -> Tensor:
        y_BCMF: Tensor = self.block(x_BCMF)
        return x_BCMF + y_BCMF if self.residual else y_BCMF


class MobileNet(AudioEncoder):
    """Encodes clips of any length in one pass. F mel frames of 10 ms give ceil(F / 32) tokens, one per 0.32 s.

    tokens: the last map averaged over frequency. pooled: its average over frequency and time, the embedding of the
    original. `tags` applies the AudioSet classifier, which is never trained.
    width: factor for the number of channels.
    """

    sample_rate = AUGMENT_MEL_STFT.sample_rate
    pooled_is_mean = True
    reads_int16 = True
    special_options = frozenset({"fmin_aug_range", "fmax_aug_range"})

    def __init__(self, width: float) -> None:
        super().__init__()
        self.front_end = KaldiLogMel()
        channels = round_to_eight(16 * width)
        features: list[nn.Module] = [conv_norm(1, channels, 3, nn.Hardswish, stride=2)]
        for kernel, expanded, outputs, gated, activation, stride in BLOCKS:
            inputs, channels = channels, round_to_eight(outputs * width)
            features.append(
                InvertedResidual(inputs, round_to_eight(expanded * width), channels, kernel, gated, activation, stride)
            )
        self.dim = 6 * channels
        features.append(conv_norm(channels, self.dim, 1, nn.Hardswish))
        self.features = nn.Sequential(*features)
        hidden = round_to_eight(1280 * width)
        self.classifier = nn.Sequential(
            OrderedDict(
                {"2": nn.Linear(self.dim, hidden), "3": nn.Hardswish(), "5": nn.Linear(hidden, AUDIOSET_CLASSES)}
            )
        ).requires_grad_(False)
        initialise_convolutions(self.features)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        mel_BMF = self.spec_augment(self.mel(waveform_BS, augment_seed), waveform_BS, augment_seed)
        # On a CPU this memory layout halves the time of a training step.
        map_BCMT = as_image(mel_BMF.to(next(self.features.parameters()).dtype))
        for layer in self.features:
            map_BCMT = self.run(layer, map_BCMT)
        tokens_BTC = map_BCMT.mean(2).transpose(1, 2)
        return TokenSequence.unpadded(tokens_BTC, map_BCMT.mean((2, 3)))

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, 527] of the AudioSet classes."""
        logits_BL: Tensor = self.classifier(self.encode(waveform_BS).pooled)
        return logits_BL

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        # Each of the five convolutions of stride 2 has its centre on the first of two frames.
        hop = self.front_end.settings.hop
        num_frames = 1 + (samples - 1) // hop
        return regular_centres(math.ceil(num_frames / 32), 0, 32 * hop)

    @property
    def layers(self) -> list[tuple[str, ...]]:
        return [(f"features.{i}.",) for i in range(len(self.features))]
