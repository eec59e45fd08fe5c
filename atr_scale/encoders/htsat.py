"""HTS-AT: a Swin transformer over the log-mel spectrogram, folded into a square image.

Source: RetroCirce/HTS-Audio-Transformer, `model/htsat.py` (Chen et al., ICASSP 2022, arXiv 2202.00874). The blocks are
those of transformers' `ClapAudioModel`, which is the same network.

Shape suffixes: B batch, S samples, M mel bands, F mel frames, P patches of the image, D width, C chunks, Q rows of
frequency and T frames of the last map. In attention: N windows of the batch, W windows of a clip, H heads, L patches of
a window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders.attention import Attention, is_fused
from atr_scale.encoders.audio import AUDIOSET_CLASSES, AudioEncoder, AudioEncoderOptions
from atr_scale.encoders.front_ends import DecibelMel, DecibelNorm, MelSettings
from atr_scale.encoders.pretrained.layout import Entry, Layout
from atr_scale.encoders.windows import regular_centres
from atr_scale.errors import UserError

NUM_FRAMES = 1024  # of the spectrogram that becomes the image
NUM_CHUNKS = 4  # of time, one above the other in the image
NUM_MELS = 64
MEL = partial(MelSettings, n_fft=1024, window_length=1024, num_mels=NUM_MELS, fmin=50.0, fmax=14_000.0)

# Constants that this package computes itself. Only the first is part of the state dict.
POSITION_INDEX = "relative_position_index"
DERIVED = (rf".*\.{POSITION_INDEX}$", r".*\.attn_mask$", r"\w+\.(spectrogram|logmel)_extractor\.")
FUSION = "is a CLAP with feature fusion, which is another network: give one without (enable_fusion false)"
PARTS = {"query": 0, "key": 1, "value": 2}


def original_entry(name: str) -> Entry | None:
    """The entry of HTS-AT's own file for a parameter. Query, key and value are thirds of one matrix in it."""
    if name.endswith(POSITION_INDEX):
        return None
    part = re.search(r"attention\.self\.(query|key|value)\.", name)
    for ours, theirs in (
        (r"^swin\.", ""),
        (r"^batch_norm\.", "bn0."),
        (r"attention\.self\.(query|key|value)\.", "attn.qkv."),
        (r"attention\.self\.", "attn."),
        (r"attention\.output\.dense\.", "attn.proj."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"output\.dense\.", "mlp.fc2."),
    ):
        name = re.sub(ours, theirs, name)
    return Entry(name, PARTS[part[1]] if part else None)


def transformers_entry(name: str) -> Entry | None:
    """The entry of a saved `ClapAudioModel` for a parameter. Such a file has no classifier and no projection."""
    if name.endswith(POSITION_INDEX) or not name.startswith("swin."):
        return None
    return Entry(name.removeprefix("swin."))


AUDIO_MODEL = Layout("ClapAudioModel", prefix="audio_encoder.", derived=DERIVED, origin=transformers_entry)


