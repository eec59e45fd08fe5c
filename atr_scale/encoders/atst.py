"""ATST-Frame: a transformer over columns of four mel frames, 40 ms each.

Source: Audio-WestlakeU/audiossl, `methods/atstframe` (Li, Shao, Li, TASLP 2024, arXiv 2306.04186); module names follow
the keys of its checkpoints.

Shape suffixes: B batch, S samples, M mel bands, F frames, D width, T tokens, P mel values of a token, L classes.
"""

from __future__ import annotations

from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.encoders.audio import AUDIOSET_CLASSES, AudioEncoder
from atr_scale.encoders.front_ends import MelSettings, MinMaxMel
from atr_scale.encoders.pretrained.layout import Entry, Layout
from atr_scale.encoders.vit import EPSILON, Block, embedding, initialise
from atr_scale.encoders.windows import regular_centres
from atr_scale.errors import UserError

SAMPLE_RATE = 16_000
HOP = 160
NUM_MELS = 64
PATCH_FRAMES = 4


def fine_tuned(name: str) -> Entry:
    return Entry(name if name.startswith("head.") else f"encoder.encoder.{name}")


def self_supervised(name: str) -> Entry | None:
    return None if name.startswith("head.") else Entry(name)


def self_supervised_older(name: str) -> Entry | None:
    return self_supervised(name.replace("norm_frame.", "norm."))


TEACHER = "model.teacher.encoder."
UNUSED_BESIDE_TEACHER = (r"model\.student\.", r"model\.teacher\.(projector|predictor)\.", r".*\.mask_embed$")
LAYOUTS = (
    Layout("fine-tuned on AudioSet", "state_dict", unused=(r".*\.mask_embed$",), origin=fine_tuned),
    Layout("self-supervised", "state_dict", TEACHER, unused=UNUSED_BESIDE_TEACHER, origin=self_supervised),
    Layout(
        "self-supervised, older names",
        "state_dict",
        TEACHER,
        unused=(*UNUSED_BESIDE_TEACHER, r".*\.cls_token$"),
        origin=self_supervised_older,
    ),
)


class PatchEmbedding(nn.Module):
    """Linear projection of four consecutive mel frames to one token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(NUM_MELS * PATCH_FRAMES, dim)

    def forward(self, mel_BMF: Tensor) -> Tensor:
        """[B, M, F] -> tokens [B, F // 4, D]. Frames beyond a multiple of four are dropped."""
        patches_BMTf = mel_BMF[..., : mel_BMF.shape[2] // PATCH_FRAMES * PATCH_FRAMES].unflatten(2, (-1, PATCH_FRAMES))
        tokens_BTD: Tensor = self.patch_embed(patches_BMTf.transpose(1, 2).flatten(2))
        return tokens_BTD


class Classifier(nn.Module):
    """The classifier of AudioSet.

    Its weights are zero until an original file is loaded. `tags` recognises a missing classifier by this, also after
    the weights have been saved to and loaded from a checkpoint of this package.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.linear = nn.Linear(dim, AUDIOSET_CLASSES)
        nn.init.zeros_(self.linear.weight)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        logits_BL: Tensor = self.linear(self.norm(pooled_BD))
        return logits_BL


class ATSTFrame(AudioEncoder):
    """Encodes clips of up to 10 s. F mel frames of 10 ms give F // 4 tokens, one per 40 ms.

    tokens: outputs of the last layer after the norm. pooled: their mean, as the original fine-tunes on AudioSet.
    From a file of self-supervised weights the weights of the teacher network are loaded. Such a file has no classifier,
    so `tags` needs a fine-tuned file.
    """

    sample_rate = SAMPLE_RATE
    native_seconds = 10.0
    reads_int16 = True
    pooled_is_mean = True
    special_options = frozenset({"attention"})
    layouts = LAYOUTS

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.front_end = MinMaxMel(
            MelSettings(
                sample_rate=SAMPLE_RATE,
                n_fft=1024,
                window_length=1024,
                hop=HOP,
                num_mels=NUM_MELS,
                fmin=60.0,
                fmax=7_800.0,
            ),
            floor=1e-10,
            dynamic_range=80.0,
            minimum=-79.6482,
            maximum=50.6842,
        )
        self.dim = dim
        num_tokens = round(self.native_seconds * SAMPLE_RATE) // HOP // PATCH_FRAMES
        self.patch_embed = PatchEmbedding(dim)
        # The original reserves the first position for a class token, which it does not use.
        self.pos_embed = embedding(1, 1 + num_tokens, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=False) for _ in range(depth))
        self.norm_frame = nn.LayerNorm(dim, EPSILON)
        initialise(self)
        self.head = Classifier(dim).requires_grad_(False)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        mel_BMF = self.spec_augment(self.mel(waveform_BS, augment_seed), waveform_BS, augment_seed)
        x_BTD = self.patch_embed(mel_BMF.to(self.pos_embed.dtype))
        x_BTD = x_BTD + self.pos_embed[:, 1 : 1 + x_BTD.shape[1]]
        for block in self.blocks:
            x_BTD = self.run(partial(block, attention=self.options.attention), x_BTD)
        tokens_BTD = self.norm_frame(x_BTD)
        return TokenSequence.unpadded(tokens_BTD, tokens_BTD.sum(1) / (tokens_BTD.shape[1] + 1e-6))

    def token_centres(self, samples: int) -> NDArray[np.float64]:
        num_tokens = (1 + samples // HOP) // PATCH_FRAMES
        return regular_centres(num_tokens, (PATCH_FRAMES - 1) / 2 * HOP, PATCH_FRAMES * HOP)

    def logits(self, waveform_BS: Tensor) -> Tensor:
        """Logits [B, 527] of the AudioSet classes. Raises UserError if the weights came without a classifier."""
        if not self.head.linear.weight.any():
            raise UserError(
                "these weights of atst_frame came without a classifier: load the file fine-tuned on AudioSet to tag"
            )
        logits_BL: Tensor = self.head(self.encode(waveform_BS).pooled)
        return logits_BL

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.head.eval()  # the classifier is never trained, so its batch statistics stay as loaded
        return self

    @property
    def layers(self) -> list[tuple[str, ...]]:
        blocks = ((f"blocks.{i}.",) for i in range(len(self.blocks)))
        return [("patch_embed.", "pos_embed"), *blocks, ("norm_frame.",)]
