"""PANNs' Cnn14 and ResNet38 over decibel mel spectrograms.

Source: qiuqiangkong/audioset_tagging_cnn, `pytorch/models.py` (Kong et al., "PANNs: Large-Scale Pretrained Audio Neural
Networks for Audio Pattern Recognition", TASLP 2020, arXiv 1912.10211); module names follow the keys of its checkpoints.

Shape suffixes: B batch, S samples, C channels, M mel bands, F frames, T tokens, L classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders.audio import AUDIOSET_CLASSES, AudioEncoder, as_image, initialise_convolutions
from atr_scale.encoders.front_ends import DecibelMel, DecibelNorm, MelSettings
from atr_scale.encoders.pretrained.layout import Layout
from atr_scale.encoders.windows import regular_centres

SAMPLE_RATE = 32_000
HOP = 320
NUM_MELS = 64
FRAMES_PER_TOKEN = 32

RESNET_DEPTHS = (3, 4, 6, 3)


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class ConvBlock(nn.Module):
    """Two convolutions. With `halve`, frequency and time are then halved, rounded down."""

    def __init__(self, inputs: int, outputs: int, halve: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x_BCFM: Tensor) -> Tensor:
        x_BCFM = torch.relu(self.bn1(self.conv1(x_BCFM)))
        x_BCFM = torch.relu(self.bn2(self.conv2(x_BCFM)))
        pooled_BCFM: Tensor = self.dropout(self.pool(x_BCFM))
        return pooled_BCFM


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut.

    With `halve`, both branches first average 2 x 2, and the shortcut changes the number of channels.
    """

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv1, self.bn1 = conv3(inputs, outputs), nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(0.1)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            if halve
            else nn.Identity()
        )
        # As in the original each block starts as its shortcut; sixteen random branches would add up.
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x_BCFM: Tensor) -> Tensor:
        y_BCFM = torch.relu(self.bn1(self.conv1(self.pool(x_BCFM))))
        y_BCFM = self.bn2(self.conv2(self.dropout(y_BCFM)))
        return torch.relu(y_BCFM + self.downsample(x_BCFM))


class Panns(AudioEncoder):
    """Encodes clips of any length in one pass. F mel frames of 10 ms give F // 32 tokens, one per 0.32 s.

    A clip too short for one token is padded with silence.
    tokens: the last map averaged over frequency. pooled: the sum of their maximum and their mean over time.
    `tags` applies the AudioSet classifier, which is never trained.
    """

    sample_rate = SAMPLE_RATE
    shortest = (FRAMES_PER_TOKEN - 1) * HOP
    reads_int16 = True
    layouts = (
        Layout(
            container="model",
            derived=(r"spectrogram_extractor\.stft\.conv_(real|imag)\.weight", r"logmel_extractor\.melW"),
        ),
    )

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.front_end = DecibelMel(
            MelSettings(
                sample_rate=SAMPLE_RATE,
                n_fft=1024,
                window_length=1024,
                hop=HOP,
                num_mels=NUM_MELS,
                fmin=50.0,
                fmax=14_000.0,
            )
        )
        self.bn0 = DecibelNorm(NUM_MELS)
        self.fc1 = nn.Linear(dim, dim).requires_grad_(False)
        self.fc_audioset = nn.Linear(dim, AUDIOSET_CLASSES).requires_grad_(False)

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The layers in the order in which they are applied."""

    def normalised_mel(self, waveform_BS: Tensor, augment_seed: int = 0) -> Tensor:
        """Waveform [B, S] -> input of the first block [B, M, F]."""
        padded_BS = nn.functional.pad(waveform_BS, (0, max(0, self.shortest - waveform_BS.shape[1])))
        mel_BMF = self.bn0(self.mel(padded_BS, augment_seed).to(self.bn0.weight.dtype))
        return self.spec_augment(mel_BMF, padded_BS, augment_seed)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        mel_BMF = self.normalised_mel(waveform_BS, augment_seed)
        map_BCFM = as_image(mel_BMF.transpose(1, 2))
        for block in self.blocks:
            map_BCFM = self.run(block, map_BCFM)
        tokens_BTC = map_BCFM.mean(3).transpose(1, 2)
        return TokenSequence.unpadded(tokens_BTC, tokens_BTC.amax(1) + tokens_BTC.mean(1))

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, 527] of the AudioSet classes."""
        logits_BL: Tensor = self.fc_audioset(torch.relu(self.fc1(self.encode(waveform_BS).pooled)))
        return logits_BL

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        num_frames = 1 + max(samples, self.shortest) // HOP
        return regular_centres(num_frames // FRAMES_PER_TOKEN, (FRAMES_PER_TOKEN - 1) / 2 * HOP, FRAMES_PER_TOKEN * HOP)

    def compiled_parts(self) -> Iterable[nn.Module]:
        return self.blocks


class Cnn14(Panns):
    """Six blocks of two convolutions. channels: the output channels of each block."""

    def __init__(self, channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)) -> None:
        super().__init__(dim=channels[-1])
        inputs = 1
        for i, outputs in enumerate(channels, start=1):
            self.add_module(f"conv_block{i}", ConvBlock(inputs, outputs, halve=i < len(channels)))
            inputs = outputs
        initialise_convolutions(self)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.get_submodule(f"conv_block{i}") for i in range(1, 7)]

    @property
    def layers(self) -> list[tuple[str, ...]]:
        return [("bn0.", "conv_block1."), *((f"conv_block{i}.",) for i in range(2, 7))]


class ResNet38(Panns):
    """A block of two convolutions, four stages with sixteen residual blocks, and a last block of two convolutions.

    channels: the output channels of each stage, then of the last block. The first block has those of the first stage.
    """

    def __init__(self, channels: tuple[int, ...] = (64, 128, 256, 512, 2048)) -> None:
        *stages, dim = channels
        super().__init__(dim)
        self.conv_block1 = ConvBlock(1, stages[0])
        self.resnet = nn.Module()
        inputs = stages[0]
        for stage, (outputs, depth) in enumerate(zip(stages, RESNET_DEPTHS, strict=True), start=1):
            self.resnet.add_module(
                f"layer{stage}",
                nn.Sequential(
                    ResidualBlock(inputs, outputs, halve=stage > 1),
                    *(ResidualBlock(outputs, outputs, halve=False) for _ in range(depth - 1)),
                ),
            )
            inputs = outputs
        self.pool = nn.Sequential(nn.AvgPool2d(2), nn.Dropout(0.2))
        self.conv_block_after1 = ConvBlock(inputs, dim, halve=False)
        initialise_convolutions(self)

    @property
    def residual_blocks(self) -> dict[str, nn.Module]:
        names = [f"resnet.layer{i}.{j}" for i, depth in enumerate(RESNET_DEPTHS, start=1) for j in range(depth)]
        return {name: self.get_submodule(name) for name in names}

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.conv_block1, *self.residual_blocks.values(), self.pool, self.conv_block_after1]

    @property
    def layers(self) -> list[tuple[str, ...]]:
        residual = ((f"{name}.",) for name in self.residual_blocks)
        return [("bn0.", "conv_block1."), *residual, ("conv_block_after1.",)]