class WindowAttention(nn.Module):
    """Attention inside windows, with the parameters of the module of transformers that it replaces.

    The formula of that module is bit for bit the same here; the fused kernel of torch gives the same up to rounding.
    """

    relative_position_index: Tensor

    def __init__(self, original: Any, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.attention = original.num_attention_heads, attention
        self.query, self.key, self.value, self.dropout = original.query, original.key, original.value, original.dropout
        self.relative_position_bias_table = original.relative_position_bias_table
        self.register_buffer(POSITION_INDEX, original.relative_position_index)

    def forward(self, x_NLD: Tensor, mask_WLL: Tensor | None = None, _: bool | None = None) -> tuple[Tensor]:
        length = x_NLD.shape[1]
        bias_HLL = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias_HLL = bias_HLL.unflatten(0, (length, length)).permute(2, 0, 1)
        # The windows of a clip share an axis with its heads, so that one mask serves all clips without copies.
        num_windows = 1 if mask_WLL is None else len(mask_WLL)
        split = (-1, num_windows, length, self.num_heads, x_NLD.shape[2] // self.num_heads)
        query, key, value = (
            layer(x_NLD).view(split).transpose(2, 3).flatten(1, 2) for layer in (self.query, self.key, self.value)
        )
        if is_fused(self.attention, x_NLD):
            mask = bias_HLL if mask_WLL is None else (mask_WLL.unsqueeze(1) + bias_HLL).flatten(0, 1)
            dropout = self.dropout.p if self.training else 0.0
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, mask[None].to(query.dtype), dropout)
        else:
            scores = query @ key.transpose(2, 3) / math.sqrt(split[-1])
            masked = scores.view(-1, self.num_heads, length, length) + bias_HLL
            if mask_WLL is not None:
                masked = masked.unflatten(0, (-1, num_windows)) + mask_WLL.unsqueeze(1)
            mixed = self.dropout(masked.softmax(-1)).view(scores.shape) @ value
        return (mixed.unflatten(1, (num_windows, -1)).transpose(2, 3).reshape(x_NLD.shape),)


class SwinEncoder(AudioEncoder):
    """The network of HTS-AT and of LAION-CLAP. A clip of any length up to ten seconds becomes 32 tokens.

    tokens: the last map averaged over its two rows of frequency. pooled: its average over both axes.
    embed_dim: width of the first stage; each further stage doubles it. depths, heads: number of blocks and of attention
    heads in each stage.
    """

    native_seconds = 10.0
    reads_int16 = True
    pooled_is_mean = True
    special_options = frozenset({"attention"})

    def __init__(
        self,
        front_end: DecibelMel,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (4, 8, 16, 32),
    ) -> None:
        # Importing transformers takes seconds, and most encoders do not need it.
        from transformers.models.clap.configuration_clap import ClapAudioConfig
        from transformers.models.clap.modeling_clap import ClapAudioEncoder

        super().__init__()
        self.front_end = front_end
        self.dim = embed_dim * 2 ** (len(depths) - 1)
        self.swin: Any = ClapAudioEncoder(
            ClapAudioConfig(
                patch_embeds_hidden_size=embed_dim,
                hidden_size=self.dim,
                depths=list(depths),
                num_attention_heads=list(heads),
                hidden_dropout_prob=0.0,  # as in the training of both projects
            )
        )
        self.swin.batch_norm = DecibelNorm(NUM_MELS)
        for layer in self.swin.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def configure(self, options: AudioEncoderOptions, name: str) -> None:
        super().configure(options, name)
        for block in self.blocks:
            block.attention.self = WindowAttention(block.attention.self, options.attention)

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks, lowest first."""
        return [block for stage in self.swin.layers for block in stage.blocks]

    def compiled_parts(self) -> Iterable[nn.Module]:
        return self.blocks

    def image(self, waveform_BS: Tensor, augment_seed: int = 0) -> Tensor:
        """Waveform [B, S] -> input of the network [B, 1, 256, 256]: row = chunk * 64 + mel band, column = frame of it.

        The normalised spectrogram is resized in time to 1024 frames. A shorter clip is stretched, as in the original.
        """
        mel_BMF = self.mel(waveform_BS, augment_seed).to(self.swin.batch_norm.weight.dtype)
        mel_BMF = self.spec_augment(self.swin.batch_norm(mel_BMF), waveform_BS, augment_seed)
        size = (mel_BMF.shape[1], NUM_FRAMES)
        mel_B1MF = nn.functional.interpolate(mel_BMF.unsqueeze(1), size, mode="bicubic", align_corners=True)
        chunks_B1CMF: Tensor = mel_B1MF.unflatten(3, (NUM_CHUNKS, -1)).transpose(2, 3)
        return chunks_B1CMF.flatten(2, 3)

    def feature_map(self, waveform_BS: Tensor, augment_seed: int = 0) -> Tensor:
        """Waveform [B, S] -> last map [B, D, 2, 32], over frequency and time."""
        x_BPD = self.swin.patch_embed(self.image(waveform_BS, augment_seed))
        for stage, resolution in zip(self.swin.layers, self.swin.input_resolutions, strict=True):
            for block in stage.blocks:
                x_BPD = self.run(partial(_first_output, block, resolution), x_BPD)
            if stage.downsample is not None:
                x_BPD = stage.downsample(x_BPD, resolution)
        height, width = self.swin.input_resolutions[-1]
        map_BCQTD: Tensor = self.swin.norm(x_BPD).unflatten(1, (NUM_CHUNKS, height // NUM_CHUNKS, width))
        return map_BCQTD.permute(0, 4, 2, 1, 3).flatten(3)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        map_BDQT = self.feature_map(waveform_BS, augment_seed)
        tokens_BTD = map_BDQT.mean(2).transpose(1, 2)
        return TokenSequence.unpadded(tokens_BTD, map_BDQT.mean((2, 3)))

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        # The clip is stretched to the image; the first frame of the spectrogram becomes its first column.
        num_tokens: int = NUM_CHUNKS * self.swin.input_resolutions[-1][1]
        columns, column = NUM_FRAMES // num_tokens, samples / (NUM_FRAMES - 1)
        return regular_centres(num_tokens, (columns - 1) / 2 * column, columns * column)

    @property
    def layers(self) -> list[tuple[str, ...]]:
        layers: list[tuple[str, ...]] = [("swin.batch_norm.", "swin.patch_embed.")]
        for i, stage in enumerate(self.swin.layers):
            layers += [(f"swin.layers.{i}.blocks.{j}.",) for j in range(len(stage.blocks))]
            layers[-1] += (f"swin.layers.{i}.downsample.",)
        layers[-1] += ("swin.norm.",)
        return layers


def _first_output(block: Callable[..., tuple[Tensor, ...]], resolution: tuple[int, int], x_BPD: Tensor) -> Tensor:
    return block(x_BPD, resolution)[0]


class HTSAT(SwinEncoder):
    """HTS-AT at 32 kHz. `tags` applies its AudioSet classifier, which is never trained."""

    sample_rate = 32_000
    special_options = frozenset({"attention", "long_clips"})
    layouts = (
        Layout(
            "HTS-AT",
            container="state_dict",
            prefix="sed_model.",
            derived=DERIVED,
            unused=(r"sed_model\.head\.",),
            origin=original_entry,
        ),
        AUDIO_MODEL,
        Layout(prefix="audio_encoder.patch_embed.mel_conv2d.", refusal=FUSION),
    )

    def __init__(self, **network: Any) -> None:
        super().__init__(DecibelMel(MEL(sample_rate=self.sample_rate, hop=320)), **network)
        self.tscam_conv = nn.Conv2d(self.dim, AUDIOSET_CLASSES, (2, 3), padding=(0, 1)).requires_grad_(False)
        for parameter in self.tscam_conv.parameters():
            nn.init.zeros_(parameter)  # until a classifier is loaded

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, 527] of the AudioSet classes, the mean over frames."""
        if not self.tscam_conv.weight.any():
            raise UserError("these weights of htsat came without a classifier: load HTS-AT's own checkpoint to tag")
        logits_BLT: Tensor = self.tscam_conv(self.feature_map(waveform_BS)).flatten(2)
        return logits_BLT.mean(2)
