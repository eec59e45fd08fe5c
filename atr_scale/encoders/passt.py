"""PaSST: a transformer over square patches of the log-mel, with structured patchout in training.

Source: kkoutini/PaSST, `models/passt.py` (Koutini et al., Interspeech 2022, arXiv 2110.05069); module names follow the
keys of its checkpoints.

Shape suffixes: B batch, S samples, M mel bands, F frames, D width, R rows of patches (frequency), T columns of patches
(time), N all tokens (class, distillation, then the patches row by row), L classes.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence, on_device
from atr_scale.encoders.audio import AUDIOSET_CLASSES, AudioEncoder, AudioEncoderOptions
from atr_scale.encoders.front_ends import AUGMENT_MEL_STFT, KaldiLogMel
from atr_scale.encoders.pretrained.layout import Layout
from atr_scale.encoders.spec_augment import for_the_batch
from atr_scale.encoders.vit import EPSILON, Block, embedding, initialise
from atr_scale.encoders.windows import regular_centres
from atr_scale.errors import UserError

MEL = AUGMENT_MEL_STFT
PATCH = 16


class PaSST(AudioEncoder):
    """Encodes clips of up to 10 s, with one token per column of patches.

    tokens: outputs of the patches averaged over frequency. pooled: the mean of the outputs of the class token and the
    distillation token, the embedding of the original. A clip shorter than a patch is padded with silence.

    stride: distance between patches, in mel frames of 10 ms and in mel bands.
    s_patchout_t, s_patchout_f: the number of columns and rows of patches that are left out in training, with their
    tokens. They are drawn once for the whole batch. At least one column of a short clip is kept.
    In training the original also shifts the time positions of clips below 10 s at random. Here they start at the first
    position, as in its evaluation.
    """

    sample_rate = MEL.sample_rate
    native_seconds = 10.0
    shortest = (PATCH - 1) * MEL.hop + 1
    reads_int16 = True
    special_options = frozenset({"s_patchout_t", "s_patchout_f", "fmin_aug_range", "fmax_aug_range", "attention"})
    layouts = (Layout(unused=(r"head_dist\.",)),)

    def __init__(self, stride: int, dim: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.front_end = KaldiLogMel()
        self.dim, self.stride = dim, stride
        self.rows = (MEL.num_mels - PATCH) // stride + 1
        self.columns = (round(self.native_seconds * MEL.sample_rate) // MEL.hop - PATCH) // stride + 1
        self.cls_token = embedding(1, 1, dim)
        self.dist_token = embedding(1, 1, dim)
        self.new_pos_embed = embedding(1, 2, dim)
        self.freq_new_pos_embed = embedding(1, dim, self.rows, 1)
        self.time_new_pos_embed = embedding(1, dim, 1, self.columns)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(1, dim, PATCH, stride)))
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, EPSILON)
        self.head = nn.Sequential(nn.LayerNorm(dim, 1e-5), nn.Linear(dim, AUDIOSET_CLASSES)).requires_grad_(False)
        initialise(self)

    def configure(self, options: AudioEncoderOptions, name: str) -> None:
        for option, number, axis in (("s_patchout_t", self.columns, "columns"), ("s_patchout_f", self.rows, "rows")):
            if getattr(options, option) >= number:
                raise UserError(
                    f"{option} = {getattr(options, option)} leaves out all {number} {axis} of patches of {name}: "
                    f"give at most {number - 1}"
                )
        super().configure(options, name)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        if waveform_BS.shape[1] < self.shortest:
            waveform_BS = nn.functional.pad(waveform_BS, (0, self.shortest - waveform_BS.shape[1]))
        mel_BMF = self.spec_augment(self.mel(waveform_BS, augment_seed), waveform_BS, augment_seed)
        patches_BDRT = self.patchout(self.patches(mel_BMF), augment_seed)
        x_BND = self.transform(patches_BDRT)
        tokens_BTD = x_BND[:, 2:].unflatten(1, patches_BDRT.shape[2:]).mean(1)
        return TokenSequence.unpadded(tokens_BTD, x_BND[:, :2].mean(1))

    def patches(self, mel_BMF: Tensor) -> Tensor:
        """Spectrogram [B, M, F] -> projected patches with their positions [B, D, R, T]."""
        patches_BDRT: Tensor = self.patch_embed(mel_BMF.unsqueeze(1).to(self.cls_token.dtype))
        return patches_BDRT + self.time_new_pos_embed[..., : patches_BDRT.shape[3]] + self.freq_new_pos_embed

    def patchout(self, patches_BDRT: Tensor, augment_seed: int) -> Tensor:
        """In training leave out random rows and columns of patches, as many as the options say, and keep the order."""
        if not self.training:
            return patches_BDRT
        draws = for_the_batch(augment_seed, "patchout")
        for axis, left_out in ((3, self.options.s_patchout_t), (2, self.options.s_patchout_f)):
            if left_out:
                number = patches_BDRT.shape[axis]
                kept = np.sort(draws.permutation(number)[: max(1, number - left_out)])
                patches_BDRT = patches_BDRT.index_select(axis, on_device(kept, patches_BDRT.device))
        return patches_BDRT

    def transform(self, patches_BDRT: Tensor) -> Tensor:
        """Patches [B, D, R, T] -> outputs of the transformer [B, 2 + R * T, D]."""
        special_1ND = torch.cat([self.cls_token, self.dist_token], 1) + self.new_pos_embed
        x_BND = torch.cat(
            [special_1ND.expand(patches_BDRT.shape[0], -1, -1), patches_BDRT.flatten(2).transpose(1, 2)], 1
        )
        for block in self.blocks:
            x_BND = self.run(partial(block, attention=self.options.attention), x_BND)
        outputs_BND: Tensor = self.norm(x_BND)
        return outputs_BND

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        num_frames = 1 + (max(samples, self.shortest) - 1) // MEL.hop
        num_columns = (num_frames - PATCH) // self.stride + 1
        return regular_centres(num_columns, (PATCH - 1) / 2 * MEL.hop, self.stride * MEL.hop)

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, 527] of the AudioSet classes."""
        logits_BL: Tensor = self.head(self.encode(waveform_BS).pooled)
        return logits_BL

    @property
    def layers(self) -> list[tuple[str, ...]]:
        embeddings = ("patch_embed.", "cls_token", "dist_token", "new_pos_", "freq_new_pos_", "time_new_pos_")
        return [embeddings, *((f"blocks.{i}.",) for i in range(len(self.blocks))), ("norm.",)]
